"""What a decode step's attention does with the newest token before it attends: norms, RoPE, and the store of K and V.

As `qk_norm_rope_store`, which see, but within `paged_decode_kernel.py`, by each program for the few heads it needs.
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
    """The newest token's heads of one kv head, `[OWN_ROWS, PADDED_DIM]`: its queries, k and v; these two are stored.

    Of every dimension its partner in the rotation is read too. All tensors are of one shape, at the price of reading
    the same numbers many times, so that they have one layout and the threads nothing to exchange.
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
