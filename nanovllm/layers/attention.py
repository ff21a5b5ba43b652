"""Attention over memory that is not contiguous.

A step's keys and values are scattered to their physical slots (`slot_mapping`), then each query reads its sequence's
keys and values back block by block through the `block_table`. A chunk of a prompt may read blocks that this very step
fills, for others or itself: decodes have stored before, and all chunks store before any reads. A decode reads none,
but for its own newest token: whatever else it shares was there when it arrived.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.kernels.attention.cpu_attention import CpuDecodePlan
from nanovllm.kernels.attention.cpu_rope_store import RopeStorePlan
from nanovllm.kernels.attention.decode_splits import DecodeSplits
from nanovllm.kernels.attention.paged_decode import paged_decode
from nanovllm.kernels.attention.paged_prefill import paged_prefill
from nanovllm.kernels.attention.qk_norm_rope_store import qk_norm_rope_store
from nanovllm.layers.layernorm import RMSNorm


@dataclass(slots=True)
class AttentionMetadata:
    """Where a step's tokens live. The batch lists `num_decodes` sequences of one token first, prefill chunks after.

    Device tensors, except the counts: grids depend on those alone, so that a step can be captured in a graph.
    """

    positions: torch.Tensor  # [tokens] int32
    slot_mapping: torch.Tensor  # [tokens] int64: block * block_size + offset; -1 stores nothing
    rows: torch.Tensor  # [seqs] int32: each sequence's row of the block table; -1 pads
    chunk_start: torch.Tensor | None  # [chunks + 1] int32: where each chunk's tokens begin, counted from the first's
    seq_lens: torch.Tensor  # [seqs] int32: tokens in the cache, this step's included
    block_table: torch.Tensor  # [rows, max_blocks] int32
    num_decodes: int
    decode_plan: DecodeSplits | CpuDecodePlan | None  # how the decodes' contexts are cut up, made once for all layers
    rope_store_plan: RopeStorePlan | None  # on a CPU: rotation and place of each of the chunks' tokens, likewise


class Attention(nn.Module):
    """Causal attention with grouped query heads, on this rank's heads and its part of the paged cache."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        # [num_blocks, kv_heads, block_size, head_dim], assigned once the cache is allocated
        self.k_cache = self.v_cache = torch.empty(0)

    def forward(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        meta: AttentionMetadata,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> torch.Tensor:
        """`qkv [tokens, (heads + 2 * kv_heads) * head_dim]` -> `[tokens, heads * head_dim]`."""
        out = torch.empty(len(qkv), self.num_heads, self.head_dim, dtype=qkv.dtype, device=qkv.device)
        norms = (q_norm.weight, k_norm.weight, q_norm.eps) if q_norm and k_norm else (None, None, 0.0)
        cache = (self.k_cache, self.v_cache)
        n = meta.num_decodes
        if n > 0:
            where = (meta.block_table, meta.rows[:n], meta.seq_lens[:n], meta.decode_plan)
            paged_decode(qkv[:n], *norms, cos_sin, *cache, *where, self.scale, out[:n])
        if n < meta.rows.shape[0]:
            places = (meta.positions[n:], cos_sin, meta.slot_mapping[n:])
            q = qk_norm_rope_store(qkv[n:], *norms, *places, *cache, self.num_heads, meta.rope_store_plan)
            chunks = (meta.block_table, meta.rows[n:], meta.chunk_start, meta.seq_lens[n:])
            paged_prefill(q, *cache, *chunks, self.scale, out[n:])
        return out.flatten(1)
