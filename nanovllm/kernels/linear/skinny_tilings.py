"""The tiles and slices of products with few rows (`skinny_linear.py`), by the sizes of x and of the weight."""

from functools import lru_cache
from typing import NamedTuple

import torch

from nanovllm.kernels.device import multiprocessors

LARGE, HUGE = 1 << 23, 1 << 27  # elements: a large weight has tilings of its own, a huge one has none
WIDE = 2048  # a sum in slices of more rows has tiles enough for the tilings of large weights
NARROW = 4096  # a large weight of no more rows has too few tiles, unless in slices
LARGE_AHEAD = 256  # columns of a large weight to fetch before the wait: all of them would flood the L2 cache
MIN_SLICE = 256  # least columns of a slice
SLICE_MULTIPLE = 128  # divides the columns of a slice
FULL = 0.7  # once this share of the multiprocessors has a program, more slices gain nothing


class Tiling(NamedTuple):
    """The tiles of x and of the weight that a program multiplies. A gated product's is half gate and half up."""

    rows: int  # of x
    weight_rows: int
    columns: int
    depth: int  # of the load pipeline
    longest: int = 1 << 30  # columns of a slice, at most


# Most rows of x -> tilings of a plain product, of one in slices, of a gated one; None: a library's kernel is as fast.
# The next kernel can start early in the shared memory that a program leaves free, so a tiling's own time does not tell.
# We chose each by the time of whole steps: of Qwen3-0.6B on an H100 and an H200 and, for large weights, of Qwen3-8B on
# an H200 (docs/lab-notebook.md).
TILINGS = {
    16: (Tiling(16, 64, 256, 4), Tiling(16, 64, 256, 4), Tiling(16, 64, 256, 4)),
    32: (Tiling(32, 64, 256, 3), Tiling(32, 64, 128, 3), Tiling(32, 64, 256, 4)),
    48: (Tiling(64, 32, 256, 3), Tiling(64, 32, 256, 3), Tiling(64, 64, 128, 4)),
    64: (Tiling(64, 32, 256, 3), Tiling(64, 16, 256, 4), Tiling(64, 64, 128, 4)),
    96: (Tiling(64, 64, 128, 4), Tiling(64, 32, 256, 4), Tiling(128, 64, 128, 4)),
    128: (Tiling(128, 64, 128, 4), Tiling(64, 32, 256, 4), Tiling(128, 64, 128, 4)),
    192: (None, Tiling(64, 64, 128, 4), None),
    256: (None, Tiling(128, 64, 128, 4), None),
}
LARGE_TILINGS = {
    16: (Tiling(16, 64, 128, 4), Tiling(16, 64, 128, 4, 3584), Tiling(16, 64, 128, 3)),
    32: (Tiling(32, 64, 128, 4), Tiling(32, 64, 128, 4, 3584), Tiling(32, 64, 128, 3)),
    64: (Tiling(64, 64, 128, 4), Tiling(64, 64, 128, 4), None),
    96: (None, None, None),  # a library was faster in all three
    128: (None, Tiling(128, 64, 128, 4), None),
}


def choose_tiling(num_tokens: int, n: int, k: int, gated: bool, in_slices: bool) -> Tiling | None:
    """The tiling for `num_tokens` rows of x and a weight `[n, k]`; None where a library's kernel is as fast."""
    is_large = n * k >= LARGE or in_slices and n > WIDE
    if n * k >= HUGE or is_large and n <= NARROW and not in_slices:
        return None
    table = LARGE_TILINGS if is_large else TILINGS
    plain, of_slices, of_gated = next((table[rows] for rows in table if num_tokens <= rows), (None, None, None))
    return of_gated if gated else of_slices if in_slices else plain


@lru_cache
def num_slices(programs: int, k: int, longest: int, device: torch.device) -> int:
    """How many equal slices to cut K into: the fewest that nearly fill the device, or as many as there can be.

    If no more of them than multiprocessors run at a time, a few left over would take as long as all others: then it is
    the most slices that do not leave any.
    """
    possible = [p for p in range(1, max(k // MIN_SLICE, 1) + 1) if k % (p * SLICE_MULTIPLE) == 0]
    at_once = multiprocessors(device)
    enough = next((p for p in possible if programs * p >= FULL * at_once and k // p <= longest), possible[-1])
    if at_once < programs * enough < 2 * at_once and longest >= k:
        return max((p for p in possible if programs * p <= at_once), default=enough)
    return enough


def fit(tiling: Tiling, columns: int, itemsize: int, shared_memory: int) -> tuple[int, int]:
    """Columns of a tile (they divide a slice's) and depth: the tiling's, or fewer, to fit into `shared_memory`."""
    bytes_per_column = (tiling.rows + tiling.weight_rows) * itemsize
    tile_k = dividing(columns, tiling.columns)
    while 2 * tile_k * bytes_per_column > shared_memory:
        tile_k //= 2
    return tile_k, min(tiling.depth, max(2, columns // tile_k), shared_memory // (tile_k * bytes_per_column))


def dividing(k: int, tile: int) -> int:
    """The largest power of two up to `tile` that divides `k`."""
    return min(tile, k & -k)


def columns_ahead(n: int, k: int, columns: int) -> int:
    """How many of a slice's `columns` of a weight `[n, k]` to fetch before the wait."""
    return min(LARGE_AHEAD, columns) if n * k >= LARGE else columns
