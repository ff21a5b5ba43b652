"""The paged KV cache as plain bookkeeping: which sequences hold a block, and which tokens it contains.

The device holds one array of blocks. A sequence's `block_table` maps its *logical* blocks to *physical* ones. So its
memory need not be contiguous, it takes blocks as it grows, and it shares them with every sequence that begins with the
same tokens. PagedAttention: Kwon et al., 2023 (arXiv:2309.06180). `worker/memory.py` measures how many blocks fit.
"""

from array import array
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

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

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = CacheStats()
        self._ref_count = [0] * num_blocks
        # Oldest release first. An ordered dict takes, returns and removes from the middle in O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_with: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use."""
        return 1 - len(self._free) / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, seq: Sequence) -> list[int]:
        """The longest run of cached blocks that `seq` begins with. It does not take them.

        It never covers the last token: the device must compute that one, since the sampler needs its logits.
        """
        if not self.enable_prefix_caching:
            return []
        self._extend_digests(seq)
        blocks: list[int] = []
        for digest in seq.block_digests[: (len(seq.token_ids) - 1) // self.block_size]:
            block = self._block_with.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_blocks_needed(self, seq: Sequence, prefix: list[int]) -> int:
        """How many blocks `admit` will take off the free list, including those of the prefix that it revives."""
        revived = sum(self._ref_count[block] == 0 for block in prefix)
        return self.num_blocks_for(len(seq.token_ids)) - len(prefix) + revived

    def admit(self, seq: Sequence, prefix: list[int]) -> None:
        """Give `seq`, which holds none, blocks for all its tokens: the shared `prefix`, then fresh ones."""
        for block in prefix:
            if self._ref_count[block] == 0:
                del self._free[block]
            self._ref_count[block] += 1
        seq.block_table = list(prefix)
        seq.num_published_blocks = len(prefix)
        seq.num_computed_tokens = len(prefix) * self.block_size
        if self.enable_prefix_caching:
            self.stats.prefix_queries += len(seq.token_ids)
            self.stats.prefix_hits += seq.num_computed_tokens
        for _ in range(self.num_blocks_for(len(seq.token_ids)) - len(prefix)):
            seq.block_table.append(self._take())

    def grow(self, seq: Sequence) -> bool:
        """Make room for one more token. False if that needs a block and none is free; then nothing has changed."""
        if seq.num_computed_tokens < len(seq.block_table) * self.block_size:
            return True
        if not self._free:
            return False
        seq.block_table.append(self._take())
        return True

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
        self._extend_digests(seq)
        for i in range(seq.num_published_blocks, num_full):
            block, digest = seq.block_table[i], seq.block_digests[i]
            # If two sequences have computed equal blocks side by side, lookups keep finding the first.
            if digest not in self._block_with:
                self._block_with[digest] = block
                self._digest_of[block] = digest
        seq.num_published_blocks = num_full

    def release(self, seq: Sequence) -> None:
        """Take back all blocks of `seq`. Their content can be revived until another sequence takes them."""
        # Last block first: the beginning of a prefix, which most sequences share, shall be evicted last.
        for block in reversed(seq.block_table):
            self._ref_count[block] -= 1
            if self._ref_count[block] == 0:
                self._free[block] = None
                if self._digest_of[block] is None:
                    self._free.move_to_end(block, last=False)  # not cached: take it before those that are
        seq.block_table = []
        seq.num_published_blocks = 0
        seq.num_computed_tokens = 0

    def forget(self, seq: Sequence) -> None:
        """Hide the blocks of `seq` from other sequences: those it has published, and those it would publish later."""
        for digest in seq.block_digests:
            block = self._block_with.pop(digest, None)
            if block is not None:
                self._digest_of[block] = None
        seq.num_published_blocks = len(seq.block_table)

    def forget_content(self) -> None:
        """Empty the prefix cache. Sequences keep the blocks they hold."""
        self._block_with.clear()
        self._digest_of = [None] * self.num_blocks

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._ref_count[block] = 1
        digest = self._digest_of[block]
        if digest is not None:
            del self._block_with[digest]
            self._digest_of[block] = None
            self.stats.evictions += 1
        return block

    def _extend_digests(self, seq: Sequence) -> None:
        """Compute the digests of full blocks that `seq` lacks: BLAKE2b-128(parent's digest, token ids)."""
        size = self.block_size
        parent = seq.block_digests[-1] if seq.block_digests else b""
        for start in range(len(seq.block_digests) * size, len(seq.token_ids) - size + 1, size):
            content = array("I", seq.token_ids[start : start + size]).tobytes()
            parent = blake2b(parent + content, digest_size=16).digest()
            seq.block_digests.append(parent)
