"""How few shapes are enough for every step, and how many launches does one graph save?

The shapes are those that the engine captures on a GPU with 256 rows and 16,384 tokens in a step. Then the real engine
runs a decode step of the demo model on this CPU, and PyTorch's operations are counted. Expect: a few dozen graphs; at
most an eighth of padding from 16 sequences on; and, on a CPU without graphs, hundreds of small operations a step.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import LLM, SamplingParams, demo_model
from nanovllm.step_plan import StepPlan
from nanovllm.worker.cuda_graph import StepShapes


class Counter(TorchDispatchMode):
    """Counts the operations that PyTorch runs within it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def plan(decodes: int, chunks: list[int], num_samples: int) -> StepPlan:
    """A step of so many decodes and chunks of so many tokens, of which so many entries sample a token."""
    lens = [1] * decodes + chunks
    return StepPlan(rows=list(range(len(lens))), query_lens=lens, num_decodes=decodes, num_samples=num_samples)


def main() -> None:
    torch.set_num_threads(1)  # so small a model is not faster with more
    shapes = StepShapes.for_graphs(num_rows=256, max_num_batched_tokens=16384)
    print(f"graphs: {len(shapes.decodes)} of decodes alone, {len(shapes.with_chunks())} with chunks beside them")
    print(f"77 decodes run as {shapes.pad(plan(77, [], 77)).num_decodes}")
    worst = max((shapes.pad(plan(n, [], n)).num_decodes - n, n) for n in range(1, 257))
    print(f"the most padding: {worst[0]} entries, beside {worst[1]} decodes")
    beside = shapes.pad(plan(77, [300, 120], 79))
    print(f"77 decodes and 420 tokens of two prompts run as {beside.num_decodes} and {beside.num_chunk_tokens}")
    print(f"the same with a prompt cut short: {shapes.pad(plan(77, [300, 120], 78))}, it runs without a graph")

    with LLM(demo_model(), dtype="float32", device="cpu") as llm:
        engine = llm.engine
        engine.add(engine.make_sequence([1, 2, 3, 4], SamplingParams(max_tokens=8, ignore_eos=True)))
        engine.step()  # the prompt
        with Counter() as counter:
            engine.step()
        layers = len(engine.runner.attention_layers)
        while engine.num_unfinished:
            engine.step()
    print(f"a decode step is hundreds of operations: {counter.count > 200}")
    print(f"here: {counter.count} operations in {layers} layers")


if __name__ == "__main__":
    main()
