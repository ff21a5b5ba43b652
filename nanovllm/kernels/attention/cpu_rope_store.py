"""QK-norm, RoPE and the store of K and V on a CPU.

At one token each of PyTorch's operations costs more than its arithmetic. So what depends on the step and not on the
layer is worked out once a step (`TokenPlaces`), and a layer is left with few operations.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nanovllm.kernels.attention.contract import AttentionSpec, KVCache, Rotation

TOKENS_AT_ONCE = 256  # the float32 temporaries of more leave the cache, 2.5 times slower at 2,000 tokens


@dataclass(slots=True)
class TokenPlaces:
    """Where in the cache each of some tokens goes, and by which angles it is rotated."""

    positions: torch.Tensor  # [tokens] int32
    block: torch.Tensor  # [tokens] int64
    offset: torch.Tensor  # [tokens] int64
    is_stored: torch.Tensor | None = None  # [tokens] bool, False for padding; None if there is none
    # By table of rotations: each layer has a rope of its own, but layers of equal parameters share the table.
    _rotations: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, positions: torch.Tensor, slot_mapping: torch.Tensor, block_size: int) -> "TokenPlaces":
        """`positions [tokens]` int32, `slot_mapping [tokens]` int64 (-1: nowhere)."""
        block = torch.div(slot_mapping, block_size, rounding_mode="floor")
        is_stored = slot_mapping >= 0
        return cls(positions, block, slot_mapping % block_size, None if is_stored.all() else is_stored)

    def rotation(self, rope: "Rotation | None") -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for both halves, `[tokens, 1, rotary_dim]` float32; sines negative for the first half."""
        key = 0 if rope is None else id(rope.cos_sin)
        if key not in self._rotations:
            if rope is None:
                cos = sin = torch.empty(len(self.positions), 1, 0)
            else:
                cos, sin = rope.cos_sin.index_select(0, self.positions).unsqueeze(1).chunk(2, dim=-1)
            self._rotations[key] = (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))
        return self._rotations[key]


def qk_norm_rope_store_cpu(
    qkv: torch.Tensor, spec: "AttentionSpec", cache: "KVCache", places: TokenPlaces
) -> torch.Tensor:
    """`qk_norm_rope_store` for CPU tensors: see there."""
    cos, sin = places.rotation(spec.rope)
    tokens = (qkv, cos, sin, places.block, places.offset)
    if places.is_stored is not None:
        tokens = (*tokens, places.is_stored)
    if len(qkv) <= TOKENS_AT_ONCE:
        return _store(spec, cache, *tokens)
    batches = zip(*(t.split(TOKENS_AT_ONCE) for t in tokens), strict=True)
    return torch.cat([_store(spec, cache, *batch) for batch in batches])


def _store(
    spec: "AttentionSpec",
    cache: "KVCache",
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    block: torch.Tensor,
    offset: torch.Tensor,
    is_stored: torch.Tensor | None = None,
) -> torch.Tensor:
    num_heads, head_dim, rotary_dim = spec.num_heads, spec.head_dim, cos.shape[-1]
    heads = qkv.unflatten(1, (-1, head_dim))
    num_qk = heads.shape[1] - spec.num_kv_heads
    # A copy even of float32, for it is changed in place: fresh temporaries would cost more than the arithmetic.
    x = heads[:, :num_qk].to(torch.float32, copy=True)
    q_weight, k_weight, eps = spec.norms
    if q_weight is not None or k_weight is not None:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(head_dim).add_(eps).rsqrt_()
        for weight, own in ((q_weight, slice(0, num_heads)), (k_weight, slice(num_heads, None))):
            if weight is not None:
                x[:, own].mul_(scale[:, own]).mul_(weight)
    rotated = x if rotary_dim == head_dim else x[..., :rotary_dim]
    other = rotated.unflatten(-1, (2, rotary_dim // 2)).flip(-2).flatten(-2)  # the other element of each pair
    rotated.mul_(cos).addcmul_(other, sin)
    q, k = x.to(qkv.dtype).split([num_heads, num_qk - num_heads], dim=1)
    v = heads[:, num_qk:]
    if is_stored is not None:
        block, offset, k, v = (t[is_stored] for t in (block, offset, k, v))
    cache.k[block, :, offset] = k
    cache.v[block, :, offset] = v
    return q
