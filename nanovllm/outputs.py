"""What a request gives back, while it runs and when it has ended."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Logprob(NamedTuple):
    """How likely the model found a token: before temperature and truncation."""

    logprob: float
    rank: int | None = None  # 1 is the likeliest of the vocabulary
    # The text that it adds within a text: of a character that several tokens make, all comes with the last of them.
    decoded_token: str | None = None  # None without a tokenizer, or with detokenize=False


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: first of the token that is there, then of the likeliest, best first."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]  # 1 is the likeliest


class _OwnCopy:
    """A field that is given a list of the request's, which its outputs share, and shows a copy of its own.

    It is made when somebody looks, which few do: a prompt may be long, and each of its tokens has an output.
    """

    def __init__(self, copy: Callable[[Any], Any], **default: Any) -> None:
        self._copy, self._default = copy, default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, output: Any, owner: type) -> Any:
        if output is None:  # a dataclass asks for the default, and takes this error for none
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
    """One continuation of the prompt. A snapshot: it does not change once it has been handed out.

    What is in it is the reader's. The fields without a comment are vLLM's, and None.
    """

    index: int  # among the request's n
    text: str  # goes on where the prompt's ends; "" without a tokenizer, or with detokenize=False
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = _OwnCopy(_copy_logprobs, default=None)  # one for each of token_ids
    routed_experts: None = field(default=None, repr=False)
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"; None while it runs
    stop_reason: int | str | None = None  # the stop token id or the stop string, None if it was an EOS; or the error
    lora_request: None = field(default=None, repr=False)

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class LogLikelihood:
    """How likely the model finds a text."""

    token_ids: list[int]
    logprobs: list[float | None]  # of each token, given those before it; of the first, None


@dataclass
class RequestMetrics:
    """When things happened to a request: seconds of `time.monotonic()`, None if they have not by then.

    The properties are the names of vLLM's second engine.
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
    """A request and its completions: vLLM's object, which can also be read as upstream nano-vLLM's dict is.

    What is in it is the reader's: a change to it changes nothing that comes later. The fields without a comment after
    `metrics` are vLLM's, and None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] = _OwnCopy(list)
    # Of each prompt token; of the first, None.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = _OwnCopy(_copy_logprobs)
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    lora_request: None = field(default=None, repr=False)
    encoder_prompt: None = field(default=None, repr=False)
    encoder_prompt_token_ids: None = field(default=None, repr=False)
    num_cached_tokens: int = 0  # prompt tokens whose keys and values came from the prefix cache
    kv_transfer_params: None = field(default=None, repr=False)

    def keys(self) -> tuple[str, ...]:
        """What it has as a dict, of its first completion."""
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
