"""Merges the partial results of a sequence's splits into the attention over the whole sequence.

`paged_decode_kernel.py` normalizes each split's result by itself, and stores it with the log-sum-exp of the split's
scores, which gives its weight in the whole ("flash decoding", Dao et al. 2023). The merge takes the splits in their own
order, not in the order in which programs finish, so results do not depend on timing.
"""

from nanovllm.kernels.attention.sinks import sink_mass
from nanovllm.kernels.triton_shim import tl, triton

MERGE_ELEMENTS = 4096  # float32 elements of partial results that a program holds in registers at once


@triton.jit
def merge_splits(
    partial_out_ptr,
    partial_lse_ptr,
    sinks_ptr,
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
    """The output of one kv head's query heads, `[PADDED_GROUP, PADDED_DIM]` float32; padding repeats the last head.

    Reads `partial_out [entries, num_heads, HEAD_DIM]` and `partial_lse [entries, num_heads]`, float32, the latter to
    base 2, from `first_partial` on: `num_splits` of them, MERGE_SPLITS at a time.
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
        # .cg reads from L2, where the other programs' stores are, not from a stale line of this multiprocessor's L1.
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
    if sinks_ptr is not None:
        mass += sink_mass(sinks_ptr + heads, top)
    return merged / mass[:, None]
