"""Which layers share a block table, and which blocks a window still reaches: the arithmetic of a cache with windows.

Layers that see equally far keep the same tokens. If all do, they form one *group* with one block table. If they differ,
each kind gets block tables of its own, so that those with a window can give blocks back. All groups draw from one pool
of equal blocks, so all have equally many layers: as many as the rarest kind. A commoner kind is cut into several
groups, whose last may leave some layers of its blocks unused (vLLM's hybrid cache has the same rule).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Windows = tuple[int | None, ...]  # of each group: how many tokens a query sees, itself the last of them; None: all


@dataclass(slots=True, frozen=True)
class CacheGroups:
    """The groups of a model's attention layers; the one without window, if there is one, comes first."""

    windows: Windows
    layers: list[list[int]]  # of each group, in order

    @property
    def num_layers(self) -> int:
        """Layers for which a block has room."""
        return len(self.layers[0])


def group_layers(windows: Sequence[int | None]) -> CacheGroups:
    """Group a model's layers by their windows."""
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window, []).append(layer)
    size = min(map(len, kinds.values()))
    groups = [
        (window, kinds[window][start : start + size])
        for window in sorted(kinds, key=lambda window: window or 0)
        for start in range(0, len(kinds[window]), size)
    ]
    return CacheGroups(tuple(window for window, _ in groups), [layers for _, layers in groups])


def first_visible_block(position: int, window: int | None, block_size: int) -> int:
    """The first logical block that the query at `position` sees, and so all queries after it."""
    return 0 if window is None else max(position - window + 1, 0) // block_size


def most_blocks(num_tokens: int, window: int | None, largest_chunk: int, block_size: int) -> int:
    """The most blocks that a sequence of `num_tokens` holds in a group, if no step computes more than a chunk of it."""
    num_blocks = -(-num_tokens // block_size)
    if window is None:
        return num_blocks
    reach = window - 1 + largest_chunk  # tokens that a chunk's queries see, wherever in a block they begin
    return min(num_blocks, (reach - 2) // block_size + 2)


def most_blocks_in_all(num_tokens: int, windows: Windows, largest_chunk: int, block_size: int) -> int:
    """`most_blocks` in all groups together: a cache of so many serves the sequence."""
    return sum(most_blocks(num_tokens, window, largest_chunk, block_size) for window in windows)


def longest_hit(
    windows: Windows, block_size: int, digests: Sequence[bytes], block_with: Sequence[Mapping[bytes, int]]
) -> int:
    """How many of the blocks with these `digests` a new sequence can share: the longest run from the first on, of which
    every group has all that later tokens see. `block_with`: each group's cached blocks.
    """
    hit = len(digests)
    for window, cached in zip(windows, block_with, strict=True):
        if window is None:
            hit = next((i for i in range(hit) if digests[i] not in cached), hit)
    windowed = [(window, cached) for window, cached in zip(windows, block_with, strict=True) if window is not None]
    i = hit
    while i > 0 and windowed:  # from the end on: a missing block that is seen after the run cuts the run off before it
        i -= 1
        firsts = [first_visible_block(hit * block_size, window, block_size) for window, _ in windowed]
        if any(i >= first and digests[i] not in cached for first, (_, cached) in zip(firsts, windowed, strict=True)):
            hit = i
        elif i <= min(firsts):
            break
    return hit
