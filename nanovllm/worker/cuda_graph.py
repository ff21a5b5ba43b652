"""A decode step as one launch: everything from reading the rows to writing the sampled tokens back, recorded once.

A step of a small model is a few hundred kernels of a few microseconds each; launched one by one they leave the
device waiting for the host. A graph's shapes are fixed, so there is one for each of a few batch sizes, and a batch
is padded to the next: padding entries (row -1) read and write no sequence's memory. Without graphs batches are padded
all the same, since libraries choose a matrix product's kernel, and with it the rounding, by its shape: so a sequence
gets the same tokens either way.
"""

import bisect
from collections.abc import Callable
from functools import lru_cache

import torch


def batch_sizes(largest: int) -> list[int]:
    """The sizes worth a graph: a batch is padded by less than 16, or by less than an eighth."""
    sizes = {1, 2, 4, 8, *range(16, 257, 16), *range(288, largest, 32), largest}
    return sorted(size for size in sizes if size <= largest)


def padded_size(num_seqs: int, sizes: list[int]) -> int:
    """The smallest of `sizes` that holds so many sequences."""
    return sizes[bisect.bisect_left(sizes, num_seqs)]


@lru_cache
def _capture_stream() -> torch.cuda.Stream:
    """One for the process: PyTorch keeps a workspace of 32 MiB for every stream that has multiplied matrices."""
    return torch.cuda.Stream()


class DecodeGraphs:
    """Graphs of `run(size)`, one for each batch size, in one memory pool: they never run side by side."""

    def __init__(self) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self, run: Callable[[int], None], sizes: list[int]) -> None:
        """Record `run` at each size, the largest first: the smaller ones fit in its memory."""
        pool = torch.cuda.graph_pool_handle()
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for size in reversed(sizes):
                run(size)  # kernels are compiled and libraries make their handles outside the capture
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    run(size)
                finally:
                    graph.capture_end()
                self._graphs[size] = graph
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self, size: int) -> None:
        self._graphs[size].replay()
