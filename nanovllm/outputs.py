"""What a caller gets for a request, while it runs and when it has ended: plain data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Logprob(NamedTuple):
    """How likely the model found a token, before temperature and truncation."""

    logprob: float
    rank: int | None = None  # 1: the likeliest of the vocabulary
    # The text that it adds to the text before it. Of several tokens that share a character, the last adds all of it.
    decoded_token: str | None = None  # None without a tokenizer, or with detokenize=False


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: first the token there, then the likeliest tokens, best first."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]  # 1: the likeliest


class _CopiedOnRead:
    """A dataclass field that holds a list shared with the request, and copies it when the reader first looks at it.

    Few readers look, and copying would be slow: a prompt may be long, and a stream has an output for each token.
    """

    def __init__(self, copy: Callable[[Any], Any], **default: Any) -> None:
        self._copy, self._default = copy, default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, output: Any, owner: type) -> Any:
        if output is None:  # a dataclass asks for the default; this error means that there is none
            if not self._default:
                raise AttributeError(self._name)
            return self._default["default"]
        value, is_copy = output.__dict__[self._name]
        if not is_copy:
            value = None if value is None else self._copy(value)
            output.__dict__[self._name] = (value, True)
        return value

    def __set__(self, output: Any, value: Any) -> None:
        output.__dict__[self._name] = (value, False)


def _copy_logprobs(logprobs: list[dict[int, Logprob] | None]) -> list[dict[int, Logprob] | None]:
    return [of_token and dict(of_token) for of_token in logprobs]


@dataclass
class CompletionOutput:
    """One completion of the prompt: a snapshot, which the engine no longer changes, and the reader may.

    vLLM's other fields are there, too, and always None.
    """

    index: int  # among the request's n completions
    text: str  # continues the prompt's text; "" without a tokenizer, or with detokenize=False
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = _CopiedOnRead(_copy_logprobs, default=None)  # one for each of token_ids
    routed_experts: None = field(default=None, repr=False)
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"; None while it runs
    stop_reason: int | str | None = None  # the stop token id (None for the EOS), the stop string, or the error
    lora_request: None = field(default=None, repr=False)

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class LogLikelihood:
    """How likely the model finds a text."""

    token_ids: list[int]
    logprobs: list[float | None]  # of each token, given the tokens before it; None for the first

    @classmethod
    def of_prompt(cls, output: "RequestOutput") -> "LogLikelihood":
        """From the output of a request with prompt_logprobs=0."""
        token_ids, values = output.prompt_token_ids, output.prompt_logprobs or []
        return cls(token_ids, [of_token and of_token[i].logprob for i, of_token in zip(token_ids, values, strict=True)])


@dataclass
class RequestMetrics:
    """When a request reached each stage, in seconds of `time.monotonic()`; None if it has not yet.

    The properties have the names of vLLM's V1 engine.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_generation_tokens: int = 0

    @property
    def time_in_queue(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def first_token_latency(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def queued_ts(self) -> float:
        return self.arrival_time

    @property
    def scheduled_ts(self) -> float | None:
        return self.first_scheduled_time

    @property
    def first_token_ts(self) -> float | None:
        return self.first_token_time

    @property
    def last_token_ts(self) -> float | None:
        return self.last_token_time


@dataclass
class RequestOutput:
    """A request and its completions: vLLM's object, which also reads like upstream nano-vLLM's dict.

    It belongs to the reader: changing it changes no later output. vLLM's other fields are there, too, and always None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] = _CopiedOnRead(list)
    # For each prompt token; None for the first.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = _CopiedOnRead(_copy_logprobs)
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    lora_request: None = field(default=None, repr=False)
    encoder_prompt: None = field(default=None, repr=False)
    encoder_prompt_token_ids: None = field(default=None, repr=False)
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    kv_transfer_params: None = field(default=None, repr=False)

    def keys(self) -> tuple[str, ...]:
        """The keys of the dict, whose values are those of the first completion."""
        return ("text", "token_ids", "finish_reason")

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(f"{key!r}: a RequestOutput has 'text', 'token_ids' and 'finish_reason'")
        return getattr(self.outputs[0], key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default
