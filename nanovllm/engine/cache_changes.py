"""What has changed in the books of the cache since the last look: the block tables, and under which digests blocks are.

The work grows with the batch and with what has changed, not with the cache. A sequence's block tables only grow at
their ends and give blocks back at their beginnings, and an admission makes new ones: so their lengths say what is new.
A digest may change in any block, so while somebody looks, the manager's digests stand in a list that notes its changes.
"""

from collections.abc import Mapping

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
        super().__setitem__(block, digest)
        self.changed.add(block)
        if digest is None:
            self.lost.add(block)


class CacheChanges:
    """Follows one engine's cache from its first look until `end`."""

    def __init__(self) -> None:
        self._digests = NotedDigests([])
        self._known: dict[str, tuple[Tables, list[int], list[int]]] = {}  # (tables, their lengths, blocks given back)

    def note(self, manager: BlockManager) -> NotedDigests:
        """The manager's digests, which note their changes from now on.

        A manager that is new, or has forgotten all its content, has another list: then one look compares them.
        """
        before, now = self._digests, manager._digest_of  # private, since nobody but a trace may know
        if now is not before:
            self._digests = manager._digest_of = NotedDigests(now)
            changed = [i for i, old in enumerate([*before, *[None] * (len(now) - len(before))]) if old is not now[i]]
            self._digests.changed = before.changed.union(changed)
        return self._digests

    def end(self, manager: BlockManager) -> None:
        """Let the manager note nothing any more."""
        if manager._digest_of is self._digests:
            manager._digest_of = list(self._digests)

    def digests(self, manager: BlockManager) -> dict[int, bytes | None]:
        """The digests that have changed since the last call, by block; at first all that there are."""
        noted = self.note(manager)
        changes = {block: noted[block] for block in noted.changed}
        noted.changed.clear()
        return changes

    def tables(self, running: Mapping[str, Tables], windows: Windows) -> list[TableChange]:
        """How the block tables of running sequences, given by name, have changed since the last call."""
        known, changes = self._known, []
        for name in known.keys() - running.keys():
            del known[name]
        for name, tables in running.items():
            seen = known.get(name)
            if seen is None or seen[0] is not tables:
                seen = known[name] = (tables, [0] * len(tables), [0] * len(tables))
            _, lengths, given_back = seen
            for group, table in enumerate(tables):
                num_kept, num_gone = lengths[group], given_back[group]
                if windows[group] is not None:
                    given_back[group] = _num_given_back(table, num_gone)
                if len(table) > num_kept or given_back[group] > num_gone:
                    changes.append((name, group, num_kept, given_back[group], table[num_kept:]))
                    lengths[group] = len(table)
        return changes


def _num_given_back(table: list[int], at_least: int) -> int:
    """How many blocks at the beginning of a table were given back."""
    while at_least < len(table) and table[at_least] < 0:
        at_least += 1
    return at_least
