"""What every block of the cache holds, followed from look to look: the work grows with what has changed.

The block manager knows how many owners a block has; who they are stand in the sequences' block tables. So a look
compares each running sequence's tables and the manager's digests with those of the last look.
"""

from collections.abc import Iterable, Iterator, Mapping

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.step_trace import BlockState

Tables = list[list[int]]  # a block table for each group of layers; -1: given back
CHUNK = 256  # digests that one comparison in C covers


class BlockStates:
    """The blocks as of the last look."""

    def __init__(self) -> None:
        self._tables: dict[str, Tables] = {}
        self._owners: dict[int, list[str]] = {}
        self._index: dict[int, int] = {}  # of a block in the table of its last owner
        self._digests: list[bytes | None] = []
        self._states: dict[int, BlockState] = {}  # those that are not free

    def look(self, manager: BlockManager, tables: Mapping[str, Tables]) -> list[BlockState]:
        """The blocks that have changed, in order; `tables` has those of all running sequences, by name."""
        touched: set[int] = set()
        for name in self._tables.keys() - tables.keys():
            touched |= self._move(name, self._tables.pop(name), [])
        for name, now in tables.items():
            if (before := self._tables.get(name, [])) != now:
                touched |= self._move(name, before, now)
                self._tables[name] = [list(table) for table in now]
        digests = digests_of(manager)
        touched.update(differing(self._digests, digests))
        self._digests = digests
        changed = []
        for block in sorted(touched):
            state = self._state(block, manager.block_size)
            if state != self._states.get(block, free(block)):
                changed.append(state)
            if state.state == "free":
                self._states.pop(block, None)
            else:
                self._states[block] = state
        return changed

    def _move(self, name: str, before: Tables, now: Tables) -> set[int]:
        """Change the owners of the blocks by which two tables of a sequence differ, and return these blocks."""
        old, new = set(_places(before)), set(_places(now))
        for block, _ in old - new:
            self._owners[block].remove(name)
        for block, index in new - old:
            self._owners.setdefault(block, []).append(name)
            self._index[block] = index
        return {block for block, _ in old ^ new}

    def _state(self, block: int, block_size: int) -> BlockState:
        owners, digest = self._owners.get(block), self._digests[block]
        if not owners and digest is None:
            self._owners.pop(block, None)
            self._index.pop(block, None)
            return free(block)
        index = self._index.get(block)
        first = -1 if index is None else index * block_size
        short = "" if digest is None else digest.hex()[:8]
        return BlockState(block, "used" if owners else "cached", tuple(owners or ()), first, short)


def free(block: int) -> BlockState:
    return BlockState(block, "free", (), -1, "")


def digests_of(manager: BlockManager) -> list[bytes | None]:
    """What each block can be found by; None: by nothing. A copy, at some 4 ns a block."""
    return list(manager._digest_of)  # the manager has no public name for it, since nobody else may know


def _places(tables: Tables) -> Iterator[tuple[int, int]]:
    return ((block, i) for table in tables for i, block in enumerate(table) if block >= 0)


def differing(before: list[bytes | None], now: list[bytes | None]) -> Iterable[int]:
    """The indices at which two lists differ; what the shorter one lacks is None."""
    before = before + [None] * (len(now) - len(before))
    for start in range(0, len(now), CHUNK):
        old, new = before[start : start + CHUNK], now[start : start + CHUNK]
        if old != new:
            yield from (start + i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
