"""/v1/completions: text goes on. With `echo` and `logprobs` it also scores text, as lm-eval asks."""

from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.server.calls import respond_to
from nanovllm.server.merge import merged
from nanovllm.server.openai_fields import CompletionFields, StreamOptions, sampling_params
from nanovllm.server.sse import DONE, Chunks
from nanovllm.server.state import ServerState, state_of
from nanovllm.server.usage import Usage

router = APIRouter()
LEAST_LOGPROB = -9999.0  # OpenAI's; JSON has no infinity


@router.post("/v1/completions", response_model=None)
async def create_completion(fields: CompletionFields, request: Request) -> Response:
    """Complete a prompt, or each of a list."""
    state = state_of(request)
    state.check_model(fields.model)
    call = _Call(fields, state, fields.request_id or request.state.request_id)
    return await respond_to(request, call, fields.stream)


class _Call:
    """One request to the endpoint: its prompts, and how their outputs become choices."""

    def __init__(self, fields: CompletionFields, state: ServerState, request_id: str) -> None:
        self.fields, self.state = fields, state
        self.id = f"cmpl-{request_id}"
        self.prompts = _prompts(fields)
        # Of each prompt, by the id of its request.
        self.numbers = {self.id if len(self.prompts) == 1 else f"{self.id}-{i}": i for i in range(len(self.prompts))}
        self.n = fields.n or 1
        self.num_completions = len(self.prompts) * self.n
        state.check_limit("prompt", len(self.prompts), state.limits.prompts)
        state.check_sampling(fields)
        if fields.max_tokens == 0 and not fields.echo:
            raise ValueError("max_tokens=0 must be at least 1 unless echo is true")
        if fields.echo and fields.stream:
            raise ValueError("echo=true needs stream=false")
        values: dict[str, Any] = {"max_tokens": max(fields.max_tokens, 1) if fields.max_tokens is not None else None}
        values |= {"logprobs": fields.logprobs} if fields.logprobs is not None else {}
        if fields.echo and fields.logprobs is not None:
            values["prompt_logprobs"] = fields.logprobs
        kind = RequestOutputKind.DELTA if fields.stream else RequestOutputKind.FINAL_ONLY
        self.params: SamplingParams = sampling_params(
            fields, state.llm.get_default_sampling_params(), output_kind=kind, **values
        )

    def _outputs(self) -> AsyncGenerator[RequestOutput]:
        """Of all prompts, as they come."""
        pairs = zip(self.prompts, self.numbers, strict=True)
        return merged([self.state.run(prompt, self.params, request_id) for prompt, request_id in pairs])

    async def answer(self) -> dict[str, Any]:
        """The whole response."""
        outputs: dict[int, RequestOutput] = {}
        async for output in self._outputs():
            outputs[self.numbers[output.request_id]] = output
        usage, choices = Usage(), []
        for i, output in sorted(outputs.items()):
            usage.add_prompt(output)
            for completion in output.outputs:
                if self.fields.max_tokens != 0:
                    usage.completion_tokens += len(completion.token_ids)
                choices.append(await self._whole_choice(i, output, completion))
        return self._head() | {"choices": choices, "usage": usage.as_dict()}

    async def events(self) -> AsyncGenerator[bytes]:
        """The response as events, each with what is new."""
        usage, options = Usage(), self.fields.stream_options or StreamOptions()
        seen: set[int] = set()
        chunks = Chunks(self._head())
        lengths: Counter[tuple[int, int]] = Counter()  # of the texts so far, by prompt and completion
        async for output in self._outputs():
            i = self.numbers[output.request_id]
            if i not in seen:
                seen.add(i)
                usage.add_prompt(output)
            for completion in output.outputs:
                usage.completion_tokens += len(completion.token_ids)
                key = (i, completion.index)
                logprobs = self._logprobs(completion.logprobs, offset=lengths[key])
                lengths[key] += len(completion.text)
                choice = self._choice(i, completion, completion.text, logprobs)
                yield chunks.of(choice, usage.of_chunk(options))
        if options.include_usage:
            yield chunks.end(usage.as_dict())
        yield DONE

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.state.now(), "model": self.state.names[0]
        }  # fmt: skip

    async def _whole_choice(self, i: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        text, values, token_ids = completion.text, completion.logprobs or [], completion.token_ids
        if self.fields.max_tokens == 0:
            text, values, token_ids = "", [], []
        first = ""
        if self.fields.echo:
            tokenizer = await self.state.llm.get_tokenizer()
            prompt = tokenizer.decode(output.prompt_token_ids) if output.prompt is None else output.prompt
            text = prompt + text
            if self.fields.logprobs is not None:
                values = [*(output.prompt_logprobs or []), *values]
                first = self._name(output.prompt_token_ids[0], tokenizer.decode(output.prompt_token_ids[:1]))
        choice = self._choice(i, completion, text, self._logprobs(values, first))
        if self.fields.max_tokens == 0:
            choice["finish_reason"] = "length"
        if self.fields.prompt_logprobs is not None:
            choice["prompt_logprobs"] = [of_token and by_id(of_token) for of_token in output.prompt_logprobs or []]
        if self.fields.return_token_ids:
            choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": token_ids}
        return choice

    def _choice(
        self, i: int, completion: CompletionOutput, text: str, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        choice = {"index": i * self.n + completion.index, "text": text, "logprobs": logprobs}
        reason = completion.finish_reason
        choice |= {"finish_reason": reason, "stop_reason": completion.stop_reason}
        if self.fields.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def _logprobs(
        self, values: list[dict[int, Logprob] | None] | None, first: str = "", offset: int = 0
    ) -> dict[str, Any] | None:
        """OpenAI's four lists of equal length.

        Args:
            first: the first token of a prompt, which has no probability.
            offset: of the first token in the text.
        """
        if self.fields.logprobs is None:
            return None
        tokens, own, top, offsets = [], [], [], []
        for of_token in values or []:
            if of_token is None:
                tokens.append(first)
                own.append(None)
                top.append(None)
            else:
                named = [(self._name(i, value.decoded_token), finite(value.logprob)) for i, value in of_token.items()]
                tokens.append(named[0][0])
                own.append(named[0][1])
                top.append(dict(named[: self.fields.logprobs + 1]) if self.fields.logprobs else None)
            offsets.append(offset)
            offset += len(tokens[-1])
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}

    def _name(self, token_id: int, text: str | None) -> str:
        return f"token_id:{token_id}" if self.fields.return_tokens_as_token_ids or text is None else text


def _prompts(fields: CompletionFields) -> list[Any]:
    """One or many, each a text or token ids. Raises ValueError for none."""
    prompt = fields.prompt
    if not prompt and prompt != "":
        raise ValueError("prompt must not be empty")
    many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return [_one(p) for p in (prompt if many else [prompt])]


def _one(prompt: Any) -> Any:
    return {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def by_id(of_token: dict[int, Logprob]) -> dict[str, Any]:
    return {
        str(i): {"logprob": finite(value.logprob), "rank": value.rank, "decoded_token": value.decoded_token}
        for i, value in of_token.items()
    }
