"""Prompts become sequences, and the tokens of sequences become text. `LLM` and `AsyncLLM` are two fronts of this.

A request has a sequence for each of its n completions; the engine below knows only sequences. Text is made after the
next step is launched, so while the device computes. If neither a stop string nor the reader of a stream needs it
earlier, it is made once, of all of a completion's tokens, when the reader takes the output (`engine/request.py`).
"""

import gc
import time
from collections.abc import Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.prompts import Prompt, check_strings, text_and_ids, truncated
from nanovllm.engine.request import Completion, Request
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestMetrics
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.text.bad_words import bad_word_ids
from nanovllm.text.detokenizer import Detokenizer
from nanovllm.text.token_decoder import TokenDecoder
from nanovllm.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from nanovllm.engine.step_trace import Observer
    from nanovllm.engine.step_tracer import StepTracer
    from nanovllm.text.grammar import Grammars


class TextEngine:
    """An engine with its tokenizer. One thread at a time, except that `make_request` may run beside the others.

    Its books (which request owns which sequence) are marked during a change, and reset after one that was cut off, as
    those of `LLMEngine` are.
    """

    _is_changing = False
    _grammars: "Grammars | None" = None  # made when a request first asks for it
    tracer: "StepTracer | None" = None  # made when the engine's observer first gets a step

    def __init__(self, config: Config) -> None:
        self.engine = LLMEngine(config)
        try:
            path = str(self.engine.model_path)
            self._tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, path)
            self._decoder = None if self._tokenizer is None else TokenDecoder(self._tokenizer)
            if self._tokenizer is not None:
                self.engine.use_eos_of_tokenizer(self._tokenizer.eos_token_id)
        except BaseException:
            self.engine.close()  # dropping it is not enough: the error's traceback holds it
            raise
        self._requests: dict[str, Request] = {}  # the unfinished ones
        self._owner: dict[Sequence, tuple[Request, Completion]] = {}

    @property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer. Raises ValueError if the engine was made without one."""
        if self._tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: this engine has no tokenizer; give token ids")
        return self._tokenizer

    def default_sampling_params(self) -> SamplingParams:
        """The parameters of a request that comes without any. A fresh object, which the caller may change."""
        return SamplingParams(**self.engine.default_sampling)

    def encode(self, prompt: Prompt, name: str = "prompt") -> tuple[str | None, list[int]]:
        """A prompt's text, if it has one, and a fresh list of its token ids. Raises as `make_request` does."""
        text, token_ids = text_and_ids(prompt, name)
        return text, self.tokenizer.encode(text) if token_ids is None else token_ids

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        name: str = "prompt",
        request_id: str | None = None,
        is_streaming: bool = False,
    ) -> Request:
        """Check a request and make its sequences; `add` then queues them.

        With n > 1 the completions share the prompt's full blocks through the prefix cache, unless that is switched
        off. The first completion has the request's seed; the seeds of the others are derived from it.

        Args:
            params: the request keeps this object, so the caller must not change it: see `copy_params`.
            name: what an error calls the prompt.

        Raises:
            TypeError, ValueError: naming the prompt or the parameter, and what is wrong with it.
        """
        arrival_time = time.monotonic()
        text, token_ids = self.encode(prompt, name)
        check_strings(params, request_id)
        token_ids = truncated(token_ids, params, self.engine.max_model_len)
        if params.stop and self._tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer, and skip_tokenizer_init=True loads none")
        seqs = self._make_sequences(token_ids, params, name, request_id)
        request_id = seqs[0].request_id
        for i, seq in enumerate(seqs if params.n > 1 else ()):
            seq.request_id = f"{i}_{request_id}"
        metrics = RequestMetrics(arrival_time)
        for seq in seqs:
            seq.metrics = metrics
        output_kind = params.output_kind if is_streaming else RequestOutputKind.FINAL_ONLY
        decoder = self._decoder if params.detokenize else None
        needs_text_early = bool(params.stop) or output_kind is not RequestOutputKind.FINAL_ONLY
        detokenizers: list[Detokenizer | None] = [None] * len(seqs)
        if decoder is not None and needs_text_early:
            context = decoder.context(token_ids, params)
            detokenizers = [Detokenizer(decoder, params, context) for _ in seqs]
        return Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            completions=list(map(Completion, seqs, detokenizers)),
            metrics=metrics,
            output_kind=output_kind,
            decoder=decoder,
        )

    def _make_sequences(
        self, token_ids: list[int], params: SamplingParams, name: str, request_id: str | None
    ) -> list[Sequence]:
        bad_words = bad_word_ids(params.bad_words, self.tokenizer) if params.bad_words else ()
        make = self.engine.make_sequence
        seqs = [make(token_ids, params, name=name, bad_words=bad_words, request_id=request_id)]
        if params.n > 1:
            params = params.clone()
            params.prompt_logprobs = None  # those of the first completion serve for all
        for i in range(1, params.n):
            seqs.append(make(token_ids, params, name=name, bad_words=bad_words, request_id=seqs[0].request_id))
            if params.seed is not None:
                seqs[i].seed = child_seed(params.seed, i)
        if params.structured_outputs is not None:
            self._give_grammars(seqs, params)
        return seqs

    def _give_grammars(self, seqs: list[Sequence], params: SamplingParams) -> None:
        if self._tokenizer is None:
            raise ValueError("structured_outputs needs a tokenizer, and skip_tokenizer_init=True loads none")
        if self._grammars is None:
            from nanovllm.text.grammar import Grammars

            self._grammars = Grammars(self._tokenizer, self.engine.vocab_size, self.engine.eos_token_ids)
        for seq in seqs:
            args = (params.structured_outputs, params.stop_token_ids, params.ignore_eos)
            seq.grammar = self._grammars.matcher(*args)

    def add(self, request: Request) -> None:
        """Queue a request's sequences. Raises ValueError if an unfinished request has its id."""
        if request.request_id in self._requests:
            raise ValueError(f"request_id={request.request_id!r} is that of a request which is still running")
        self._begin_change()
        self._requests[request.request_id] = request
        try:
            for completion in request.completions:
                self._owner[completion.seq] = (request, completion)
                self.engine.add(completion.seq)
        except Exception:
            self._abort([request])
            self._is_changing = False
            raise
        self._is_changing = False

    def find(self, request_ids: Iterable[str]) -> list[Request]:
        """The unfinished requests with these ids."""
        return [self._requests[i] for i in request_ids if i in self._requests]

    def abort(self, requests: Iterable[Request]) -> None:
        """End requests early. Does nothing for those that have finished or were never added."""
        self._begin_change()
        self._abort(requests)
        self._is_changing = False

    def _abort(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if self._requests.get(request.request_id) is request:
                self.engine.abort(completion.seq for completion in request.completions)
                for completion in request.completions:
                    if completion.detokenizer is not None:
                        self._detokenize(completion)
                self._forget(request)

    def step(self) -> list[Request]:
        """Do a step of the engine. Returns the requests with news: those that got tokens.

        With FINAL_ONLY a request has news twice: at its first token and at its end.

        If the step fails, it aborts all requests and raises the error; the engine serves the next request. What
        `engine.observer` raises comes after the step, and aborts nothing here.
        """
        tracer = self.tracer_of(self.engine.observer)
        self._begin_change()
        try:
            (tracer or self.engine).step()
            changed: dict[Request, None] = {}
            now = time.monotonic()
            for seq in self.engine.advanced:
                request, completion = self._owner[seq]
                request.metrics.last_token_time = now
                if completion.detokenizer is not None:
                    self._detokenize(completion)
                changed[request] = None
            advanced = [request for request in changed if self._has_news(request)]
        except BaseException:
            self._reset()
            raise
        self._is_changing = False
        if tracer is not None:
            tracer.observer(tracer.trace())
        return advanced

    def tracer_of(self, observer: "Observer | None") -> "StepTracer | None":
        """What makes this observer's traces, from its first step on; None for no observer."""
        if observer is None:
            return None
        if self.tracer is None or self.tracer.observer != observer:
            from nanovllm.engine.step_tracer import StepTracer

            self.tracer = StepTracer(self.engine, observer, self._owner, self._decoder)
        return self.tracer

    def _detokenize(self, completion: Completion) -> None:
        """Make text of a completion's new tokens, and end its sequence if the text contains a stop string."""
        seq, text, stop = completion.seq, completion.detokenizer, None
        for token_id in completion.readable_ids(completion.num_read):
            stop = text.append(token_id)
            completion.num_read += 1
            if stop is not None:
                break
        if seq.is_finished and stop is None:
            stop = text.finish()
        if stop is not None and seq.finish_reason != "abort":
            self.engine.finish(seq, "stop", stop)
            del seq.token_ids[seq.num_prompt_tokens + completion.num_read :]

    def _has_news(self, request: Request) -> bool:
        """Whether to report a request that got tokens in this step."""
        if request.is_finished:
            self._forget(request)
        elif request.has_news and request.output_kind is RequestOutputKind.FINAL_ONLY:
            return False
        request.has_news = True
        return True

    def _forget(self, request: Request) -> None:
        request.has_news = True
        request.metrics.finished_time = time.monotonic()
        self._requests.pop(request.request_id, None)
        for completion in request.completions:
            self._owner.pop(completion.seq, None)

    def _begin_change(self) -> None:
        """As `LLMEngine.begin_change`."""
        if self._is_changing or self.engine.is_changing:
            self._reset()
        self._is_changing = True

    def _reset(self) -> None:
        """Abort all requests and clear the books, whatever their state. An interrupt may cut this off, too."""
        self._is_changing = True
        self.engine.reset()
        for request in list(self._requests.values()):
            for completion in request.completions:
                if not completion.seq.is_finished:  # `add` was cut off before the engine got it
                    completion.seq.finish("abort")
            self._forget(request)
        self._owner.clear()
        self._is_changing = False


def child_seed(seed: int, index: int) -> int:
    """The seed (64 bits) of a request's completion number `index`: a hash, so that no two requests' seeds are near."""
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little")


def free_device_memory(is_cuda: bool) -> None:
    """Give back the memory of an engine to which no reference is left."""
    gc.collect()
    if is_cuda:
        import torch

        torch.cuda.empty_cache()
