"""What the host tells the device to do in one step: plain data, only what changed since the last one."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class NewRow:
    """A sequence that enters the batch: everything the device must know of it."""

    row: int
    token_ids: list[int]
    num_computed_tokens: int  # found in the prefix cache
    block_table: list[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int  # 64 bits
    min_len: int  # prompt tokens + min_tokens: shorter than this, `stop_ids` are not drawn
    stop_ids: list[int]


@dataclass(slots=True)
class StepPlan:
    """One forward pass.

    The batch lists decodes first (one token each), then prefill chunks that reach the end of what is known of their
    sequence, then those that don't. The first two sample a token each, the last do not.
    """

    new_rows: list[NewRow] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)  # (row, index in its block_table, block)
    rows: list[int] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    num_decodes: int = 0
    num_samples: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)
