"""The paged KV cache as plain bookkeeping: which block belongs to whom, and what it contains.

The device holds one array of blocks; a sequence's *logical* blocks are mapped to *physical* ones by its
`block_table`, so its memory need not be contiguous, is taken as it grows, and can be shared with every sequence that
begins with the same tokens. PagedAttention: Kwon et al., 2023 (arXiv:2309.06180). How many blocks there are is
measured by `worker/memory.py`.
"""

from array import array
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class CacheStats:
    """Counters since the engine started."""

    prefix_queries: int = 0  # tokens that looked for a cached prefix
    prefix_hits: int = 0  # of these, tokens found
    evictions: int = 0  # blocks whose content was dropped for a new owner


class BlockManager:
    """Hands out the KV cache in blocks, and remembers full blocks by content so that equal prefixes share them.

    Invariant: every block is in exactly one state: free (in LRU order, content still revivable)
    or used (ref_count >= 1). A block's digest commits to all tokens before it.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = CacheStats()
        self._ref_count = [0] * num_blocks
        # Oldest release first. A dict that keeps its order gives O(1) take, return and removal from the middle.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_with: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that some sequence holds."""
        return 1 - len(self._free) / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, seq: Sequence) -> list[int]:
        """The cached blocks with which `seq` begins, longest run first token on. Takes nothing.

        The last token is always left to compute, since its logits are what is asked for.
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
        """How many free blocks `admit` will use up, those revived from the free list included."""
        revived = sum(self._ref_count[block] == 0 for block in prefix)
        return self.num_blocks_for(len(seq.token_ids)) - len(prefix) + revived

    def admit(self, seq: Sequence, prefix: list[int]) -> None:
        """Give `seq`, which holds nothing, the blocks of all its tokens: the shared `prefix`, then fresh ones."""
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
        """Make room for one more token, if a block can be had. False: there is none, and nothing changed."""
        if seq.num_computed_tokens < len(seq.block_table) * self.block_size:
            return True
        if not self._free:
            return False
        seq.block_table.append(self._take())
        return True

    def publish(self, seq: Sequence) -> None:
        """Let others share the blocks that `seq` has filled with tokens the host knows.

        Called when the tokens are *scheduled*: in a forward pass each layer stores all keys and values before any
        attention reads them, so a sequence that joins the same step may already refer to them.
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
            # Two sequences may have computed equal blocks side by side: the first stays the one that is found.
            if digest not in self._block_with:
                self._block_with[digest] = block
                self._digest_of[block] = digest
        seq.num_published_blocks = num_full

    def release(self, seq: Sequence) -> None:
        """Take back all of `seq`'s blocks. Their content stays revivable until somebody takes them."""
        # Last block first, so that the start of a prefix, which most others share, is evicted last.
        for block in reversed(seq.block_table):
            self._ref_count[block] -= 1
            if self._ref_count[block] == 0:
                self._free[block] = None
                if self._digest_of[block] is None:
                    self._free.move_to_end(block, last=False)  # nothing to revive: to be taken first
        seq.block_table = []
        seq.num_published_blocks = 0
        seq.num_computed_tokens = 0

    def forget(self, seq: Sequence) -> None:
        """Let no other sequence find the blocks of `seq`, neither those it has published nor those it would."""
        for digest in seq.block_digests:
            block = self._block_with.pop(digest, None)
            if block is not None:
                self._digest_of[block] = None
        seq.num_published_blocks = len(seq.block_table)

    def forget_content(self) -> None:
        """Empty the prefix cache. Blocks in use stay with their owners."""
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
        """Chain the digests of `seq`'s full blocks: H(parent, tokens), 128 bits of BLAKE2b."""
        size = self.block_size
        parent = seq.block_digests[-1] if seq.block_digests else b""
        for start in range(len(seq.block_digests) * size, len(seq.token_ids) - size + 1, size):
            content = array("I", seq.token_ids[start : start + size]).tobytes()
            parent = blake2b(parent + content, digest_size=16).digest()
            seq.block_digests.append(parent)
