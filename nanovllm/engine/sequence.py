"""One prompt with its one completion: tokens, blocks, and how far the device has computed them."""

import time
from dataclasses import dataclass, field
from enum import Enum, auto

from nanovllm.outputs import RequestMetrics, TokenLogprobs
from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion of a request, which has n of these.

    The host plans a step before it has read the last step's tokens, so it keeps three counts: `token_ids` are the
    tokens that the host knows, `num_in_flight` more are sampled by steps already launched, and `num_computed_tokens`
    have their keys and values in the cache once those steps are done.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    max_len: int  # of prompt and output together: max_tokens, cut to the model's length
    stop_ids: frozenset[int]  # EOS and `stop_token_ids`: not drawn during the first min_tokens
    stop_reasons: dict[int, int | None]  # the ids that end it, each with its `stop_reason`
    seed: int  # 64 bits
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences
    grammar: "Matcher | None" = None  # noqa: F821 -- what its text must be, see text/grammar.py
    num_prompt_tokens: int = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    row: int = -1  # of the device's rows; -1 unless running
    block_tables: list[list[int]] = field(default_factory=list)  # of each group of layers; -1: given back
    room_until: int = 0  # the block tables need no change for tokens before this position
    block_digests: list[bytes] = field(default_factory=list)  # of the known full blocks; survives a preemption
    num_published_blocks: int = 0
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    num_cached_tokens: int = 0  # found in the prefix cache at the first admission
    num_preemptions: int = 0
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.monotonic()))
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the output tokens, if the request asks for them
    cumulative_logprob: float | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # as far as they have arrived

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.cumulative_logprob = None if self.params.logprobs is None else 0.0
        self.prompt_logprobs = None if self.params.prompt_logprobs is None else [None]  # nothing predicts the first

    @property
    def num_tokens(self) -> int:
        """All tokens, including those not read from the device yet."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def must_score_prompt(self) -> bool:
        """Whether prompt log-probabilities are missing; then every prompt token is computed, cached or not."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens

    def append_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Take the log-probabilities of the next token, before the token itself."""
        self.logprobs.append(logprobs)
        self.cumulative_logprob = (self.cumulative_logprob or 0.0) + logprobs.logprobs[0]

    def append_token(self, token_id: int) -> None:
        """Take a sampled token, read from the device; finish if it is the last."""
        self.num_in_flight -= 1
        self.token_ids.append(token_id)
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        if num_output_tokens == 1 and self.metrics.first_token_time is None:
            self.metrics.first_token_time = time.monotonic()
        if token_id in self.stop_reasons and num_output_tokens > self.params.min_tokens:
            self.finish("stop", self.stop_reasons[token_id])
        elif len(self.token_ids) >= self.max_len:
            self.finish("length")

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.status = SequenceStatus.FINISHED
        self.finish_reason, self.stop_reason = reason, stop_reason
