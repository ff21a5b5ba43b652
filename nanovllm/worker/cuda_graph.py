"""A step as one launch: everything from reading the rows to writing the sampled tokens back, recorded once.

A step of a small model is a few hundred kernels of a few microseconds each; launched one by one they leave the
device waiting for the host. A graph's shapes are fixed, so there is one for each of a few of them, and a step is padded
to the next: padding entries (row -1) read and write no sequence's memory. Without graphs steps are padded all the same,
since libraries choose a matrix product's kernel, and with it the rounding, by its shape: so a sequence gets the same
tokens either way. A step with many prompts keeps the device busy for longer than the host takes to launch it, and has
no graph.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from nanovllm.step_plan import StepPlan

MAX_CHUNKS = 16  # entries for chunks in a graph, one of them for padding
CHUNK_TOKENS = (256, 512, 768, 1024, 1536, 2048, 3072, 4096)  # padded by less than a third, or by less than 256
MIXED_DECODES = (16, 64, 128, 256)  # decodes beside chunks, whose padding costs little there


@dataclass(slots=True, frozen=True)
class StepShape:
    """For what a step is launched: entries of one token, then chunks and their tokens, all with padding."""

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
    """The shapes to which steps are padded. With graphs there is one for each of them.

    Attributes:
        decodes: sizes of a step without chunks. mixed_decodes: of the decodes in one with chunks.
        chunk_tokens: sizes of the chunks together.
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
        """Every shape that `pad` may give: those of decodes alone, then those with chunks, the smallest first."""
        return [*map(StepShape, self.decodes), *self.with_chunks()]

    def with_chunks(self) -> list[StepShape]:
        """The smallest first."""
        return [StepShape(n, MAX_CHUNKS, tokens) for tokens in self.chunk_tokens for n in self.mixed_decodes]

    def pad(self, plan: StepPlan, has_extras: bool = False) -> StepShape | None:
        """The shape to which the step is padded, which has a graph where there are graphs. None: run it as it is.

        A step that runs as it is may happen to have the shape of a graph, which must not be replayed for it: in a graph
        every entry samples, also that of a prompt which is cut short, and a graph with chunks keeps no hidden states,
        which extras (edits of logits, log-probabilities) need.
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
    """The sizes worth a graph: a batch is padded by less than 16, or by less than an eighth."""
    sizes = {1, 2, 4, 8, *range(16, 257, 16), *range(288, largest, 32), largest}
    return sorted(size for size in sizes if size <= largest)


def _at_least(number: int, sizes: list[int]) -> int:
    return sizes[bisect.bisect_left(sizes, number)]


@lru_cache
def _capture_stream() -> torch.cuda.Stream:
    """One for the process: PyTorch keeps a workspace of 32 MiB for every stream that has multiplied matrices."""
    return torch.cuda.Stream()


class StepGraphs:
    """Graphs of `run(shape)`, one for each shape, in one memory pool: they never run side by side."""

    def __init__(self) -> None:
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}

    def capture(self, run: Callable[[StepShape], object], shapes: list[StepShape]) -> None:
        """Record `run` at each shape, the largest first, which are the last: the smaller ones fit in its memory."""
        pool = torch.cuda.graph_pool_handle()
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for shape in reversed(shapes):
                run(shape)  # kernels are compiled and libraries make their handles outside the capture
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
