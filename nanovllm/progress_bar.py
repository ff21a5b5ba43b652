"""The bar that `LLM.generate` shows: it counts finished requests, and tells the rates of tokens read and written."""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from nanovllm.engine.stats import StepStats

UseTqdm = bool | Callable[..., Any]


class ProgressBar:
    """A tqdm bar, or whatever bar the caller's `use_tqdm` makes."""

    def __init__(self, num_requests: int | None, stats: StepStats, use_tqdm: UseTqdm) -> None:
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
