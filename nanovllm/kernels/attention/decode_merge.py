"""The attention of one query over the splits of its sequence, from what `paged_decode_kernel.py` has over each of them.

Each split's result is normalised by itself, and comes with the log-sum-exp of its scores, which is the weight it has in
the whole ("flash decoding", Dao et al. 2023). The merge goes by the order of the splits, not of their programs'
arrival, so results do not depend on timing.
"""

from nanovllm.kernels.triton_shim import tl, triton

MERGE_ELEMENTS = 4096  # float32 partial results held in registers at once


@triton.jit
def merge_splits(
    partial_out_ptr,
    partial_lse_ptr,
    first_partial,
    num_splits,
    kv_head,
    num_heads,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
):
    """The heads of one kv head, `[PADDED_GROUP, PADDED_DIM]` float32; rows past the group repeat its last head.

    `partial_out [slots, num_heads, HEAD_DIM]` and `partial_lse [slots, num_heads]` float32, the latter to base 2; the
    sequence's splits are `first_partial` and those after it. MERGE_SPLITS of them are read at a time.
    """
    heads = kv_head * GROUP + tl.minimum(tl.arange(0, PADDED_GROUP), GROUP - 1)
    dims = tl.arange(0, PADDED_DIM)
    top = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    mass = tl.zeros([PADDED_GROUP], tl.float32)
    merged = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    for base in range(0, num_splits, MERGE_SPLITS):
        index = base + tl.arange(0, MERGE_SPLITS)
        present = (index < num_splits)[:, None]
        partials = ((first_partial + index).to(tl.int64) * num_heads)[:, None] + heads[None, :]
        # .cg: from L2, where the others' stores are, never from a stale line of this multiprocessor's L1.
        lse = tl.load(partial_lse_ptr + partials, mask=present, other=float("-inf"), cache_modifier=".cg")
        partial = tl.load(
            partial_out_ptr + partials[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=present[:, :, None] & (dims < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(lse, 0))
        weights = tl.exp2(lse - new_top[None, :])
        decay = tl.exp2(top - new_top)
        mass = mass * decay + tl.sum(weights, 0)
        merged = merged * decay[:, None] + tl.sum(weights[:, :, None] * partial, 0)
        top = new_top
    return merged / mass[:, None]
