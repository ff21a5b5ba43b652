"""The arguments of an attention kernel: the layer as data, its part of the cache, and where a step's tokens are.

A batch lists its decodes first (one token each), then its chunks of prompts. The two go to different kernels, so each
has a record of its own, made once a step and shared by all layers. Their tensors are on the device. Grids depend on
shapes alone, so that a CUDA graph can record a step.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from nanovllm.kernels.attention.cpu_rope_store import TokenPlaces
from nanovllm.kernels.attention.decode_splits import DecodeSplits
from nanovllm.kernels.attention.kv_gather import KvGather


class Rotation(Protocol):
    """`layers/rotary_embedding.py`'s Rope."""

    cos_sin: torch.Tensor  # [max_position, rotary_dim] float32, cosines first, then sines


class HeadNorm(Protocol):
    """`layers/layernorm.py`'s RMSNorm over a head."""

    weight: torch.Tensor  # [head_dim]
    eps: float


class Sinks(Protocol):
    """`layers/attention.py`'s AttentionSinks."""

    weight: torch.Tensor  # [num_heads]


@dataclass(slots=True, eq=False)
class AttentionSpec:
    """A layer of causal attention with grouped query heads, as data. Counts are this rank's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of the scores
    rope: Rotation | None = None  # None: positions do not enter
    q_norm: HeadNorm | None = None  # with k_norm: each head is normalized before it is rotated
    k_norm: HeadNorm | None = None
    window: int | None = None  # a query sees so many tokens, itself the last of them; None: all
    soft_cap: float | None = None  # scores become soft_cap * tanh(scores / soft_cap)
    sinks: Sinks | None = None  # each head's softmax has one more score, whose value is zero

    @property
    def norms(self) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
        """The weights for queries and keys, None where there is no norm, and eps."""
        q, k = self.q_norm, self.k_norm
        return q and q.weight, k and k.weight, (q or k).eps if q or k else 0.0

    @property
    def sink_scores(self) -> torch.Tensor | None:
        """`[num_heads]`, or None where there are no sinks."""
        return None if self.sinks is None else self.sinks.weight

    def cos_sin(self, device: torch.device) -> torch.Tensor:
        """The rotations `[max_position, rotary_dim]`; without rope none of the dimensions is rotated."""
        return torch.empty(1, 0, dtype=torch.float32, device=device) if self.rope is None else self.rope.cos_sin


class KVCache(NamedTuple):
    """A layer's keys and values, `[num_blocks, kv_heads, block_size, head_dim]` each."""

    k: torch.Tensor
    v: torch.Tensor


@dataclass(slots=True)
class DecodeBatch:
    """A step's decodes: the newest token of each sequence. Its position is `seq_lens - 1`."""

    rows: torch.Tensor  # [seqs] int32: each sequence's row of the block table; -1 pads
    seq_lens: torch.Tensor  # [seqs] int32: tokens in the cache, the newest included; 0 pads
    block_table: torch.Tensor  # [rows, max_blocks] int32
    splits: DecodeSplits | None = (
        None  # on a GPU: how the contexts are cut, for the window of the layers that read them
    )
    gather: KvGather | None = None  # on a CPU: which blocks are copied together, for that window
    places: TokenPlaces | None = None  # on a CPU


@dataclass(slots=True)
class ChunkBatch:
    """A step's chunks of prompts."""

    positions: torch.Tensor  # [tokens] int32
    slot_mapping: torch.Tensor  # [tokens] int64: block * block_size + offset; -1 stores nothing
    rows: torch.Tensor  # [chunks] int32; -1 pads
    query_start: torch.Tensor  # [chunks + 1] int32: where each chunk's tokens begin, counted from the first chunk's
    seq_lens: torch.Tensor  # [chunks] int32: tokens in the cache, the chunk's included
    block_table: torch.Tensor  # [rows, max_blocks] int32
    places: TokenPlaces | None = None  # on a CPU
