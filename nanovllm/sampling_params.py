"""What a request asks of the sampler and when it ends."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_STOP_IDS = 64  # stop ids that min_tokens can hold back: the width of a device-resident row
_INT64 = range(-(2**63), 2**63)


@dataclass(slots=True, frozen=True, kw_only=True)
class SamplingParams:
    """How to draw a request's tokens. Names and meanings are vLLM's.

    Args:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: sample among the k most likely tokens; 0 or -1 for all.
        top_p: sample among the most likely tokens whose probabilities add up to this, in (0, 1].
        min_p: drop tokens less likely than this times the likeliest, in [0, 1].
        seed: equal seeds draw equal tokens for equal prompts, whoever shares the batch. None: a fresh seed.
        max_tokens: tokens to generate at the most; None: up to the model's length.
        min_tokens: neither EOS nor `stop_token_ids` are drawn before this many tokens.
        ignore_eos: go on past the model's end-of-sequence tokens.
        stop_token_ids: further ids that end the request.

    Raises:
        ValueError: a value out of range; TypeError: a value of the wrong type. Both name the parameter.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] | list[int] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        self._require("temperature", _is_number, lambda v: 0.0 <= v < math.inf, "a finite number >= 0 (0 is greedy)")
        self._require("top_k", _is_int, lambda v: v >= -1, "an integer >= 1, or 0 or -1 for all tokens")
        self._require("top_p", _is_number, lambda v: 0.0 < v <= 1.0, "a number in (0, 1]")
        self._require("min_p", _is_number, lambda v: 0.0 <= v <= 1.0, "a number in [0, 1]")
        self._require("min_tokens", _is_int, lambda v: v >= 0, "an integer >= 0")
        self._require("ignore_eos", lambda v: isinstance(v, bool), lambda v: True, "True or False")
        if self.seed is not None:
            self._require("seed", _is_int, lambda v: v in _INT64, "None or a 64-bit integer")
        if self.max_tokens is not None:
            self._require("max_tokens", _is_int, lambda v: v >= 1, "None or an integer >= 1")
            if self.min_tokens > self.max_tokens:
                raise ValueError(f"min_tokens={self.min_tokens} must not exceed max_tokens={self.max_tokens}")
        self._require(
            "stop_token_ids",
            lambda v: isinstance(v, (list, tuple)) and all(_is_int(i) for i in v),
            lambda v: all(i >= 0 for i in v),
            "a list of token ids >= 0",
        )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    def _require(
        self, name: str, has_type: Callable[[Any], bool], in_range: Callable[[Any], bool], allowed: str
    ) -> None:
        value = getattr(self, name)
        if not has_type(value):
            raise TypeError(f"{name}={value!r} must be {allowed}")
        if not in_range(value):  # written so that NaN, which compares false with everything, is refused
            raise ValueError(f"{name}={value!r} must be {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_int(value)
