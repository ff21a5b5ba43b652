"""The offline front: prompts in, completions out. The caller's thread runs the engine's loop."""

import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as ListLike
from typing import Any

from nanovllm.config import Config
from nanovllm.engine import weights_and_sleep
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.one_caller import OneCaller
from nanovllm.engine.prompts import Prompt, as_list_of_prompts, as_request_ids, copy_params, params_for_each
from nanovllm.engine.request import Request
from nanovllm.engine.stats import StepStats
from nanovllm.engine.text_engine import TextEngine, free_device_memory
from nanovllm.errors import EngineDeadError
from nanovllm.output_stream import OutputStream, abort_left_streams, outputs_of
from nanovllm.outputs import LogLikelihood, RequestOutput
from nanovllm.progress_bar import ProgressBar, UseTqdm
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.chat import chat_prompts
from nanovllm.vllm.methods import LLMMethods
from nanovllm.vllm_defaults import check_arguments


class LLM(LLMMethods):
    """A model with its engine.

    `LLM("/path/to/Qwen3-0.6B", enforce_eager=True)`; `nanovllm.config.Config` lists the options. To give the device's
    memory back, use it as a context manager, call `close()`, or drop the last reference.

    Threads may take turns. A call that begins during another thread's call raises RuntimeError, and the other goes on:
    `AsyncLLM` serves many callers at once. Any thread may call `stats`, `check_health` and `get_tokenizer` at any time.

    Raises:
        TypeError, ValueError: an option is unknown, or its value is not allowed.
        OSError: the model cannot be found, or its files are damaged.
    """

    _text_engine: TextEngine | None = None  # so that close() works on one whose construction failed

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        self._one_caller = OneCaller()
        self._started: dict[Request, Any] = {}  # by the current `generate`, or by one whose cleanup was interrupted
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
        """Complete every prompt. Returns the outputs in the order of the prompts.

        Args:
            prompts: a string, a list of token ids, `{"prompt": …}` or `{"prompt_token_ids": …}`, or a list of these.
            sampling_params: one for all, or one for each prompt; None: see `get_default_sampling_params`.
            use_tqdm: whether to show a progress bar with tokens per second; or a function like `tqdm` that makes one.
            vllm_arguments: vLLM's further arguments (`lora_request`, …), if they ask for nothing: see `vllm_defaults`.

        Raises:
            TypeError, ValueError: naming the prompt and what is wrong with it. All requests of this call are aborted.
        """
        check_arguments(LLM.generate, vllm_arguments)
        return self._run(self._pair(prompts, sampling_params), use_tqdm)

    def _run(self, pairs: list[tuple[Prompt, SamplingParams]], use_tqdm: UseTqdm) -> list[RequestOutput]:
        with self._one_caller:
            text_engine = self._enter()
            engine = text_engine.engine
            outputs: dict[Request, Any] = {}  # None until the request is finished
            self._started = outputs
            progress_bar = ProgressBar(len(pairs), engine.stats, use_tqdm)

            def step() -> None:
                self._end_left_streams()
                finished = [request for request in text_engine.step() if request.is_finished and request in outputs]
                outputs.update((r, r.output(r.progress())) for r in finished)  # while the device computes the next step
                progress_bar.update(len(finished))

            try:
                num_tokens = 0
                for request in self._make_requests(pairs):
                    outputs[request] = None
                    text_engine.add(request)
                    # An idle device need not wait for the last prompt: it starts once there is a full step for it.
                    num_tokens += len(request.prompt_token_ids)
                    if num_tokens >= engine.config.max_num_batched_tokens and engine.has_idle_device():
                        step()
                        num_tokens = 0
                for request in list(outputs):
                    while not request.is_finished:
                        step()
            finally:
                text_engine.abort(outputs)
                self._started = {}
                progress_bar.close()
            return list(outputs.values())

    def _pair(self, prompts: Any, sampling_params: Any) -> list[tuple[Prompt, SamplingParams]]:
        prompts = as_list_of_prompts(prompts)
        sampling_params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        return list(zip(prompts, params_for_each(sampling_params, len(prompts)), strict=True))

    def _make_requests(
        self, pairs: list[tuple[Prompt, SamplingParams]], is_streaming: bool = False
    ) -> Iterator[Request]:
        original = copy = None
        for i, (prompt, params) in enumerate(pairs):
            if params is not original:  # one object for many prompts is checked and copied once
                original, copy = params, copy_params(params)
            yield self._open().make_request(prompt, copy, name=f"prompts[{i}]", is_streaming=is_streaming)

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
        """Answer one conversation, or each of a list. The tokenizer's chat template writes it out as a prompt.

        Args:
            messages: `[{"role": "user", "content": "…"}, …]`, or a list of such lists.
            chat_template, …: see `nanovllm.text.chat.chat_prompt`; the other arguments are those of `generate`.

        Raises:
            TypeError, ValueError: as `generate` and `chat_prompt`.
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
        """How likely the model finds each token of the prompts, given the tokens before it. Generates nothing.

        A prompt may have up to `max_model_len` - 1 tokens, and all are computed, cached or not. Raises as `generate`.
        """
        params = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0.0, detokenize=False)
        return [LogLikelihood.of_prompt(output) for output in self._run(self._pair(prompts, params), use_tqdm)]

    def stream(
        self,
        prompts: Prompt | ListLike[Prompt],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Complete every prompt, and yield an output with all tokens so far whenever a request has more.

        `output_kind=RequestOutputKind.DELTA`: an output has only what is new, and only the completions that have
        something new. FINAL_ONLY: a request has one output, at its end.

        `request_id`s count up in the order of the prompts. Several streams, and calls of `generate` between their
        outputs, share the engine. To leave early, leave the loop: closing or dropping the iterator aborts its requests.
        Raises as `generate`, here and not at the first output.
        """
        pairs = self._pair(prompts, sampling_params)
        with self._one_caller:
            self._enter()
            requests = list(self._make_requests(pairs, is_streaming=True))
            stream = OutputStream(outputs_of(requests, self._enter), self._one_caller, self._end_left_streams)
            self._streams[weakref.ref(stream)] = requests
            return stream

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, as `generate` makes them."""
        with self._one_caller:
            return self._enter().encode(prompt)[1]

    def get_tokenizer(self) -> Any:
        """The `transformers` tokenizer. Raises ValueError if the engine was made without one."""
        return self._open().tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """A fresh copy of the parameters that requests without any get, from the checkpoint: see `Config`."""
        return self._open().default_sampling_params()

    def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests of a stream early, between two of its outputs. Ignores unknown and finished ids."""
        request_ids = as_request_ids(request_id)
        with self._one_caller:
            text_engine = self._enter()
            text_engine.abort(text_engine.find(request_ids))

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Empty the prefix cache. Running requests keep their blocks, or are preempted, and then computed anew.

        `reset_connector` is vLLM's, and does nothing. Returns True: it always succeeds.
        """
        with self._one_caller:
            self._enter().engine.reset_prefix_cache(reset_running_requests)
        return True

    def load_weights(self, named_tensors: Iterable[tuple[str, "torch.Tensor"]]) -> None:  # noqa: F821
        """Write new weights over the old ones, and empty the prefix cache: see `weights_and_sleep.load_weights`."""
        with self._one_caller:
            weights_and_sleep.load_weights(self._enter().engine, named_tensors)

    def sleep(self, level: int = 1) -> None:
        """Give the device's memory back until `wake_up()`: see `weights_and_sleep.sleep`."""
        with self._one_caller:
            weights_and_sleep.sleep(self._enter().engine, level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the device's memory again: see `weights_and_sleep.wake_up`."""
        with self._one_caller:
            weights_and_sleep.wake_up(self._enter().engine, tags)

    @property
    def is_sleeping(self) -> bool:
        return self.engine.runner.sleep_level > 0

    def stats(self) -> StepStats:
        """Counters since the engine started, and the state of its cache and queue. Any thread may call this."""
        return self.engine.current_stats()

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine serves nothing any more. Any thread may call this."""
        self.engine.check_health()

    def close(self) -> None:
        """Give the memory back. You may call this again. Raises RuntimeError if another thread is in a call."""
        if self._text_engine is None:
            return
        self._one_caller.require_no_other_thread()
        is_cuda = self._text_engine.engine.runner.is_cuda
        self._text_engine.engine.close()
        self._text_engine = None
        free_device_memory(is_cuda)

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
        """The text engine, for a call within `_one_caller`: first ends the requests that no caller reads any more."""
        text_engine = self._open()
        text_engine.engine.health.require_own_process()
        text_engine.abort(self._started)
        self._started = {}
        self._end_left_streams()
        return text_engine

    def _end_left_streams(self) -> None:
        abort_left_streams(self._streams, self._text_engine)
