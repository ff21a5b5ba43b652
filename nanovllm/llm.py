"""The offline interface: prompts in, completions out."""

import gc
import os
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as ListLike
from functools import partial
from time import perf_counter
from typing import Any

from nanovllm.config import Config
from nanovllm.engine import weights_and_sleep
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.one_caller import OneCaller
from nanovllm.engine.request import Request
from nanovllm.engine.stats import StepStats
from nanovllm.engine.text_engine import Prompt, TextEngine, as_list_of_prompts, as_request_ids, one_for_each, own_params
from nanovllm.errors import EngineDeadError
from nanovllm.output_stream import OutputStream
from nanovllm.outputs import LogLikelihood, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.chat import chat_prompts
from nanovllm.vllm.methods import LLMMethods
from nanovllm.vllm_defaults import check_arguments

UseTqdm = bool | Callable[..., Any]


class LLM(LLMMethods):
    """A model with its engine.

    `LLM("/path/to/Qwen3-0.6B", enforce_eager=True)`; the options are those of `nanovllm.config.Config`. Use it as a
    context manager, call `close()`, or drop the last reference: each gives the device's memory back.

    Threads may take turns. A call that begins while another is under way raises RuntimeError, and the other goes on:
    `AsyncLLM` is for many callers. Only `stats`, `check_health` and `get_tokenizer` may be called at any time.

    Raises:
        TypeError, ValueError: an option is unknown, or its value is not allowed.
        OSError: the model is not to be found, or its files are damaged.
    """

    _text_engine: TextEngine | None = None  # so that close() works on one whose construction failed

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        self._one_caller = OneCaller()
        self._started: dict[Request, Any] = {}  # those of the call under way, or of one whose cleanup was interrupted
        self._streams: dict[weakref.ref[OutputStream], list[Request]] = {}
        self._text_engine = TextEngine(Config.from_options(model, options))

    @property
    def engine(self) -> LLMEngine:
        """The engine. Raises RuntimeError after `close()`."""
        return self._open().engine

    def generate(
        self,
        prompts: Prompt | ListLike[Prompt],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        **vllm_arguments: Any,
    ) -> list[RequestOutput]:
        """Complete every prompt; the results are in the order of the prompts.

        Args:
            prompts: a string, a list of token ids, `{"prompt": …}` or `{"prompt_token_ids": …}`, or a list of these.
            sampling_params: one for all, or one for each prompt; None: see `get_default_sampling_params`.
            use_tqdm: show a progress bar with the tokens per second; or what makes the bar, called as `tqdm` is.
            vllm_arguments: vLLM's further ones (`lora_request`, …), where they ask for nothing: see `vllm_defaults`.

        Raises:
            TypeError, ValueError: naming the prompt and what is wrong with it. No request is left behind: when a
                prompt cannot run, and when something fails under way, all of the call's are aborted.
        """
        check_arguments(LLM.generate, vllm_arguments)
        return self._run(self._pair(prompts, sampling_params), use_tqdm)

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        *,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **vllm_arguments: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list, written out by the tokenizer's chat template.

        Args:
            messages: `[{"role": "user", "content": "…"}, …]`, or a list of such lists. Content may be a list of parts
                `{"type": "text", "text": "…"}`, or None beside tool calls, whose arguments may be JSON strings.
            chat_template: a Jinja template instead of the tokenizer's.
            chat_template_content_format: how content is given to the template, as "string" or, "openai", as a list of
                parts. "auto": as the template asks for it.
            add_generation_prompt: open the assistant's message, which is to be written.
            continue_final_message: leave the last message open, which is to be continued; not with the above.
            tools: JSON schemas of functions, for templates that know them.
            chat_template_kwargs: what else the template knows, `{"enable_thinking": False}` for one.
            vllm_arguments: as in `generate`.

        Raises:
            TypeError, ValueError: as `generate`; or the template is missing, or does not take the messages; or one of
                their parts is no text.
        """
        check_arguments(LLM.chat, vllm_arguments)
        prompts = chat_prompts(
            self.get_tokenizer(),
            messages,
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.generate(prompts, sampling_params, use_tqdm)

    def log_likelihood(self, prompts: Prompt | ListLike[Prompt], use_tqdm: UseTqdm = True) -> list[LogLikelihood]:
        """How likely the model finds each token of the prompts, given those before it; nothing is generated.

        A prompt may have up to `max_model_len` - 1 tokens, all of which are computed: cached prefixes are of no use.

        Raises: as `generate`.
        """
        params = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0.0, detokenize=False)
        outputs = self._run(self._pair(prompts, params), use_tqdm)
        return [
            LogLikelihood(
                output.prompt_token_ids,
                [
                    of_token and of_token[token_id].logprob
                    for token_id, of_token in zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
                ],
            )
            for output in outputs
        ]

    def stream(
        self,
        prompts: Prompt | ListLike[Prompt],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Complete every prompt, and yield an output whenever a request has more tokens, each with all it has so far.

        With `output_kind=RequestOutputKind.DELTA` each has only what is new, and of several completions only those of
        which something is; with FINAL_ONLY there is one output for each request, at its end.

        `request_id`s count up in the order of the prompts. Several streams, and calls of `generate` between their
        outputs, share the engine. To leave early, leave the loop: closing or dropping the iterator aborts what runs.

        Raises: as `generate`, here and not at the first output.
        """
        pairs = self._pair(prompts, sampling_params)
        with self._one_caller:
            self._enter()
            requests = list(self._make_requests(pairs, is_streaming=True))
            stream = OutputStream(self._stream(requests), self._one_caller, self._end_left_streams)
            self._streams[weakref.ref(stream)] = requests
            return stream

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The token ids as which `generate` takes a prompt."""
        with self._one_caller:
            return self._enter().encode(prompt)[1]

    def get_tokenizer(self) -> Any:
        """The `transformers` tokenizer. Raises ValueError if the engine was made without one."""
        return self._open().tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """How requests are sampled that come without: by the checkpoint's generation_config.json, see `Config`.

        A fresh object, which may be changed and given to `generate`.
        """
        return self._open().default_sampling_params()

    def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests, between two outputs of a stream, before their time. Unknown and finished ids are passed by."""
        request_ids = as_request_ids(request_id)
        with self._one_caller:
            text_engine = self._enter()
            text_engine.abort(text_engine.find(request_ids))

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all cached prefixes. Requests that run keep their blocks, or are preempted, and so computed anew.

        Args:
            reset_connector: vLLM's; there is none, and nothing is done.

        Returns: True, as it always succeeds.
        """
        with self._one_caller:
            self._enter().engine.reset_prefix_cache(reset_running_requests)
        return True

    def load_weights(self, named_tensors: Iterable[tuple[str, "torch.Tensor"]]) -> None:  # noqa: F821
        """Write new weights over the old ones, as after an optimizer step, and empty the prefix cache.

        Args:
            named_tensors: (name, tensor) with the checkpoint's names and shapes, in float32, bfloat16, float16 or
                float64, on any device: all of them, or some. The rest stays as it is, so that a model can come in
                several calls. Where the head is tied, `lm_head.weight` may come after or along with the embedding.

        Raises:
            RuntimeError: requests are unfinished, or the engine sleeps.
            TypeError, ValueError: an entry is no such pair, or naming a tensor that is unexpected, there twice, of the
                wrong shape or dtype, or a tied head unlike the embedding. Of a list nothing has been written then; of a
                generator what came before (see the error's notes). Either way the engine serves on.
        """
        with self._one_caller:
            weights_and_sleep.load_weights(self._enter().engine, named_tensors)

    def sleep(self, level: int = 1) -> None:
        """Give the device's memory back: the cache is dropped, and the weights go to host memory (level 1) or nowhere
        (level 2, after which they must be loaded anew). Until `wake_up()` nothing can be generated.

        Asleep at this level or a deeper one, nothing is done.

        Raises:
            ValueError: level is not 1 or 2; RuntimeError: requests are unfinished, or the host has no room.
        """
        with self._one_caller:
            weights_and_sleep.sleep(self._enter().engine, level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the device's memory again. After `sleep(2)` call `load_weights()` before anything else.

        Args:
            tags: ["weights"] takes theirs alone, so that new ones can be loaded while a trainer still needs the rest,
                and ["kv_cache"] later that; None: both.

        Raises:
            ValueError: there is no such tag; RuntimeError: the cache is asked for before the weights.
            torch.OutOfMemoryError: others hold the memory; the engine sleeps on, and may be woken again.
        """
        with self._one_caller:
            weights_and_sleep.wake_up(self._enter().engine, tags)

    @property
    def is_sleeping(self) -> bool:
        return self.engine.runner.sleep_level > 0

    def stats(self) -> StepStats:
        """Counters since the engine started, and the state of its cache and queue. May be called in any thread."""
        return self.engine.current_stats()

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine serves nothing any more. May be called in any thread."""
        self.engine.check_health()

    def close(self) -> None:
        """Give the memory back; a stream that is open raises RuntimeError at its next step. May be called again.

        Raises: RuntimeError: another thread is in a call.
        """
        if self._text_engine is None:
            return
        self._one_caller.require_no_other_thread()
        is_cuda = self._text_engine.engine.runner.is_cuda
        self._text_engine.engine.close()
        self._text_engine = None
        gc.collect()
        if is_cuda:
            import torch

            torch.cuda.empty_cache()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    def _open(self) -> TextEngine:
        if self._text_engine is None:
            raise EngineDeadError("this LLM is closed")
        return self._text_engine

    def _enter(self) -> TextEngine:
        """The text_engine, for who has come in alone: whole, and rid of requests for which nobody waits any more."""
        text_engine = self._open()
        text_engine.engine.health.require_own_process()
        text_engine.abort(self._started)
        self._started = {}
        self._end_left_streams()
        return text_engine

    def _end_left_streams(self) -> None:
        """End the requests of streams that are over, if need be. Called between two steps."""
        for ref, requests in list(self._streams.items()):
            stream = ref()
            if stream is None or stream.is_over:
                if self._text_engine is not None:
                    self._text_engine.abort(requests)
                del self._streams[ref]

    def _pair(self, prompts: Any, sampling_params: Any) -> list[tuple[Prompt, SamplingParams]]:
        prompts = as_list_of_prompts(prompts)
        sampling_params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        return list(zip(prompts, one_for_each(sampling_params, len(prompts)), strict=True))

    def _make_requests(
        self, pairs: list[tuple[Prompt, SamplingParams]], is_streaming: bool = False
    ) -> Iterator[Request]:
        given = own = None
        for i, (prompt, params) in enumerate(pairs):
            if params is not given:  # one for all is checked and copied once
                given, own = params, own_params(params)
            yield self._open().make_request(prompt, own, name=f"prompts[{i}]", is_streaming=is_streaming)

    def _run(self, pairs: list[tuple[Prompt, SamplingParams]], use_tqdm: UseTqdm) -> list[RequestOutput]:
        with self._one_caller:
            return self._run_alone(self._enter(), pairs, use_tqdm)

    def _run_alone(
        self, text_engine: TextEngine, pairs: list[tuple[Prompt, SamplingParams]], use_tqdm: UseTqdm
    ) -> list[RequestOutput]:
        outputs: dict[Request, Any] = {}  # None while it is unfinished
        self._started = outputs
        progress = _Progress(len(pairs), text_engine.engine.stats, use_tqdm)

        def step() -> None:
            self._end_left_streams()
            finished = [request for request in text_engine.step() if request.is_finished and request in outputs]
            outputs.update((r, r.output(r.progress())) for r in finished)  # while the device works on the next step
            progress.update(len(finished))

        try:
            num_tokens = 0
            for request in self._make_requests(pairs):
                outputs[request] = None
                text_engine.add(request)
                # The device need not wait until the last prompt is a request: it gets full steps as they come together.
                num_tokens += len(request.prompt_token_ids)
                if (
                    num_tokens >= text_engine.engine.config.max_num_batched_tokens
                    and text_engine.engine.has_idle_device()
                ):
                    step()
                    num_tokens = 0
            for request in list(outputs):
                while not request.is_finished:
                    step()
        finally:
            text_engine.abort(outputs)
            self._started = {}
            progress.close()
        return list(outputs.values())

    def _stream(self, requests: list[Request]) -> Generator[RequestOutput, None, None]:
        """What `OutputStream` runs, one output a call. Whoever has waited for one may find the engine closed."""
        text_engine = self._enter()
        for request in requests:
            text_engine.add(request)
        del text_engine  # a stream that nobody reads keeps no closed engine's memory
        while requests:
            for request in requests:
                if request.has_output:
                    request.has_news = False
                    yield request.output(request.progress())
            requests = [r for r in requests if r.has_news or not r.is_finished]
            if any(not request.is_finished for request in requests):
                self._enter().step()


class _Progress:
    """A bar that counts requests and shows the rates of the tokens read and written."""

    def __init__(self, num_requests: int, stats: StepStats, use_tqdm: UseTqdm) -> None:
        from tqdm import tqdm

        make = use_tqdm if callable(use_tqdm) else partial(tqdm, disable=not use_tqdm)
        self._bar = make(total=num_requests, desc="Generating", unit="req", dynamic_ncols=True)
        self._stats = stats
        self._start = perf_counter()
        self._prefill, self._decode = stats.num_prefill_tokens, stats.num_decode_tokens

    def update(self, num_finished: int) -> None:
        if self._bar.disable:
            return
        seconds = perf_counter() - self._start
        prefill = (self._stats.num_prefill_tokens - self._prefill) / seconds
        decode = (self._stats.num_decode_tokens - self._decode) / seconds
        self._bar.set_postfix_str(f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s", refresh=False)
        self._bar.update(num_finished)

    def close(self) -> None:
        self._bar.close()
