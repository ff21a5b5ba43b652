"""The engine's way with CUDA graphs, on a CPU: steps are padded and chosen as on a GPU, and a replay calls what a graph
would have recorded. What a real graph adds to that (addresses, streams) only a GPU can test.
"""

from collections.abc import Callable
from typing import Any

from nanovllm import LLM
from nanovllm.worker.cuda_graph import StepShape, StepShapes


class CalledGraphs:
    """Stands in for `StepGraphs`."""

    def __init__(self) -> None:
        self.num_replays = {"decodes": 0, "chunks": 0}

    def capture(self, run: Callable[[StepShape], object], shapes: list[StepShape]) -> None:
        self._run, self._shapes = run, set(shapes)

    def replay(self, shape: StepShape) -> None:
        assert shape in self._shapes, f"no graph has the shape {shape}"
        self.num_replays["chunks" if shape.num_chunks else "decodes"] += 1
        self._run(shape)


def use_called_graphs(llm: LLM) -> None:
    """Start the engine anew, with these. On a GPU it has graphs of its own."""
    runner: Any = llm.engine.runner
    if runner.is_cuda:
        return
    runner.shapes = StepShapes.for_graphs(runner.num_rows, runner.config.max_num_batched_tokens)
    runner.graph_type = CalledGraphs
    runner.stop()
    runner.start()
