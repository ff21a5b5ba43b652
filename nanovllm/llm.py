"""The offline interface: prompts in, completions out."""

import gc
import sys
from collections.abc import Sequence as ListLike
from time import perf_counter
from typing import Any

from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine, StepStats
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import SamplingParams

Prompt = str | list[int] | dict[str, Any]


class LLM:
    """A model with its engine.

    `LLM("/path/to/Qwen3-0.6B", enforce_eager=True)`; the options are those of `nanovllm.config.Config`. Use it as a
    context manager, call `close()`, or drop the last reference: each gives the device's memory back.

    Raises:
        TypeError, ValueError: an option is unknown, or its value is not allowed.
        OSError: the model is not to be found, or its files are damaged.
    """

    _engine: LLMEngine | None = None  # so that close() works on one whose construction failed

    def __init__(self, model: str, **options: Any) -> None:
        config = Config.from_options(model, options)
        self._engine = LLMEngine(config)
        self._tokenizer: Any = None
        if not config.skip_tokenizer_init:
            from transformers import AutoTokenizer

            source = config.tokenizer or str(self._engine.model_path)
            self._tokenizer = AutoTokenizer.from_pretrained(
                source, revision=config.revision, trust_remote_code=config.trust_remote_code
            )

    @property
    def engine(self) -> LLMEngine:
        """The engine. Raises RuntimeError after `close()`."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    def generate(
        self,
        prompts: Prompt | ListLike[Prompt],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; the results are in the order of the prompts.

        Args:
            prompts: a string, a list of token ids, `{"prompt": …}` or `{"prompt_token_ids": …}`, or a list of these.
            sampling_params: one for all, or one for each prompt.
            use_tqdm: show a progress bar with the tokens per second.

        Raises:
            TypeError, ValueError: naming the prompt and what is wrong with it. No request is left behind: when a
                prompt cannot run, none of the call's does, and when something fails under way, all are aborted.
        """
        engine = self.engine
        prompts = _as_list_of_prompts(prompts)
        params = _one_for_each(sampling_params, len(prompts))
        seqs = [self._make_sequence(i, p, q) for i, (p, q) in enumerate(zip(prompts, params, strict=True))]
        progress = _Progress(len(seqs), engine.stats, enabled=use_tqdm)
        try:
            for seq in seqs:
                engine.add(seq)
            while engine.has_unfinished_requests:
                progress.update(len(engine.step()))
        finally:
            engine.abort(seqs)
            progress.close()
        return [self._output(seq) for seq in seqs]

    def get_tokenizer(self) -> Any:
        """The `transformers` tokenizer. Raises ValueError if the engine was made without one."""
        if self._tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: this LLM has no tokenizer; give token ids")
        return self._tokenizer

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Requests that run keep their blocks."""
        self.engine.block_manager.forget_content()

    def stats(self) -> StepStats:
        """Counters since the engine started, and the state of its cache and queue."""
        return self.engine.current_stats()

    def close(self) -> None:
        """Give the memory back. May be called again."""
        if self._engine is None:
            return
        is_cuda = self._engine.runner.is_cuda
        self._engine = None
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

    def _make_sequence(self, index: int, prompt: Prompt, params: SamplingParams) -> Sequence:
        name = f"prompts[{index}]"
        text, token_ids = None, prompt
        if isinstance(prompt, dict):
            unknown = prompt.keys() - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise ValueError(f"{name} has the keys {sorted(prompt)}: it must have 'prompt' or 'prompt_token_ids'")
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids", prompt.get("prompt"))
        if isinstance(token_ids, str):
            text = token_ids
            token_ids = self.get_tokenizer().encode(text)
        if not isinstance(token_ids, list) or not all(type(i) is int for i in token_ids):
            raise TypeError(f"{name}={_shorten(prompt)} must be a string or a list of token ids")
        return self.engine.make_sequence(token_ids, params, prompt=text, name=name)

    def _output(self, seq: Sequence) -> RequestOutput:
        token_ids = seq.output_token_ids
        text = None if self._tokenizer is None else self._tokenizer.decode(token_ids, skip_special_tokens=True)
        completion = CompletionOutput(0, text, token_ids, seq.finish_reason, seq.stop_reason)
        return RequestOutput(
            request_id=seq.request_id,
            prompt=seq.prompt,
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens],
            outputs=[completion],
            finished=True,
            num_cached_tokens=seq.num_cached_tokens,
        )


class _Progress:
    """A bar that counts requests and shows the rates of the tokens read and written."""

    def __init__(self, total: int, stats: StepStats, enabled: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc="Generating", unit="req", dynamic_ncols=True, disable=not enabled)
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


def _as_list_of_prompts(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, (str, dict)) or (isinstance(prompts, list) and prompts and type(prompts[0]) is int):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"prompts={_shorten(prompts)} must be a string, a list of token ids, or a list of these")
    return list(prompts)


def _one_for_each(sampling_params: Any, num_prompts: int) -> list[SamplingParams]:
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    if not isinstance(sampling_params, (list, tuple)) or not all(
        isinstance(p, SamplingParams) for p in sampling_params
    ):
        raise TypeError(f"sampling_params={_shorten(sampling_params)} must be a SamplingParams or a list of them")
    if len(sampling_params) != num_prompts:
        raise ValueError(
            f"sampling_params has {len(sampling_params)} entries for {num_prompts} prompts: give one, or one for each"
        )
    return list(sampling_params)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
