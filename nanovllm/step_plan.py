"""What the host tells the device to do in one step: plain data, and only what changed since the last step."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class LogitEdits:
    """How a sequence edits its logits before sampling. Few do; what every row has is in `NewRow`."""

    prompt_len: int
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    held_back: tuple[int, ...] = ()  # stop ids not drawn before `min_len`, when they are too many for the row
    min_len: int = 0
    has_grammar: bool = False  # it draws when its mask has come

    @property
    def has_any(self) -> bool:
        # Neither length edits anything by itself.
        return self != LogitEdits(self.prompt_len, min_len=self.min_len)


@dataclass(slots=True)
class NewRow:
    """A sequence that enters the batch: all that the device needs to know about it."""

    row: int
    token_ids: list[int]
    num_computed_tokens: int  # found in the prefix cache
    block_tables: list[list[int]]  # of each group of layers; -1: no token of the sequence sees that block any more
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int  # 64 bits
    min_len: int  # prompt tokens + min_tokens: a shorter sequence does not draw `stop_ids`
    stop_ids: list[int]
    edits: LogitEdits | None = None


@dataclass(slots=True)
class PromptSpan:
    """Prompt tokens whose log-probabilities the step returns: those that one chunk predicts."""

    index: int  # of the chunk in the batch
    start: int  # position of the chunk's first token, which predicts the token after it
    num_tokens: int
    num_top: int  # likeliest tokens to return besides; -1: the whole vocabulary


@dataclass(slots=True)
class StepPlan:
    """One step: one forward pass over one batch.

    The batch lists decodes first (one token each), then chunks that reach the end of their sequence's known tokens,
    then a chunk that does not. The first `num_samples` entries sample a token each: all but that last chunk.
    """

    new_rows: list[NewRow] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int, int]] = field(default_factory=list)  # (row, group, index in its table, block)
    rows: list[int] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    num_decodes: int = 0
    num_samples: int = 0
    logprobs: list[tuple[int, int]] = field(default_factory=list)  # (index of a sampling sequence, num_top)
    prompt_logprobs: list[PromptSpan] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)
