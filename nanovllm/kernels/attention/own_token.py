"""Norms, RoPE and the store of K and V for a sequence's newest token, within the decode kernel.

`paged_decode_kernel.py` calls it before it attends: each program does, for the few heads it needs, what
`qk_norm_rope_store` does for prompts.
"""

from nanovllm.kernels.early_launch import wait_for_previous
from nanovllm.kernels.triton_shim import tl, triton


@triton.jit
def own_token(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    k_ptr,
    v_ptr,
    own_slot,
    is_stored,
    kv_head,
    num_kv_heads,
    eps,
    GROUP: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HALF: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The newest token's queries, k and v of one kv head, `[OWN_ROWS, PADDED_DIM]`; stores k and v if `is_stored`.

    For every dimension it also reads the partner in the rotation. All tensors have one shape, hence one layout, so the
    threads exchange nothing; the price is that they read the same numbers several times.
    """
    row = tl.arange(0, OWN_ROWS)[:, None]
    dim = tl.arange(0, PADDED_DIM)[None, :] + 0 * row
    partner = tl.where(dim < HALF, dim + HALF, tl.where(dim < 2 * HALF, dim - HALF, dim))
    if HALF % 8 == 0:
        partner = tl.max_contiguous(tl.multiple_of(partner, [1, 8]), [1, 8])
    in_head = dim < HEAD_DIM
    is_q, is_normed = row < GROUP, row <= GROUP
    turns = is_normed & (dim < 2 * HALF)
    angle = cos_sin_ptr + tl.minimum(dim, partner)
    cos = tl.load(angle, mask=turns, other=1.0)
    sin = tl.load(angle + HALF, mask=turns, other=0.0)
    sin = tl.where(dim < HALF, -sin, sin)
    if q_weight_ptr is not None:
        own_weight = tl.where(is_q, q_weight_ptr + dim, k_weight_ptr + dim)
        partner_weight = tl.where(is_q, q_weight_ptr + partner, k_weight_ptr + partner)
        own_weight = tl.load(own_weight, mask=in_head & is_normed, other=1.0).to(tl.float32)
        partner_weight = tl.load(partner_weight, mask=in_head & is_normed, other=1.0).to(tl.float32)
    head = tl.where(is_normed, num_kv_heads * GROUP + kv_head, num_kv_heads * (GROUP + 1) + kv_head)
    head = tl.where(is_q, kv_head * GROUP + row, head)
    source = qkv_ptr + head * HEAD_DIM
    place = tl.where(is_normed, k_ptr, v_ptr) + own_slot + dim
    exists = in_head & (row < GROUP + 2)

    wait_for_previous(EARLY)
    stored = tl.load(source + dim, mask=exists, other=0.0)
    turned = tl.load(source + partner, mask=exists, other=0.0).to(tl.float32)
    own = stored.to(tl.float32)
    if q_weight_ptr is not None:
        norm = tl.rsqrt(tl.sum(own * own, axis=1, keep_dims=True) / HEAD_DIM + eps)
        norm = tl.where(is_normed, norm, 1.0)
        own *= norm * own_weight
        turned *= norm * partner_weight
    own = (own * cos + turned * sin).to(stored.dtype)
    tl.store(place, own, mask=exists & (row >= GROUP) & is_stored)
    return own
