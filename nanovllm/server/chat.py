"""/v1/chat/completions."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.outputs import CompletionOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.calls import respond_to
from nanovllm.server.completions import by_id
from nanovllm.server.conversation import Conversation, News, answer, stream_answer
from nanovllm.server.openai_fields import ChatFields, StreamOptions, sampling_params
from nanovllm.server.parsing.pieces import CallArguments, CallBegin, Content, Message, Piece, Reasoning
from nanovllm.server.sse import DONE, Chunks
from nanovllm.server.state import ServerState, state_of
from nanovllm.server.token_logprobs import token_logprobs
from nanovllm.server.usage import Usage

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(fields: ChatFields, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    state.check_model(fields.model)
    call = _Call(fields, state, fields.request_id or request.state.request_id)
    return await respond_to(request, call, fields.stream)


class _Call:
    """One request to the endpoint, and its answer in OpenAI's form."""

    def __init__(self, fields: ChatFields, state: ServerState, request_id: str) -> None:
        self.fields, self.state = fields, state
        self.n = self.num_completions = fields.n or 1
        self.id = f"chatcmpl-{request_id}"
        self.asked = Conversation(
            messages=fields.messages,
            params=_params(fields, state),
            request_id=self.id,
            tools=fields.tools,
            tool_choice=fields.tool_choice,
            parallel_tool_calls=fields.parallel_tool_calls is not False,
            template=_template(fields),
        )

    async def answer(self) -> dict[str, Any]:
        """The whole response."""
        output, messages = await answer(self.state, self.asked)
        usage = Usage()
        usage.add_prompt(output)
        choices = []
        for completion, message in zip(output.outputs, messages, strict=True):
            usage.completion_tokens += len(completion.token_ids)
            choice = {"index": completion.index, "message": self._message(message)}
            choice |= {"logprobs": self._logprobs(completion), **_end(completion, bool(message.tool_calls))}
            if self.fields.return_token_ids:
                choice["token_ids"] = completion.token_ids
            choices.append(choice)
        body = self._head("chat.completion") | {"choices": choices, "usage": usage.as_dict()}
        if self.fields.prompt_logprobs is not None:
            body["prompt_logprobs"] = [of_token and by_id(of_token) for of_token in output.prompt_logprobs or []]
        if self.fields.return_token_ids:
            body["prompt_token_ids"] = output.prompt_token_ids
        return body

    async def events(self) -> AsyncGenerator[bytes]:
        """The response as events, each with what is new."""
        usage, options = Usage(), self.fields.stream_options or StreamOptions()
        has_begun, has_called = [False] * self.n, [False] * self.n
        self.chunks = Chunks(self._head("chat.completion.chunk"))
        async for news in stream_answer(self.state, self.asked):
            if not any(has_begun):
                usage.add_prompt(news.output)
            index = news.completion.index
            usage.completion_tokens += len(news.completion.token_ids)
            if not has_begun[index]:
                has_begun[index] = True
                yield self._chunk(index, {"role": "assistant", "content": ""}, usage, options)
            has_called[index] |= any(isinstance(piece, CallBegin) for piece in news.pieces)
            for chunk in self._news(news, has_called[index], usage, options):
                yield chunk
        if options.include_usage:
            yield self.chunks.end(usage.as_dict())
        yield DONE

    def _news(self, news: News, has_called: bool, usage: Usage, options: StreamOptions) -> list[bytes]:
        completion = news.completion
        deltas = [delta for piece in news.pieces if (delta := self._delta(piece))]
        end = _end(completion, has_called) if completion.finish_reason is not None else {}
        logprobs = self._logprobs(completion)
        if not deltas and (end or logprobs or self.fields.return_token_ids):
            deltas = [{}]
        chunks = []
        for i, delta in enumerate(deltas):
            more: dict[str, Any] = {"logprobs": logprobs if i == 0 else None}
            if i == 0 and self.fields.return_token_ids:
                more["token_ids"] = completion.token_ids
            if i == len(deltas) - 1:
                more |= end
            chunks.append(self._chunk(completion.index, delta, usage, options, more))
        return chunks

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        usage: Usage,
        options: StreamOptions,
        more: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **(more or {})}
        return self.chunks.of(choice, usage.of_chunk(options))

    def _delta(self, piece: Piece) -> dict[str, Any] | None:
        match piece:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text} if self.fields.include_reasoning else None
            case CallBegin(index, id, name):
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _message(self, message: Message) -> dict[str, Any]:
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
        told: dict[str, Any] = {"role": "assistant", "content": message.content or ("" if not calls else None)}
        told |= {"refusal": None} | ({"tool_calls": calls} if calls else {})
        if message.reasoning and self.fields.include_reasoning:
            told["reasoning_content"] = message.reasoning
        return told

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.state.now(), "model": self.state.names[0]}

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if not self.fields.logprobs:
            return None
        content = token_logprobs(completion, self.fields.top_logprobs or 0, self.fields.return_tokens_as_token_ids)
        return {"content": content, "refusal": None}


def _params(fields: ChatFields, state: ServerState) -> SamplingParams:
    """Raises ApiError, ValueError or TypeError, naming the field."""
    state.check_sampling(fields)
    values: dict[str, Any] = {"max_tokens": fields.max_completion_tokens or fields.max_tokens}
    if fields.logprobs:
        values["logprobs"] = fields.top_logprobs or 0
    return sampling_params(fields, state.llm.get_default_sampling_params(), **values)


def _template(fields: ChatFields) -> dict[str, Any]:
    """What the body says of the chat template."""
    options: dict[str, Any] = {"add_generation_prompt": fields.add_generation_prompt}
    if fields.continue_final_message:
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    if fields.chat_template is not None:
        options["chat_template"] = fields.chat_template
    kwargs = dict(fields.chat_template_kwargs or {})
    if fields.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", fields.reasoning_effort)
        if fields.reasoning_effort == "none":
            kwargs.setdefault("enable_thinking", False)
    return options | ({"chat_template_kwargs": kwargs} if kwargs else {})


def _end(completion: CompletionOutput, has_called: bool) -> dict[str, Any]:
    reason = completion.finish_reason
    if has_called and reason == "stop":
        reason = "tool_calls"
    return {"finish_reason": reason, "stop_reason": completion.stop_reason}
