"""A request's parameters: how the sampler draws its tokens, when it ends, and what its outputs contain."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from nanovllm.structured_outputs import StructuredOutputsParams
from nanovllm.vllm_defaults import SAMPLING_FIELDS, check

# The sampler treats a lower temperature as 0, since its noise could not outweigh any difference of logits. A power of
# two is exact in float32, so that host and device agree on which temperature is lower.
MIN_TEMPERATURE = 2.0**-17
MAX_N = 16384
MAX_STOP_IDS = 64  # stop ids that a row on the device can hold back; a request with more edits its logits instead
# The sampler returns one of these instead of a token if a logit is NaN, or if all are -inf.
NAN_LOGITS, NO_TOKEN_LEFT = -1, -2
WHY_NO_TOKEN = {
    NAN_LOGITS: "the model's logits are NaN: its weights are damaged, or its numbers overflow in this dtype",
    NO_TOKEN_LEFT: "no token is left to draw: the request's parameters, or the model's logits, rule out all",
}


class RequestOutputKind(Enum):
    """What each output of a stream contains."""

    CUMULATIVE = 0  # all tokens so far
    DELTA = 1  # only what is new since the last output
    FINAL_ONLY = 2  # all tokens, in a single output at the end


@dataclass(init=False, kw_only=True)
class SamplingParams:
    """How to draw a request's tokens. Names, meanings and limits are vLLM's.

    You may assign to parameters. A new request checks and copies them; later assignments do not change it. None stands
    for a parameter's default, except in `max_tokens`. vLLM's further fields are accepted if they ask for nothing: see
    `vllm_defaults`.

    The sampler edits logits in this order: structured_outputs, allowed_token_ids, bad_words, min_tokens, logit_bias,
    repetition, frequency and presence penalty. Greedy takes the argmax of the result. Otherwise temperature, min_p,
    top_k and top_p follow, then the draw.

    Args:
        n: completions of the prompt, at most 16384.
        presence_penalty: subtracted from the logit of each token that occurs in the output, in [-2, 2].
        frequency_penalty: the same, once for each occurrence, in [-2, 2].
        repetition_penalty: divides the positive logits, and multiplies the others, of tokens that occur in prompt or
            output; above 0.
        temperature: 0 is greedy; otherwise it divides the logits, however small it is.
        top_k: sample among the k most likely tokens; 0 or -1 for all.
        top_p: sample among the most likely tokens whose probabilities add up to this, in (0, 1].
        min_p: drop tokens less likely than this times the likeliest, in [0, 1].
        seed: equal seeds draw equal tokens for equal prompts, whatever else is in the batch. None or -1: a fresh seed.
        stop: strings that end the request.
        stop_token_ids: further ids that end the request.
        include_stop_str_in_output: keep the stop string at the end of the text.
        ignore_eos: continue past the model's end-of-sequence tokens.
        min_tokens: draw neither EOS nor `stop_token_ids` before this many tokens.
        max_tokens: generate at most this many tokens; None: up to the model's length.
        logit_bias: added to the logits of these tokens; ids may be strings of digits.
        allowed_token_ids: draw no other tokens.
        bad_words: do not draw the last token of such a word when the output ends with its other tokens.
        logprobs: return log-probabilities of each drawn token and of this many likeliest tokens, from the model's own
            logits, before any of the above. 0: of the drawn tokens alone; True: 1; -1: of the whole vocabulary.
        prompt_logprobs: the same for the prompt's tokens.
        detokenize: return text.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: put spaces between them.
        output_kind: what each output of a stream contains. `LLM.generate` and `LLM.chat` ignore it.
        truncate_prompt_tokens: keep only this many of the prompt's last tokens; -1: as many as the model takes.
        structured_outputs: what the text must be, such as JSON of a schema. EOS and `stop_token_ids` end the request
            where the text may end; with `ignore_eos` EOS ends it only where the text cannot go on.

    Raises:
        ValueError: a value out of range, or values that contradict each other; TypeError: a value of the wrong type.
            Both name the parameter.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __init__(self, **values: Any) -> None:
        vars(self).update(_DEFAULTS)
        vars(self).update(values)
        self._normalize()
        self._check()

    @staticmethod
    def from_optional(**values: Any) -> "SamplingParams":
        """Like the constructor, but clips biases to OpenAI's limits, [-100, 100]."""
        params = SamplingParams(**values)
        if params.logit_bias:
            params.logit_bias = {token: min(100.0, max(-100.0, bias)) for token, bias in params.logit_bias.items()}
        return params

    def clone(self) -> "SamplingParams":
        """A copy that shares nothing with this object. Checks the values, and raises as the constructor."""
        return SamplingParams(**vars(self))

    def __getattr__(self, name: str) -> None:
        """None for vLLM's further fields, unless assigned."""
        if name in SAMPLING_FIELDS:
            return
        raise AttributeError(f"SamplingParams has no {name!r}", name=name, obj=self)

    def _normalize(self) -> None:
        """Bring each value that has several forms into one of them, and copy the lists."""
        mine = vars(self)
        for name, default in _DEFAULTS.items():
            if mine[name] is None and name != "max_tokens":
                mine[name] = default
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        for name in _LISTS:
            if mine[name] is None and name != "allowed_token_ids":
                mine[name] = []
            elif isinstance(mine[name], list | tuple | set | frozenset | range):
                mine[name] = list(mine[name])
        if isinstance(self.logit_bias, dict):
            by_id = self.logit_bias.items()
            self.logit_bias = {int(i) if isinstance(i, str) and i.isdecimal() else i: bias for i, bias in by_id}
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(mine[name], bool):
                mine[name] = 1 if mine[name] else None
        if self.seed == -1:
            self.seed = None
        guided = mine.pop("guided_decoding", None)  # vLLM's name until 0.12
        if guided is not None:
            if self.structured_outputs is not None:
                raise ValueError(f"guided_decoding={guided!r:.80} must be None beside structured_outputs: its new name")
            self.structured_outputs = guided
        if isinstance(self.structured_outputs, StructuredOutputsParams):
            self.structured_outputs = self.structured_outputs.clone()

    def _check(self) -> None:
        mine = vars(self)
        if len(mine) > len(_DEFAULTS):
            others = {name: value for name, value in mine.items() if name not in _DEFAULTS}
            check("SamplingParams", SAMPLING_FIELDS, others, list(_DEFAULTS))
        for name, (has_type, in_range, allowed) in _RULES.items():
            value = mine[name]
            if value is _DEFAULTS[name]:  # most are defaults: checking them would slow every request down
                continue
            if value is None and allowed.startswith("None or"):
                continue
            if not has_type(value):
                raise TypeError(f"{name}={value!r} must be {allowed}")
            if not in_range(value):  # so that NaN, which compares false with everything, is refused
                raise ValueError(f"{name}={value!r} must be {allowed}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must not exceed max_tokens={self.max_tokens}")
        if self.n > 1 and self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"n={self.n} must be 1 with temperature={self.temperature}: all would be the same")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop={self.stop!r} must be empty with detokenize=False: it is searched in the text")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_int(value)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_int, value))


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_biases(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_int, value)) and all(map(_is_number, value.values()))


