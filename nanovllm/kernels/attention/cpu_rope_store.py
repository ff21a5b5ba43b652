"""QK-norm, RoPE and the store of K and V on a CPU, where at one token each of PyTorch's operations costs more than its
arithmetic: what depends on the step and not on the layer is worked out once a step, and the rest is few operations.
"""

from dataclasses import dataclass

import torch

TOKENS_AT_ONCE = 256  # the float32 temporaries of more leave the cache, 2.5 times slower at 2,000 tokens


@dataclass(slots=True)
class RopeStorePlan:
    """The rotation and the place of each token of a step."""

    cos: torch.Tensor  # [tokens, 1, rotary_dim] float32, for both halves
    sin: torch.Tensor  # [tokens, 1, rotary_dim] float32, negative for the first half
    block: torch.Tensor  # [tokens] int64
    offset: torch.Tensor  # [tokens] int64
    is_stored: torch.Tensor | None = None  # [tokens] bool, False for padding; None if there is none

    def pieces(self, size: int) -> list["RopeStorePlan"]:
        fields = (self.cos, self.sin, self.block, self.offset, self.is_stored)
        parts = zip(*(field.split(size) for field in fields if field is not None), strict=True)
        return [RopeStorePlan(*part) for part in parts]


def plan_rope_store(
    positions: torch.Tensor, slot_mapping: torch.Tensor, cos_sin: torch.Tensor, block_size: int
) -> RopeStorePlan:
    """`positions [tokens]` int32, `slot_mapping [tokens]` int64 (-1: nowhere), `cos_sin [max_position, rotary_dim]`."""
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    block = torch.div(slot_mapping, block_size, rounding_mode="floor")
    is_stored = slot_mapping >= 0
    return RopeStorePlan(
        torch.cat([cos, cos], -1),
        torch.cat([-sin, sin], -1),
        block,
        slot_mapping % block_size,
        None if is_stored.all() else is_stored,
    )


def qk_norm_rope_store_cpu(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    plan: RopeStorePlan,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """`qk_norm_rope_store` for CPU tensors: see there."""
    if len(qkv) > TOKENS_AT_ONCE:
        pieces = zip(qkv.split(TOKENS_AT_ONCE), plan.pieces(TOKENS_AT_ONCE), strict=True)
        cache = (k_cache, v_cache, num_heads)
        return torch.cat([qk_norm_rope_store_cpu(x, q_weight, k_weight, eps, part, *cache) for x, part in pieces])
    head_dim, rotary_dim = k_cache.shape[-1], plan.cos.shape[-1]
    heads = qkv.unflatten(1, (-1, head_dim))
    num_qk = heads.shape[1] - k_cache.shape[1]
    # A copy even of float32, for it is changed in place: fresh temporaries would cost more than the arithmetic.
    x = heads[:, :num_qk].to(torch.float32, copy=True)
    if q_weight is not None or k_weight is not None:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(head_dim).add_(eps).rsqrt_()
        for weight, own in ((q_weight, slice(0, num_heads)), (k_weight, slice(num_heads, None))):
            if weight is not None:
                x[:, own].mul_(scale[:, own]).mul_(weight)
    turning = x if rotary_dim == head_dim else x[..., :rotary_dim]
    other = turning.unflatten(-1, (2, rotary_dim // 2)).flip(-2).flatten(-2)  # the other element of each pair
    turning.mul_(plan.cos).addcmul_(other, plan.sin)
    q, k = x.to(qkv.dtype).split([num_heads, num_qk - num_heads], dim=1)
    block, offset, v = plan.block, plan.offset, heads[:, num_qk:]
    if plan.is_stored is not None:
        block, offset, k, v = (x[plan.is_stored] for x in (block, offset, k, v))
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v
    return q
