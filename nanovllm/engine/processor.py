"""Prompts become sequences, and sequences become outputs. `LLM` and `AsyncLLM` are two fronts of this.

A request has a sequence for each of its n completions; the engine knows only sequences. Text is made after the step
that follows has been launched, so while the device works. If neither a stop string nor a reader of a stream waits for
it, it is made once, of all tokens, when the outputs are asked for.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from nanovllm.bad_words import bad_word_ids
from nanovllm.config import Config
from nanovllm.detokenizer import Detokenizer, TokenDecoder
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.step_plan import TokenLogprobs

Prompt = str | list[int] | dict[str, Any]


@dataclass(slots=True, eq=False)
class Completion:
    """One sequence of a request, and what has been made of its tokens."""

    seq: Sequence
    detokenizer: Detokenizer | None  # None: its text is made at the end, if at all
    num_read: int = 0  # output tokens that the detokenizer has seen
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Request:
    """What a caller asked for: a prompt, and a sequence for each of the n completions that it is to get."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    completions: list[Completion]
    metrics: RequestMetrics
    has_news: bool = False  # something has happened since its last output
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def is_finished(self) -> bool:
        first, *others = self.completions
        return first.seq.is_finished and all(completion.seq.is_finished for completion in others)


class Processor:
    """An engine with its tokenizer. Not thread-safe, except for `make_request`, beside which the others may run."""

    def __init__(self, config: Config) -> None:
        self.engine = LLMEngine(config)
        try:
            path = str(self.engine.model_path)
            self._tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, path)
        except BaseException:
            self.engine.close()  # the error's traceback keeps it alive
            raise
        self._decoder = None if self._tokenizer is None else TokenDecoder(self._tokenizer)
        self._requests: dict[str, Request] = {}  # the unfinished
        self._owner: dict[Sequence, tuple[Request, Completion]] = {}

    @property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer. Raises ValueError if the engine was made without one."""
        if self._tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: this engine has no tokenizer; give token ids")
        return self._tokenizer

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        name: str = "prompt",
        request_id: str | None = None,
        is_streaming: bool = False,
    ) -> Request:
        """Check a request and give it its shape; `add` then lets it run.

        With n > 1 the completions share the prompt's full blocks through the prefix cache, unless that is switched
        off. The first has the request's seed, the others have seeds that follow from it.

        Raises:
            TypeError, ValueError: naming the prompt as `name`, or the parameter, and what is wrong with it.
        """
        arrival_time = time.monotonic()
        text, token_ids = self.encode(prompt, name)
        if params.truncate_prompt_tokens is not None:
            longest = self.engine.max_model_len - 1
            num_kept = longest if params.truncate_prompt_tokens == -1 else params.truncate_prompt_tokens
            token_ids = token_ids[-num_kept:]
        if params.stop and self._tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer, which skip_tokenizer_init=True leaves away")
        seqs = self._make_sequences(token_ids, params, name, request_id)
        request_id = seqs[0].request_id
        for i, seq in enumerate(seqs if params.n > 1 else ()):
            seq.request_id = f"{i}_{request_id}"
        metrics = RequestMetrics(arrival_time)
        for seq in seqs:
            seq.metrics = metrics
        must_follow = self._makes_text(params) and (is_streaming or bool(params.stop))
        return Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            completions=[Completion(s, Detokenizer(self._decoder, params) if must_follow else None) for s in seqs],
            metrics=metrics,
        )

    def _make_sequences(
        self, token_ids: list[int], params: SamplingParams, name: str, request_id: str | None
    ) -> list[Sequence]:
        bad_words = bad_word_ids(params.bad_words, self.tokenizer) if params.bad_words else ()
        make = self.engine.make_sequence
        seqs = [make(token_ids, params, name=name, bad_words=bad_words, request_id=request_id)]
        if params.n > 1:
            params = replace(params, prompt_logprobs=None)  # the prompt's are the same for all
        for i in range(1, params.n):
            seqs.append(make(token_ids, params, name=name, bad_words=bad_words, request_id=seqs[0].request_id))
            if params.seed is not None:
                seqs[i].seed = child_seed(params.seed, i)
        return seqs

    def encode(self, prompt: Prompt, name: str = "prompt") -> tuple[str | None, list[int]]:
        """A prompt's text, if it has one, and a fresh list of its token ids. Raises as `make_request` does."""
        text, token_ids = None, prompt
        if isinstance(prompt, dict):
            unknown = prompt.keys() - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                keys = ", ".join(map(repr, prompt))
                raise ValueError(f"{name} has the keys {keys or 'none'}: it must have 'prompt' or 'prompt_token_ids'")
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids", prompt.get("prompt"))
        if isinstance(token_ids, str):
            text = token_ids
            try:
                token_ids = self.tokenizer.encode(text)
            except (TypeError, UnicodeError) as error:  # a lone surrogate, which no encoding has
                raise ValueError(f"{name}={shorten(text)} cannot be tokenized: {error}") from error
        if not isinstance(token_ids, list) or not all(type(i) is int for i in token_ids):
            raise TypeError(f"{name}={shorten(prompt)} must be a string or a list of token ids")
        return text, list(token_ids)

    def add(self, request: Request) -> None:
        """Let a request run. Raises ValueError if another of its id is running."""
        if request.request_id in self._requests:
            raise ValueError(f"request_id={request.request_id!r} is that of a request which is still running")
        self._requests[request.request_id] = request
        try:
            for completion in request.completions:
                self._owner[completion.seq] = (request, completion)
                self.engine.add(completion.seq)
        except BaseException:
            self.abort([request])
            raise

    def find(self, request_ids: str | Iterable[str]) -> list[Request]:
        """The unfinished requests among those named."""
        ids = [request_ids] if isinstance(request_ids, str) else request_ids
        return [self._requests[i] for i in ids if i in self._requests]

    def abort(self, requests: Iterable[Request]) -> None:
        """End requests before their time. Those that have finished, or were never added, are left alone."""
        for request in requests:
            if self._requests.get(request.request_id) is request:
                self.engine.abort(completion.seq for completion in request.completions)
                for completion in request.completions:
                    if completion.detokenizer is not None:
                        self._follow(completion)
                self._forget(request)

    def step(self) -> list[Request]:
        """Let the engine do a step. Returns the requests that got tokens.

        If it fails, all requests are aborted, and the error goes on; the next request is served.
        """
        try:
            self.engine.step()
            changed: dict[Request, None] = {}
            for seq in self.engine.advanced:
                request, completion = self._owner[seq]
                if completion.detokenizer is not None:
                    self._follow(completion)
                request.has_news = True
                changed[request] = None
            for request in changed:
                if request.is_finished:
                    self._forget(request)
            return list(changed)
        except BaseException:
            self.engine.abort(list(self._owner))
            for request in list(self._requests.values()):
                self._forget(request)
            raise

    def output(self, request: Request) -> RequestOutput:
        """What the request has up to now."""
        return self.outputs([request])[0]

    def outputs(self, requests: list[Request]) -> list[RequestOutput]:
        """What the requests have up to now. Those that have come to their end get their texts in one go."""
        pending = [
            (request.params, completion)
            for request in requests
            for completion in request.completions
            if completion.detokenizer is None and self._makes_text(request.params)
        ]
        ids = [self._readable_ids(completion.seq) for _, completion in pending]
        decoded = self._decoder.decode_all(ids, [params for params, _ in pending]) if pending else []
        texts = {completion: text for (_, completion), text in zip(pending, decoded, strict=True)}
        return [self._output(request, texts) for request in requests]

    def _makes_text(self, params: SamplingParams) -> bool:
        return self._decoder is not None and params.detokenize

    def _forget(self, request: Request) -> None:
        request.has_news = True
        request.metrics.finished_time = time.monotonic()
        del self._requests[request.request_id]
        for completion in request.completions:
            self._owner.pop(completion.seq, None)

    def _follow(self, completion: Completion) -> None:
        """Make text of the tokens that have come, and end the sequence if it contains a stop string."""
        seq, text, stop = completion.seq, completion.detokenizer, None
        for token_id in self._readable_ids(seq, completion.num_read):
            stop = text.append(token_id)
            completion.num_read += 1
            if stop is not None:
                break
        if seq.is_finished and stop is None:
            stop = text.finish()
        if stop is not None and seq.finish_reason != "abort":
            self.engine.finish(seq, "stop", stop)
            del seq.token_ids[seq.num_prompt_tokens + completion.num_read :]

    def _readable_ids(self, seq: Sequence, start: int = 0) -> list[int]:
        """The output tokens from `start` on that are text: a stop token is not, unless it is to be included."""
        ids = seq.token_ids[seq.num_prompt_tokens + start :]
        ended_by_token = seq.finish_reason == "stop" and not isinstance(seq.stop_reason, str)
        return ids[:-1] if ended_by_token and not seq.params.include_stop_str_in_output else ids

    def _output(self, request: Request, texts: dict[Completion, str]) -> RequestOutput:
        request.has_news = False
        first = request.completions[0].seq
        values = first.prompt_logprobs
        if request.prompt_logprobs is None and values is not None and len(values) == first.num_prompt_tokens:
            request.prompt_logprobs = [v and self._logprobs(v, request.params) for v in values]
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[self._completion(i, c, texts) for i, c in enumerate(request.completions)],
            finished=request.is_finished,
            prompt_logprobs=request.prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens,
            metrics=request.metrics,
        )

    def _completion(self, index: int, completion: Completion, texts: dict[Completion, str]) -> CompletionOutput:
        seq = completion.seq
        token_ids = seq.output_token_ids
        for values in seq.logprobs[len(completion.logprobs) : len(token_ids)]:
            completion.logprobs.append(self._logprobs(values, seq.params))
        return CompletionOutput(
            index=index,
            text=completion.detokenizer.text if completion.detokenizer else texts.get(completion),
            token_ids=token_ids,
            cumulative_logprob=seq.cumulative_logprob,
            logprobs=None if seq.params.logprobs is None else list(completion.logprobs),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )

    def _logprobs(self, values: TokenLogprobs, params: SamplingParams) -> dict[int, Logprob]:
        """Of the token that is there first, then of the likeliest, best first."""
        text = self._decoder.token_text if self._makes_text(params) else lambda token_id: None
        entries = zip(values.token_ids, values.logprobs, values.ranks, strict=True)
        return {token_id: Logprob(logprob, rank, text(token_id)) for token_id, logprob, rank in entries}


def load_tokenizer(config: Config, model_path: str) -> Any:
    from transformers import AutoTokenizer

    source = config.tokenizer or model_path
    return AutoTokenizer.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)


def child_seed(seed: int, index: int) -> int:
    """The seed, 64 bits, of a request's completion number `index`: not near to that of any other request."""
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little")


def shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
