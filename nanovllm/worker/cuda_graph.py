"""CUDA graphs launch a whole step at once: the runner records the kernels of a step, then replays the recording.

A step of a small model is a few hundred kernels of a few microseconds each. If the host launches them one by one, the
device waits for the host. A graph has fixed shapes, so the runner captures one for each of a few step shapes and pads
a step up to the next of them: padding entries (row -1) read and write no sequence's memory. The runner pads steps even
without graphs, because libraries choose a matrix product's kernel, and with it the rounding, by its shape: so a
sequence gets the same tokens either way. A step with many prompts has no graph: it keeps the device busy for longer
than the host takes to launch it.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from nanovllm.step_plan import StepPlan

MAX_CHUNKS = 16  # entries for chunks in a graph; one of them is a padding entry
CHUNK_TOKENS = (256, 512, 768, 1024, 1536, 2048, 3072, 4096)  # padding is less than a third, or less than 256
MIXED_DECODES = (16, 64, 128, 256)  # decodes beside chunks: their padding costs little there


@dataclass(slots=True, frozen=True)
class StepShape:
    """The size of a step, padding included: entries of one token (decodes), then chunks and all their tokens."""

    num_decodes: int
    num_chunks: int = 0
    num_chunk_tokens: int = 0

    @classmethod
    def of(cls, plan: StepPlan) -> "StepShape":
        """A plan's own shape, without padding."""
        return cls(plan.num_decodes, len(plan.rows) - plan.num_decodes, plan.num_tokens - plan.num_decodes)

    @property
    def num_seqs(self) -> int:
        return self.num_decodes + self.num_chunks

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_chunk_tokens


@dataclass(slots=True, frozen=True)
class StepShapes:
    """The shapes to which the runner pads steps; if it uses graphs, it captures one for each shape.

    Attributes:
        decodes: numbers of decodes in a step without chunks.
        mixed_decodes: numbers of decodes in a step with chunks.
        chunk_tokens: numbers of tokens of all chunks of a step together.
    """

    decodes: list[int]
    mixed_decodes: list[int] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)

    @classmethod
    def for_graphs(cls, num_rows: int, max_num_batched_tokens: int) -> "StepShapes":
        mixed = {min(size, num_rows) for size in (*MIXED_DECODES, *range(512, num_rows, 256), num_rows)}
        return cls(
            batch_sizes(num_rows), sorted(mixed), [size for size in CHUNK_TOKENS if size <= max_num_batched_tokens]
        )

    def all(self) -> list[StepShape]:
        """Every shape that `pad` may return: first those of decodes alone, then those with chunks, smallest first."""
        return [*map(StepShape, self.decodes), *self.with_chunks()]

    def with_chunks(self) -> list[StepShape]:
        """The shapes with chunks, smallest first."""
        return [StepShape(n, MAX_CHUNKS, tokens) for tokens in self.chunk_tokens for n in self.mixed_decodes]

    def pad(self, plan: StepPlan, has_extras: bool = False) -> StepShape | None:
        """The shape to pad the step to, which has a graph if the runner uses graphs. None: run the step unpadded.

        An unpadded step may happen to have the shape of a graph. The runner must not replay the graph for it: in a
        graph every entry samples, even a chunk that does not reach its prompt's end; and a graph with chunks keeps no
        hidden states, which extras (edited logits, log-probabilities) need.
        """
        num_chunks = len(plan.rows) - plan.num_decodes
        if not num_chunks:
            return StepShape(_at_least(plan.num_decodes, self.decodes))
        num_chunk_tokens = plan.num_tokens - plan.num_decodes
        is_small = num_chunks < MAX_CHUNKS and num_chunk_tokens <= max(self.chunk_tokens, default=0)
        if has_extras or not is_small or plan.num_samples < len(plan.rows):
            return None
        num_decodes = _at_least(plan.num_decodes, self.mixed_decodes)
        return StepShape(num_decodes, MAX_CHUNKS, _at_least(num_chunk_tokens, self.chunk_tokens))


def batch_sizes(largest: int) -> list[int]:
    """The numbers of decodes worth a graph: padding is less than 16 entries, or less than an eighth."""
    sizes = {1, 2, 4, 8, *range(16, 257, 16), *range(288, largest, 32), largest}
    return sorted(size for size in sizes if size <= largest)


def _at_least(number: int, sizes: list[int]) -> int:
    return sizes[bisect.bisect_left(sizes, number)]


@lru_cache
def _capture_stream() -> torch.cuda.Stream:
    """One stream a process: PyTorch keeps a workspace of 32 MiB for every stream that has multiplied matrices."""
    return torch.cuda.Stream()


class StepGraphs:
    """Graphs of `run(shape)`, one for each shape. They share one memory pool, since no two ever run at once."""

    def __init__(self) -> None:
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}

    def capture(self, run: Callable[[StepShape], object], shapes: list[StepShape]) -> None:
        """Record `run` at each of `shapes`, which come smallest first.

        The largest is recorded first, so that the smaller ones reuse its memory.
        """
        pool = torch.cuda.graph_pool_handle()
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for shape in reversed(shapes):
                run(shape)  # a capture must not compile kernels or create library handles: do both here
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    run(shape)
                finally:
                    graph.capture_end()
                self._graphs[shape] = graph
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self, shape: StepShape) -> None:
        self._graphs[shape].replay()
