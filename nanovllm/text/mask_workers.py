"""Makes a step's masks: in the caller's thread if they are cheap, and if not with the help of others.

A mask takes from 3 microseconds to some milliseconds, and nothing tells beforehand. So the caller begins alone, and
when that takes too long, shares out the rest by what a mask has cost so far.

The library lets go of Python's lock while it makes masks. A thread makes all of its share in one call, since threads
that hand this lock to one another for each mask are slower than a single one. And it makes all masks of a compilation,
whose matchers share a lock of the library: the library's own way of sharing out lets its threads wait in a chain.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import numpy as np

ALONE_S = 0.0003  # how long the caller works alone
LEAST_SHARE_S = 0.0003  # a thread takes about 0.1 ms to wake up


class MaskWorkers:
    """At most `num_threads`, the caller's included. One caller at a time."""

    def __init__(self, num_threads: int) -> None:
        from llguidance import LLExecutor

        # Each a thread that makes the masks of a list, one after the other.
        self._executors = [LLExecutor(num_threads=1) for _ in range(num_threads - 1)]
        self._pool = ThreadPoolExecutor(num_threads - 1, "nanovllm-masks") if num_threads > 1 else None

    def fill(self, matchers: Sequence[tuple[int, Any]], bits: np.ndarray) -> None:
        """Make a mask for each matcher.

        Args:
            matchers: the library's, each with the number of its compilation.
            bits: `[matchers, words]` int32, contiguous: a bit for each token, 1 if it may come next.
        """
        address, num_bytes = bits.ctypes.data, bits.strides[0]
        order = sorted(range(len(matchers)), key=lambda i: matchers[i][0])
        futures, is_shared, num_done, began = [], self._pool is None, 0, perf_counter()
        while num_done < len(order):
            i = order[num_done]
            matchers[i][1].unsafe_compute_mask_ptr(address + i * num_bytes, num_bytes)
            num_done += 1
            if not is_shared and (elapsed := perf_counter() - began) > ALONE_S:
                is_shared = True
                left = order[num_done:]
                order[num_done:], *others = self._shares(left, matchers, elapsed / num_done * len(left))
                for executor, share in zip(self._executors, others, strict=False):
                    given = ([(matchers[i][1], i) for i in share], address, num_bytes, len(bits))
                    futures.append(self._pool.submit(executor.unsafe_compute_mask_ptr, *given))
        for future in futures:
            future.result()

    def _shares(self, left: list[int], matchers: Sequence[tuple[int, Any]], left_s: float) -> list[list[int]]:
        """Cut `left`, which is in order of compilations, for as many threads as its cost is worth.

        No share cuts a compilation.
        """
        num_threads = max(1, min(len(self._executors) + 1, int(left_s / LEAST_SHARE_S)))
        size, shares = -(-len(left) // num_threads), [[]]
        for place, i in enumerate(left):
            is_new = place > 0 and matchers[i][0] != matchers[left[place - 1]][0]
            if is_new and len(shares[-1]) >= size:
                shares.append([])
            shares[-1].append(i)
        return shares
