"""Which layers share a block table, and which blocks a window still reaches: the arithmetic of a cache with windows.

Layers that see equally far keep the same tokens. If all do, they form one *group* with one block table. If they differ,
each kind gets block tables of its own, so that those with a window can give blocks back. All groups draw from one pool
of equal blocks, so all have equally many layers: as many as the rarest kind. A commoner kind is cut into several
groups, whose last may leave some layers of its blocks unused (vLLM's hybrid cache has the same rule).
"""

import sys
from collections.abc import Callable, Sequence
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


def group_layers(windows: Sequence[int | None], max_model_len: int) -> CacheGroups:
    """Group layers by their windows. A window that no sequence outgrows is none."""
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(None if window is None or window >= max_model_len else window, []).append(layer)
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


def end_of_first_block(position: int, window: int | None, block_size: int) -> int:
    """The position of the first query that no longer sees the first block which the query at `position` sees."""
    if window is None:
        return sys.maxsize
    return (first_visible_block(position, window, block_size) + 1) * block_size + window - 1


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


def longest_hit(num_blocks: int, windows: Windows, block_size: int, is_cached: Callable[[int, int], bool]) -> int:
    """The longest prefix, in blocks and at most `num_blocks`, of which every group has all that later tokens see.

    `is_cached(block, group)`, of a logical block. Looks at each once: from the end on, a missing block that is seen
    after the prefix cuts the prefix off before it.
    """
    hit = num_blocks
    for i in reversed(range(num_blocks)):
        for group, window in enumerate(windows):
            if first_visible_block(hit * block_size, window, block_size) <= i < hit and not is_cached(i, group):
                hit = i
    return hit
