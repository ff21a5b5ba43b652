"""What has changed in the books of the cache since the last look: the block tables, and under which digests blocks are.

The work grows with the batch and with what has changed, not with the cache. A sequence's block tables only grow at
their ends and give blocks back at their beginnings, and an admission makes new ones: so their lengths say what is new.
A digest may change in any block, so while somebody looks, the manager's digests stand in a list that notes its changes,
at some 0.2 µs each.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, repeat

from nanovllm.cache_groups import Windows
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.step_trace import TableChange

Tables = list[list[int]]  # a block table for each group of layers; -1: given back


class NotedDigests(list[bytes | None]):
    """The digest that each block can be found by; None: nobody finds it.

    Attributes:
        changed: blocks whose digest was set. lost: of these, those that were left without one, which a taken one is.
            Who reads them clears them.
    """

    def __init__(self, digests: list[bytes | None]) -> None:
        super().__init__(digests)
        self.changed: set[int] = set()
        self.lost: set[int] = set()

    def __setitem__(self, block: int, digest: bytes | None) -> None:
        list.__setitem__(self, block, digest)  # half as slow as super()
        self.changed.add(block)
        if digest is None:
            self.lost.add(block)


@dataclass(slots=True)
class SeenTables:
    """What was last seen of a sequence's block tables: themselves, and of each its length and how many were given back.

    `name`: the sequence's, in traces.
    """

    name: str
    tables: Tables | None = None
    lengths: list[int] = field(default_factory=list)
    given_back: list[int] = field(default_factory=list)


class DigestChanges:
    """Follows the digests of one engine's cache from its first look until `end`."""

    def __init__(self) -> None:
        self._digests = NotedDigests([])

    def note(self, manager: BlockManager) -> NotedDigests:
        """The manager's digests, which note their changes from now on.

        A manager that is new, or has forgotten all its content, has another list: then one look compares them.
        """
        before, now = self._digests, manager._digest_of  # private, since nobody but a trace may know
        if now is not before:
            self._digests = manager._digest_of = NotedDigests(now)
            pairs = zip(now, chain(before, repeat(None)))  # noqa: B905 -- the manager before may have had fewer blocks
            changed = {block for block, (new, old) in enumerate(pairs) if new is not old}
            self._digests.changed = changed.union(block for block in before.changed if block < len(now))
        return self._digests

    def end(self, manager: BlockManager) -> None:
        """Let the manager note nothing any more."""
        if manager._digest_of is self._digests:
            manager._digest_of = list(self._digests)

    def take(self, manager: BlockManager) -> dict[int, bytes | None]:
        """The digests that have changed since the last call, by block; at first all that there are."""
        noted = self.note(manager)
        changes = {block: noted[block] for block in noted.changed}
        noted.changed.clear()
        return changes


def table_changes(running: Iterable[tuple[SeenTables, Tables]], windows: Windows) -> list[TableChange]:
    """How the block tables of running sequences have changed since they were last seen, which is now."""
    changes = []
    for seen, tables in running:
        if seen.tables is not tables:
            seen.tables, seen.lengths, seen.given_back = tables, [0] * len(tables), [0] * len(tables)
        for group, table in enumerate(tables):
            num_kept, num_gone = seen.lengths[group], seen.given_back[group]
            if windows[group] is not None:
                seen.given_back[group] = _num_given_back(table, num_gone)
            if len(table) > num_kept or seen.given_back[group] > num_gone:
                changes.append((seen.name, group, num_kept, seen.given_back[group], table[num_kept:]))
                seen.lengths[group] = len(table)
    return changes


def _num_given_back(table: list[int], at_least: int) -> int:
    """How many blocks at the beginning of a table were given back."""
    while at_least < len(table) and table[at_least] < 0:
        at_least += 1
    return at_least
