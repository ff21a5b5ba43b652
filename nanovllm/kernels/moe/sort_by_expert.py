"""The order in which many tokens' experts are multiplied: pairs of a token and an expert, sorted by expert.

A pair has the number `token * k + choice`. Each expert's pairs fill tiles of `rows` rows; the last one is padded, so
that a tile has one expert and one piece of its weight. How many tiles there are depends on the data, and a captured
graph's launches may not, so there is room for the most there can be, and those without work have no expert.

A program for each expert reads all choices twice: it counts its own, and, once all counts are known, stores them where
its tiles begin. That is `experts * pairs * 4` bytes out of the L2 cache a pass, 34 MB for 65,536 pairs and 128 experts,
and no atomics: the order is stable, hence the same every time.
"""

from typing import NamedTuple

import torch

from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import tl, triton

CHUNK = 4096  # pairs that a program looks at together


class ExpertOrder(NamedTuple):
    """Tiles of pairs, sorted by expert.

    Attributes:
        pairs: `[tiles, rows]` int32; padding, after an expert's last pair, is -1.
        experts: `[tiles]` int32, each tile's expert, counted from the first here; -1 in tiles without work, whose pairs
            are undefined.
    """

    pairs: torch.Tensor
    experts: torch.Tensor


def most_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """How many tiles the pairs can fill at most: an expert that is hit wastes up to `rows - 1` rows."""
    return (num_pairs + min(num_pairs, num_experts) * (rows - 1)) // rows


def sort_by_expert_reference(ids: torch.Tensor, first: int, num_experts: int, rows: int) -> ExpertOrder:
    """`sort_by_expert_triton` in PyTorch."""
    flat = ids.flatten() - first
    tiles, experts = [], []
    for expert in range(num_experts):
        for part in (flat == expert).nonzero().flatten().split(rows):
            if len(part):
                tiles.append(torch.nn.functional.pad(part, (0, rows - len(part)), value=-1))
                experts.append(expert)
    unused = most_tiles(flat.numel(), num_experts, rows) - len(tiles)
    tiles += [torch.full((rows,), -1, device=ids.device)] * unused
    experts += [-1] * unused
    return ExpertOrder(torch.stack(tiles).int(), torch.tensor(experts, dtype=torch.int32, device=ids.device))


def sort_by_expert_triton(ids: torch.Tensor, first: int, num_experts: int, rows: int) -> ExpertOrder:
    """Sort the pairs of `ids [tokens, k]` (int32, contiguous) by expert, in two launches.

    Args:
        first, num_experts: the experts to sort by; pairs of others are dropped.
        rows: of a tile.
    """
    num_pairs, device = ids.numel(), ids.device
    num_tiles = most_tiles(num_pairs, num_experts, rows)
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    pairs = torch.empty((num_tiles, rows), dtype=torch.int32, device=device)
    experts = torch.empty(num_tiles, dtype=torch.int32, device=device)
    chunk = min(CHUNK, max(triton.next_power_of_2(num_pairs), 32))
    options = {"CHUNK": chunk, "num_warps": max(chunk // 512, 1), **early_launch(ids)}
    _count_kernel[(num_experts,)](ids, counts, num_pairs, first, **options)
    _place_kernel[(num_experts,)](
        ids, counts, pairs, experts, num_pairs, num_tiles, first, EXPERTS=num_experts,
        TILE=triton.next_power_of_2(num_experts), ROWS=rows, **options,
    )  # fmt: skip
    return ExpertOrder(pairs, experts)


@triton.jit(do_not_specialize=["num_pairs", "first"])
def _count_kernel(ids_ptr, counts_ptr, num_pairs, first, CHUNK: tl.constexpr, EARLY: tl.constexpr):
    expert = tl.program_id(0)
    index = tl.arange(0, CHUNK)
    found = tl.zeros([CHUNK], tl.int32)
    wait_for_previous(EARLY)
    for start in range(0, num_pairs, CHUNK):
        ids = tl.load(ids_ptr + start + index, mask=start + index < num_pairs, other=-1)
        found += (ids == expert + first).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(found, axis=0))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles", "first"])
def _place_kernel(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    experts_ptr,
    num_pairs,
    num_tiles,
    first,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    expert = tl.program_id(0)
    every = tl.arange(0, TILE)
    index = tl.arange(0, CHUNK)
    wait_for_previous(EARLY)
    tiles = (tl.load(counts_ptr + every, mask=every < EXPERTS, other=0) + ROWS - 1) // ROWS  # of each expert
    begin = tl.sum(tl.where(every < expert, tiles, 0), axis=0)
    end = begin + tl.sum(tl.where(every == expert, tiles, 0), axis=0)
    used = tl.sum(tiles, axis=0)
    place = begin * ROWS
    for start in range(0, num_pairs, CHUNK):
        ids = tl.load(ids_ptr + start + index, mask=start + index < num_pairs, other=-1)
        is_mine = ids == expert + first
        ones = is_mine.to(tl.int32)
        tl.store(pairs_ptr + place + tl.cumsum(ones, axis=0) - 1, start + index, mask=is_mine)
        place += tl.sum(ones, axis=0)
    padding = place + tl.arange(0, ROWS)
    tl.store(pairs_ptr + padding, tl.full([ROWS], -1, tl.int32), mask=padding < end * ROWS)
    for tile in range(begin, end):
        tl.store(experts_ptr + tile, expert)
    for tile in range(used + expert, num_tiles, EXPERTS):
        tl.store(experts_ptr + tile, -1)