def _all_biases(value: dict[int, float]) -> bool:
    return all(token >= 0 and not math.isnan(bias) for token, bias in value.items())


_INT64 = range(-(2**63), 2**63)
# name: (has the right type, is in range, what the error says is allowed)
_RULES: dict[str, tuple[Callable[[Any], bool], Callable[[Any], bool], str]] = {
    "n": (_is_int, lambda v: 1 <= v <= MAX_N, f"an integer in [1, {MAX_N}]"),
    "presence_penalty": (_is_number, lambda v: -2.0 <= v <= 2.0, "a number in [-2, 2]"),
    "frequency_penalty": (_is_number, lambda v: -2.0 <= v <= 2.0, "a number in [-2, 2]"),
    "repetition_penalty": (_is_number, lambda v: 0.0 < v < math.inf, "a finite number > 0"),
    "temperature": (_is_number, lambda v: 0.0 <= v < math.inf, "a finite number >= 0 (0 is greedy)"),
    "top_k": (_is_int, lambda v: v >= -1, "an integer >= 1, or 0 or -1 for all tokens"),
    "top_p": (_is_number, lambda v: 0.0 < v <= 1.0, "a number in (0, 1]"),
    "min_p": (_is_number, lambda v: 0.0 <= v <= 1.0, "a number in [0, 1]"),
    "seed": (_is_int, lambda v: v in _INT64, "None or a 64-bit integer"),
    "stop": (_is_strings, all, "a string or a list of strings, none empty"),
    "stop_token_ids": (_is_ids, lambda v: all(i >= 0 for i in v), "a list of token ids >= 0"),
    "include_stop_str_in_output": (_is_bool, lambda v: True, "True or False"),
    "ignore_eos": (_is_bool, lambda v: True, "True or False"),
    "min_tokens": (_is_int, lambda v: v >= 0, "an integer >= 0"),
    "max_tokens": (_is_int, lambda v: v >= 1, "None or an integer >= 1"),
    "logit_bias": (_is_biases, _all_biases, "None or a dict from token ids >= 0 to numbers"),
    "allowed_token_ids": (_is_ids, lambda v: v and min(v) >= 0, "None or a list of token ids >= 0 that is not empty"),
    "bad_words": (_is_strings, lambda v: all(w.strip() for w in v), "a list of strings, none blank"),
    "logprobs": (_is_int, lambda v: v >= -1, "None or an integer >= 0, or -1 for the whole vocabulary"),
    "prompt_logprobs": (_is_int, lambda v: v >= -1, "None or an integer >= 0, or -1 for the whole vocabulary"),
    "detokenize": (_is_bool, lambda v: True, "True or False"),
    "skip_special_tokens": (_is_bool, lambda v: True, "True or False"),
    "spaces_between_special_tokens": (_is_bool, lambda v: True, "True or False"),
    "output_kind": (
        lambda v: isinstance(v, RequestOutputKind),
        lambda v: True,
        "RequestOutputKind.CUMULATIVE, DELTA or FINAL_ONLY",
    ),
    "structured_outputs": (
        lambda v: isinstance(v, StructuredOutputsParams),
        lambda v: True,
        "None or a StructuredOutputsParams",
    ),
    "truncate_prompt_tokens": (_is_int, lambda v: v == -1 or v >= 1, "None or an integer >= 1, or -1 for the model's"),
}
_DEFAULTS = {f.name: f.default for f in fields(SamplingParams)}
_LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")
