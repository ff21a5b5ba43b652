"""Attention over memory that is not contiguous.

A step's keys and values are scattered to their physical slots (`slot_mapping`), then each query reads its sequence's
keys and values back block by block through the `block_table`. All of a layer's stores come before any of its reads,
so sequences of one step may share blocks that this very step fills.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.kernels.cpu_attention import GatherPlan
from nanovllm.kernels.cpu_rope_store import RopeStorePlan
from nanovllm.kernels.paged_decode import DecodePlan, paged_decode
from nanovllm.kernels.paged_prefill import paged_prefill
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store
from nanovllm.layers.layernorm import RMSNorm


@dataclass(slots=True)
class AttentionMetadata:
    """Where a step's tokens live. The batch lists `num_decodes` sequences of one token first, prefill chunks after.

    Device tensors, except the counts: grids depend on those alone, so that a step can be captured in a graph.
    """

    positions: torch.Tensor  # [tokens] int32
    slot_mapping: torch.Tensor  # [tokens] int64: block * block_size + offset; -1 stores nothing
    rows: torch.Tensor  # [seqs] int32: each sequence's row of the block table; -1 pads
    query_start: torch.Tensor  # [seqs + 1] int32: where each sequence's tokens begin
    seq_lens: torch.Tensor  # [seqs] int32: tokens in the cache, this step's included
    block_table: torch.Tensor  # [rows, max_blocks] int32
    num_decodes: int
    decode_plan: DecodePlan | GatherPlan | None  # how the decodes' contexts are cut up, made once for all layers
    rope_store_plan: RopeStorePlan | None  # on a CPU: each token's rotation and place, likewise


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
        q = qk_norm_rope_store(
            qkv,
            q_norm.weight if q_norm else None,
            k_norm.weight if k_norm else None,
            q_norm.eps if q_norm else 0.0,
            meta.positions,
            cos_sin,
            meta.slot_mapping,
            self.k_cache,
            self.v_cache,
            self.num_heads,
            meta.rope_store_plan,
        )  # [tokens, heads, head_dim]
        out = torch.empty_like(q)
        n = meta.num_decodes
        cache = (self.k_cache, self.v_cache, meta.block_table)
        if n > 0:
            paged_decode(q[:n], *cache, meta.rows[:n], meta.seq_lens[:n], meta.decode_plan, self.scale, out[:n])
        if n < meta.rows.shape[0]:
            chunks = (meta.rows[n:], meta.query_start[n:], meta.seq_lens[n:])
            paged_prefill(q, *cache, *chunks, self.scale, out)
        return out.flatten(1)
