"""The paged KV cache as plain bookkeeping: which sequences hold a block, and which tokens it contains.

The device holds one array of blocks. A sequence's `block_table` maps its *logical* blocks to *physical* ones. So its
memory need not be contiguous, it takes blocks as it grows, and it shares them with every sequence that begins with the
same tokens. PagedAttention: Kwon et al., 2023 (arXiv:2309.06180). `worker/memory.py` measures how many blocks fit.

Layers that see equally far form a *group* (`cache_groups.py`), with a block table of its own in each sequence; most
models have one. A group with a window gives blocks behind it back, and a prefix hit needs only those that it reaches.
"""

import sys
from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain, product, zip_longest

from nanovllm.cache_groups import Windows, first_visible_block, longest_hit, most_blocks
from nanovllm.engine.block_digests import extend_digests
from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class CacheStats:
    """Counters since the engine started."""

    prefix_queries: int = 0  # tokens of admitted sequences, whose prefix was looked up
    prefix_hits: int = 0  # of these, tokens found
    evictions: int = 0  # cached blocks whose content a new owner replaced


class BlockManager:
    """Hands out the KV cache in blocks, and finds full blocks by content, so that equal prefixes share them.

    Invariant: every block is either used (ref_count >= 1) or free. Free blocks stand in LRU order, and their content
    can be revived until they are taken. A block's digest commits to its own tokens and to all tokens before them.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, windows: Windows = (None,)
    ) -> None:
        self.num_blocks, self.block_size, self.windows = num_blocks, block_size, windows  # a window for each group
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = CacheStats()
        self._ref_count = [0] * num_blocks
        # Oldest release first. An ordered dict takes, returns and removes from the middle in O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._group_of = [0] * num_blocks  # of a block with a digest
        self._block_with: list[dict[bytes, int]] = [{} for _ in windows]

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use."""
        return 1 - len(self._free) / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, seq: Sequence) -> list[list[int]]:
        """The longest run of cached blocks that `seq` begins with, for each group, -1 behind its window. Takes none.

        It never covers the last token: the device must compute that one, since the sampler needs its logits.
        """
        if seq.must_score_prompt or not self.enable_prefix_caching:
            return [[] for _ in self.windows]
        extend_digests(seq.block_digests, seq.token_ids, self.block_size)
        size, block_with = self.block_size, self._block_with
        digests = seq.block_digests[: (len(seq.token_ids) - 1) // size]
        hit = longest_hit(self.windows, size, digests, block_with)
        firsts = [first_visible_block(hit * size, window, size) for window in self.windows]
        return [[-1] * n + [of[key] for key in digests[n:hit]] for n, of in zip(firsts, block_with, strict=True)]

    def num_free_blocks_needed(self, seq: Sequence, prefix: list[list[int]], largest_chunk: int) -> int:
        """How many blocks off the free list get `seq` through its prompt, including those of the prefix it revives."""
        num_tokens, needed = len(seq.token_ids), 0
        for table, window in zip(prefix, self.windows, strict=True):
            revived = sum(block >= 0 and self._ref_count[block] == 0 for block in table)
            revived_and_fresh = revived + self.num_blocks_for(num_tokens) - len(table)
            needed += min(revived_and_fresh, most_blocks(num_tokens, window, largest_chunk, self.block_size))
        return needed

    def admit(self, seq: Sequence, prefix: list[list[int]]) -> None:
        """Give `seq`, which holds none, the shared `prefix`, then fresh blocks; those for a window `grow` takes."""
        for block in chain.from_iterable(prefix):
            if block >= 0:
                if self._ref_count[block] == 0:
                    del self._free[block]
                self._ref_count[block] += 1
        seq.block_tables = prefix
        seq.num_published_blocks = len(prefix[0])
        seq.num_computed_tokens = len(prefix[0]) * self.block_size
        if self.enable_prefix_caching:
            self.stats.prefix_queries += len(seq.token_ids)
            self.stats.prefix_hits += seq.num_computed_tokens
        num_fresh = self.num_blocks_for(len(seq.token_ids)) - len(prefix[0])
        for table, window in zip(prefix, self.windows, strict=True):
            if window is None:
                table.extend([self._take() for _ in range(num_fresh)])

    def grow(self, seq: Sequence, num_tokens: int = 1) -> list[tuple[int, int, int]] | None:
        """Make room for the next `num_tokens`, once the blocks behind a window have gone back.

        Returns the blocks taken, as (group, index in its table, block). None if too few are free: then it took none.
        """
        tables, end = seq.block_tables, seq.num_computed_tokens + num_tokens
        if end <= seq.room_until:
            return []
        next_give_back, num_blocks = self._give_back(seq), self.num_blocks_for(end)
        places = [(group, i) for group, table in enumerate(tables) for i in range(len(table), num_blocks)]
        if len(places) > len(self._free):
            return None
        for group, _ in places:
            tables[group].append(self._take())
        seq.room_until = min(next_give_back, self.block_size * min(map(len, tables)))
        return [(group, i, tables[group][i]) for group, i in places]

    def publish(self, seq: Sequence) -> None:
        """Let other sequences share the blocks that `seq` has filled with tokens known to the host.

        The scheduler calls this when it *schedules* the tokens: within a step each layer stores all keys and values
        before attention reads them, so a sequence that is admitted to the same step may already share them.
        """
        if not self.enable_prefix_caching:
            return
        num_known = min(seq.num_computed_tokens, len(seq.token_ids))
        num_full = num_known // self.block_size
        if num_full <= seq.num_published_blocks:
            return
        extend_digests(seq.block_digests, seq.token_ids, self.block_size)
        for group, (table, block_with) in enumerate(zip(seq.block_tables, self._block_with, strict=True)):
            for i in range(seq.num_published_blocks, num_full):
                block, digest = table[i], seq.block_digests[i]
                # If two sequences have computed equal blocks side by side, lookups keep finding the first.
                if block >= 0 and digest not in block_with:
                    block_with[digest] = block
                    self._digest_of[block], self._group_of[block] = digest, group
        seq.num_published_blocks = num_full

    def release(self, seq: Sequence) -> None:
        """Take back all blocks of `seq`. Their content can be revived until another sequence takes them."""
        # Last block first: the beginning of a prefix, which most sequences share, shall be evicted last.
        for block in chain.from_iterable(zip_longest(*map(reversed, seq.block_tables), fillvalue=-1)):
            if block >= 0:
                self._release(block)
        seq.block_tables = []
        seq.room_until = seq.num_published_blocks = seq.num_computed_tokens = 0

    def forget(self, seq: Sequence) -> None:
        """Hide the blocks of `seq` from other sequences: those it has published, and those it would publish later."""
        for digest, block_with in product(seq.block_digests, self._block_with):
            block = block_with.pop(digest, None)
            if block is not None:
                self._digest_of[block] = None
        seq.num_published_blocks = max(map(len, seq.block_tables), default=0)

    def forget_content(self) -> None:
        """Empty the prefix cache. Sequences keep the blocks they hold."""
        self._block_with = [{} for _ in self.windows]
        self._digest_of = [None] * self.num_blocks

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._ref_count[block] = 1
        digest = self._digest_of[block]
        if digest is not None:
            del self._block_with[self._group_of[block]][digest]
            self._digest_of[block] = None
            self.stats.evictions += 1
        return block

    def _release(self, block: int) -> None:
        self._ref_count[block] -= 1
        if self._ref_count[block] == 0:
            self._free[block] = None
            if self._digest_of[block] is None:
                self._free.move_to_end(block, last=False)  # not cached: take it before those that are

    def _give_back(self, seq: Sequence) -> int:
        """Release blocks that no token to come sees. Returns the position of the first token that sees one less."""
        start, size, until = seq.num_computed_tokens, self.block_size, sys.maxsize
        for table, window in zip(seq.block_tables, self.windows, strict=True):
            if window is not None:
                i = first_visible_block(start, window, size)
                until = min(until, (i + 1) * size + window - 1)
                while i > 0 and table[i - 1] >= 0:  # those before one that went back have gone back too
                    i -= 1
                    self._release(table[i])
                    table[i] = -1
        return until
