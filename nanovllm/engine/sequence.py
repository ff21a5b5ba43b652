"""A request as the engine sees it: tokens, blocks, and how far the device has come."""

from dataclasses import dataclass, field
from enum import Enum, auto

from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens and its place in the cache.

    The host plans a step before it has seen the last one's tokens, so three counts run ahead of each other:
    `token_ids` are the tokens the host knows, `num_in_flight` more have been sampled on the device or will be by a
    step already launched, and `num_computed_tokens` have their keys and values in the cache, or will by then.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    max_len: int  # prompt and output at the most: max_tokens, cut to the model's length
    stop_ids: frozenset[int]  # EOS, unless ignored, and the request's own
    seed: int  # 64 bits
    prompt: str | None = None
    num_prompt_tokens: int = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: str | None = None
    stop_reason: int | None = None
    row: int = -1  # device-resident row while running
    block_table: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)  # of the known full blocks; outlives a preemption
    num_published_blocks: int = 0
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    num_cached_tokens: int = 0  # found in the prefix cache at the first admission
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, known to the host or still on the device."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append_token(self, token_id: int) -> None:
        """Take a sampled token that has arrived on the host, and finish if it is the last."""
        self.num_in_flight -= 1
        self.token_ids.append(token_id)
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        if token_id in self.stop_ids and num_output_tokens > self.params.min_tokens:
            self.finish("stop", stop_reason=token_id if token_id in self.params.stop_token_ids else None)
        elif len(self.token_ids) >= self.max_len:
            self.finish("length")

    def finish(self, reason: str, stop_reason: int | None = None) -> None:
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
