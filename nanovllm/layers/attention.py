"""Attention over memory that is not contiguous.

A step's keys and values are scattered to their slots of the paged cache (`slot_mapping`). Then each query reads its
sequence's keys and values back, block by block, through the `block_table`. Within a layer all decodes store first, then
all chunks store before any chunk reads: so a chunk may read blocks that this very step fills. A decode reads no block
that this step fills, except the slot of its own newest token.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.attention.contract import AttentionSpec, ChunkBatch, DecodeBatch, KVCache
from nanovllm.kernels.attention.paged_decode import paged_decode
from nanovllm.kernels.attention.paged_prefill import paged_prefill
from nanovllm.kernels.attention.qk_norm_rope_store import qk_norm_rope_store
from nanovllm.layers.shards import copy_share


@dataclass(slots=True)
class AttentionMetadata:
    """Where a step's tokens are, for each group of layers. The batch lists the decodes, one token each, first."""

    num_decodes: int
    decodes: list[DecodeBatch]  # of each group; empty: there are none
    chunks: list[ChunkBatch]
    positions: torch.Tensor  # [tokens] int32; of a padding entry 0


class Attention(nn.Module):
    """Causal attention on this rank's heads. The cache and the group are assigned once the cache is allocated."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.cache: KVCache | None = None
        self.group = 0  # of layers that share a block table

    def forward(self, qkv: torch.Tensor, meta: AttentionMetadata) -> torch.Tensor:
        """`qkv [tokens, (heads + 2 * kv_heads) * head_dim]` -> `[tokens, heads * head_dim]`.

        Norms and rotates q and k as the spec says, stores k and v, and attends.
        """
        spec, n = self.spec, meta.num_decodes
        out = torch.empty(len(qkv), spec.num_heads, spec.head_dim, dtype=qkv.dtype, device=qkv.device)
        if meta.decodes:  # one launch does all of it
            paged_decode(qkv[:n], spec, self.cache, meta.decodes[self.group], out[:n])
        if meta.chunks:
            chunks = meta.chunks[self.group]
            q = qk_norm_rope_store(qkv[n:], spec, self.cache, chunks)
            paged_prefill(q, spec, self.cache, chunks, out[n:])
        return out.flatten(1)


class AttentionSinks(nn.Module):
    """A learned score for each head that takes part in the softmax and has no value (gpt-oss: OpenAI, 2025).

    A checkpoint names the tensor itself `sinks`.
    """

    checkpoint_names = {"": ("weight", None)}

    def __init__(self, num_heads: int, tp: TensorParallel) -> None:
        """`num_heads`: of this rank."""
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(num_heads), requires_grad=False)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        copy_share(param, loaded, 0, len(param) * self.tp.size, self.tp.rank)
