"""The tiles of the experts' products, by how many pairs an expert has on average.

Up to some 150 pairs the product is as fast as an expert's weight can be read, so a tile has room for nearly all pairs
of an expert, and padding costs nothing. Beyond, tiles have the shape that fills the matrix units. Measured on an H200
with Qwen3-30B-A3B's sizes (docs/lab-notebook.md); `python -m benchmarks.moe --tune` tries others.
"""

from dataclasses import dataclass, replace


@dataclass(slots=True, frozen=True)
class Tiling:
    """A tile of `rows` pairs, by `weight_rows` rows of the weight, over `columns` of both at a time.

    Of a gated product the program takes as many rows of the up, too.
    """

    rows: int
    weight_rows: int
    columns: int
    depth: int  # of the load pipeline
    warps: int = 4
    group: int = 1  # tiles of pairs whose programs come one after the other for each tile of the weight
    copy_engine: bool = False  # whether it copies the weight's tiles (TMA)


# Most pairs of an expert, on average -> tilings of the gated and of the weighted product, with equal rows.
TILINGS = {
    1: (Tiling(16, 64, 128, 4), Tiling(16, 64, 128, 4)),
    8: (Tiling(16, 64, 128, 4), Tiling(16, 64, 128, 3)),
    20: (Tiling(32, 64, 128, 4), Tiling(32, 64, 128, 3)),
    200: (Tiling(64, 128, 64, 4, 4, 8), Tiling(64, 256, 64, 4, 4, 8)),
    1 << 62: (Tiling(128, 128, 64, 4, 8, 8, True), Tiling(128, 256, 64, 4, 8, 8)),
}
# Sums of float32 without rounding to TF32 use no matrix units: small tiles, for tests and exactness rather than speed.
FLOAT32 = (Tiling(16, 32, 32, 2), Tiling(16, 32, 32, 2))


def choose_tilings(num_pairs: int, num_experts: int, itemsize: int, shared_memory: int) -> tuple[Tiling, Tiling]:
    """The tilings of both products, with as deep a pipeline as `shared_memory` holds."""
    if itemsize > 2:
        return FLOAT32
    both = next(tilings for most, tilings in TILINGS.items() if num_pairs <= most * num_experts)
    return tuple(_fit(tiling, halves, itemsize, shared_memory) for tiling, halves in zip(both, (2, 1), strict=True))


def _fit(tiling: Tiling, halves: int, itemsize: int, shared_memory: int) -> Tiling:
    stage = (tiling.rows + halves * tiling.weight_rows) * tiling.columns * itemsize
    return replace(tiling, depth=max(1, min(tiling.depth, shared_memory // stage)))
