"""Which rows a tile of the experts' products has: read from the sorted order, or found on the spot.

Sorting takes two launches. A decode step's few pairs, whose weights take some 20 microseconds to read, can do without:
there is a tile for each pair, whose program looks through all pairs. The first pair of an expert takes the others of
that expert into its tile, up to `ROWS`, the next one after that begins another tile, and the rest have no work. So each
weight is read once here too.
"""

from nanovllm.kernels.triton_shim import tl, triton


@triton.jit
def rows_of_tile(
    tile,
    ids_ptr,
    pairs_ptr,
    experts_ptr,
    num_pairs,
    first,
    EXPERTS: tl.constexpr,
    IS_SORTED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Returns (the tile's expert, counted from `first`; -1: no work, its pairs `[ROWS]`; -1: padding).

    Args:
        ids_ptr: `[num_pairs]`, the expert of each pair; used if the order is not sorted.
        pairs_ptr, experts_ptr: the `ExpertOrder`, if it is.
        EXPERTS: how many are here, from `first` on.
        PAIRS: a power of two, at least `num_pairs`.
    """
    row = tl.arange(0, ROWS)
    if IS_SORTED:
        expert = tl.load(experts_ptr + tile)
        pairs = tl.load(pairs_ptr + tile * ROWS + row)
    else:
        pair = tl.arange(0, PAIRS)
        ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
        own = tl.load(ids_ptr + tile)
        is_same = ids == own
        num_before = tl.sum((is_same & (pair < tile)).to(tl.int32), axis=0)
        has_work = (own >= first) & (own < first + EXPERTS) & (num_before % ROWS == 0)
        expert = tl.where(has_work, own - first, -1)
        place = tl.cumsum(is_same.to(tl.int32), axis=0) - 1 - num_before
        is_there = is_same[None, :] & (place[None, :] == row[:, None])  # [ROWS, PAIRS]
        pairs = tl.max(tl.where(is_there, pair[None, :], -1), axis=1)
    return expert, pairs
