"""Which of several engines gets a request: the one whose cache has most of its prompt, unless others have less to do.

An engine's prefix cache is not asked: that would cost a round trip. Here is only remembered which engine got which
beginnings, block by block, as its cache keeps them. A digest commits to all tokens before it (`engine/block_digests`).
"""

from collections import OrderedDict
from collections.abc import Sequence

from nanovllm.engine.block_digests import extend_digests

MOST_BLOCKS = 1 << 18  # remembered, the latest used: some 40 MB
MARGIN = 16  # requests that an engine may have more than the least loaded one, and still get its own


class PrefixAffinity:
    """Remembers which engine has seen which blocks of tokens."""

    def __init__(self, block_size: int, most_blocks: int = MOST_BLOCKS, margin: int = MARGIN) -> None:
        self._block_size, self._most_blocks, self._margin = block_size, most_blocks, margin
        self._engine_of: OrderedDict[bytes, int] = OrderedDict()
        self._last = -1

    def choose(self, token_ids: list[int], loads: Sequence[int | None]) -> int | None:
        """The index of the engine for a prompt, and remember it; None if no engine serves.

        It is the one that got the most of the prompt's blocks from the first on, unless it has over `margin` requests
        more than the least loaded engine. Otherwise it is the least loaded; of several the next in turn.

        Args:
            loads: requests that each engine has now; None: it does not serve.
        """
        serving = [i for i, load in enumerate(loads) if load is not None]
        if not serving:
            return None
        least = min(loads[i] for i in serving)
        digests: list[bytes] = []
        extend_digests(digests, token_ids, self._block_size)
        chosen = next((i for digest in reversed(digests) if (i := self._engine_of.get(digest)) is not None), None)
        if chosen not in serving or loads[chosen] - least > self._margin:
            chosen = min((i for i in serving if loads[i] == least), key=lambda i: (i - self._last - 1) % len(loads))
            self._last = chosen
        for digest in digests:
            self._engine_of[digest] = chosen
            self._engine_of.move_to_end(digest)
        while len(self._engine_of) > self._most_blocks:
            self._engine_of.popitem(last=False)
        return chosen
