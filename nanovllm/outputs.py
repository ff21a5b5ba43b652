"""What a request gives back, while it runs and when it has ended."""

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Logprob:
    """How likely the model found a token: before temperature and truncation."""

    logprob: float
    rank: int | None = None  # 1 is the likeliest of the vocabulary
    decoded_token: str | None = None  # None without a tokenizer, or with detokenize=False


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of the prompt. A snapshot: it does not change once it has been handed out."""

    index: int  # among the request's n
    text: str | None  # None without a tokenizer, or with detokenize=False
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # one for each of token_ids
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"; None while it runs
    stop_reason: int | str | None = None  # the stop token id or the stop string, None if it was an EOS; or the error


@dataclass(slots=True)
class Score:
    """How likely the model finds a text."""

    token_ids: list[int]
    logprobs: list[float | None]  # of each token, given those before it; of the first, None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request: seconds of `time.monotonic()`, None if they have not.

    Its completions and all its outputs share one object, so that an early output shows the times that came later.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """A request and its completions: vLLM's object, which can also be indexed as upstream nano-vLLM's dict is."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # of each prompt token; of the first, None
    num_cached_tokens: int = 0  # prompt tokens whose keys and values came from the prefix cache
    metrics: RequestMetrics | None = None

    def __getitem__(self, key: str) -> Any:
        if key not in ("text", "token_ids", "finish_reason"):
            raise KeyError(f"{key!r}: a RequestOutput has 'text', 'token_ids' and 'finish_reason'")
        return getattr(self.outputs[0], key)
