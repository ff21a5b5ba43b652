"""/v1/messages and /v1/messages/count_tokens: Anthropic's API."""

import json
import sys
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.anthropic_fields import MessagesFields, PromptFields, conversation, params
from nanovllm.server.calls import respond_to
from nanovllm.server.conversation import answer, prompt_of, stream_answer
from nanovllm.server.errors import ApiError
from nanovllm.server.parsing.pieces import CallArguments, CallBegin, Content, Message, Piece, Reasoning
from nanovllm.server.sse import event
from nanovllm.server.state import ServerState, state_of

router = APIRouter()


def _event(kind: str, **data: Any) -> bytes:
    return event({"type": kind, **data}, kind)


PING = _event("ping")


@router.post("/v1/messages", response_model=None)
async def create_message(fields: MessagesFields, request: Request) -> Response:
    """Answer a conversation. The header anthropic-version may be there, and changes nothing."""
    state = state_of(request)
    state.check_model(fields.model)
    return await respond_to(request, _Call(fields, state, request.state.request_id), fields.stream, PING)


@router.post("/v1/messages/count_tokens")
async def count_tokens(fields: PromptFields, request: Request) -> dict[str, int]:
    """How many tokens a conversation's prompt has."""
    state = state_of(request)
    state.check_model(fields.model)
    asked = conversation(fields, SamplingParams(), request.state.request_id)
    prompt = await prompt_of(state, asked)
    return {"input_tokens": len(prompt["prompt_token_ids"])}


class _Call:
    """One request to /v1/messages, and its answer in Anthropic's form."""

    num_completions = 1

    def __init__(self, fields: MessagesFields, state: ServerState, request_id: str) -> None:
        state.check_limit("stop_sequences", len(fields.stop_sequences or ()), state.limits.stop_strings)
        self.fields, self.state = fields, state
        self.id = f"msg_{request_id}"
        self.asked = conversation(fields, params(fields, state.llm.get_default_sampling_params()), self.id)

    async def answer(self) -> dict[str, Any]:
        """The whole response."""
        output, (message,) = await answer(self.state, self.asked)
        completion = output.outputs[0]
        num_tokens = len(completion.token_ids)
        end = self._end(completion, num_tokens, bool(message.tool_calls))
        return self._message(_content(message), _usage(output, num_tokens), end)

    async def events(self) -> AsyncGenerator[bytes]:
        """The response as events, each with what is new."""
        blocks, num_tokens, has_begun = _Blocks(), 0, False
        async for news in stream_answer(self.state, self.asked):
            if not has_begun:
                has_begun = True
                yield _event("message_start", message=self._message([], _usage(news.output, 0), _NO_END))
            num_tokens += len(news.completion.token_ids)
            for piece in news.pieces:
                for one in blocks.events(piece):
                    yield one
        for one in blocks.close():
            yield one
        end = self._end(news.completion, num_tokens, blocks.has_called)
        yield _event("message_delta", delta=end, usage=_usage(news.output, num_tokens))
        yield _event("message_stop")

    def _message(self, content: list[dict[str, Any]], usage: dict[str, int], end: dict[str, Any]) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.state.names[0]}
        return head | {"content": content, **end, "usage": usage}

    def _end(self, completion: CompletionOutput, num_tokens: int, has_called: bool) -> dict[str, Any]:
        """Why the answer ended. Raises ApiError if it failed: Anthropic has no reason for that."""
        reason, stop = completion.finish_reason, completion.stop_reason
        if reason == "length":
            is_full = num_tokens < self.fields.max_tokens
            return _NO_END | {"stop_reason": "model_context_window_exceeded" if is_full else "max_tokens"}
        if reason != "stop":
            raise ApiError(500, f"the answer ended early: {stop or reason}")
        if isinstance(stop, str):
            return _NO_END | {"stop_reason": "stop_sequence", "stop_sequence": stop}
        return _NO_END | {"stop_reason": "tool_use" if has_called else "end_turn"}


_NO_END = {"stop_reason": None, "stop_sequence": None, "stop_details": None}


class _Blocks:
    """Turns pieces into the events of content blocks, of which one at a time is open."""

    def __init__(self) -> None:
        self.has_called = False
        self._index = -1
        self._open: str | None = None  # the type of the block that is open

    def events(self, piece: Piece) -> list[bytes]:
        match piece:
            case Reasoning(text):
                return self._in("thinking", {"thinking": "", "signature": ""}) + self._delta("thinking", text)
            case Content(text):
                return self._in("text", {"text": ""}) + self._delta("text", text)
            case CallBegin(_, id, name):
                self.has_called = True
                return self.close() + self._in("tool_use", {"id": id, "name": name, "input": {}})
            case CallArguments(_, text):
                return self._delta("input_json", text, "partial_json")

    def close(self) -> list[bytes]:
        """Ends the open block, if there is one."""
        if self._open is None:
            return []
        self._open = None
        return [_event("content_block_stop", index=self._index)]

    def _in(self, kind: str, empty: dict[str, Any]) -> list[bytes]:
        """Begins such a block, unless it is the one that is open."""
        if self._open == kind:
            return []
        events = self.close()
        self._open = kind
        self._index += 1
        return [*events, _event("content_block_start", index=self._index, content_block={"type": kind, **empty})]

    def _delta(self, kind: str, text: str, field: str | None = None) -> list[bytes]:
        delta = {"type": f"{kind}_delta", field or kind: text}
        return [_event("content_block_delta", index=self._index, delta=delta)]


def _content(message: Message) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if message.reasoning:
        blocks.append({"type": "thinking", "thinking": message.reasoning, "signature": ""})
    if message.content:
        blocks.append({"type": "text", "text": message.content})
    for call in message.tool_calls:
        arguments = json.loads(call.arguments, parse_float=_number, parse_int=_number)
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
    return blocks


def _number(text: str) -> int | float:
    """A number of a call, as JSON can say it again: a model may write more digits than a number can have."""
    if text.lstrip("-").isdecimal() and len(text) < 1000:
        return int(text)
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))


def _usage(output: RequestOutput, num_tokens: int) -> dict[str, int]:
    """Anthropic's three counts add up to the prompt. Nothing counts as written to the cache, since all of it is."""
    cached = output.num_cached_tokens
    usage = {"input_tokens": len(output.prompt_token_ids) - cached, "cache_read_input_tokens": cached}
    return usage | {"cache_creation_input_tokens": 0, "output_tokens": num_tokens}
