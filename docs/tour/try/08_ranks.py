"""Where exactly is the all-reduce, and how many are there in a step?

First the engine's own layers, as two ranks have them, in one process: an MLP whose first matrix is cut by columns and
whose second is cut by rows. Then the real engine over two processes on this CPU, where rank 0 counts its collectives.
Expect: nothing is exchanged between the two matrices; the two partial sums add up to the whole; and a decode step has
two all-reduces a layer, one more in the embedding, and one all-gather for the logits.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from nanovllm import LLM, SamplingParams, demo_model
from nanovllm.distributed.groups import GlooGroup
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear

HIDDEN, INNER, TOKENS = 64, 192, 3


def mlp(tp: TensorParallel, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What this rank has of the MLP's output, before any rank has talked."""
    first = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], tp)
    second = RowParallelLinear(INNER, HIDDEN, tp)
    for i, weight in enumerate((gate, up)):
        first.load_shard(first.weight, weight, i)
    second.load_shard(second.weight, down, None)
    return second(first.gate_mul(x)).partial


def generate(num_ranks: int) -> tuple[list[int], Counter[str], int]:
    """(tokens, rank 0's collectives in the last decode step, bytes that one all-reduce of it sums)."""
    counts, sizes = Counter(), []

    def counted(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def collective(self: GlooGroup, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            counts[name] += 1
            sizes.append(x.numel() * x.itemsize)
            call(self, x, *args, **kwargs)

        return collective

    names = ("all_reduce", "all_gather")
    with LLM(demo_model(), dtype="float32", device="cpu", tensor_parallel_size=num_ranks) as llm:
        engine = llm.engine
        seq = engine.make_sequence([5, 6, 7], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
        engine.add(seq)
        with patch.multiple(GlooGroup, **{name: counted(name, getattr(GlooGroup, name)) for name in names}):
            while engine.num_unfinished:
                counts.clear()
                sizes.clear()
                engine.step()
    return seq.output_token_ids, counts, min(sizes, default=0)


def main() -> None:
    torch.set_num_threads(1)  # so small a model is not faster with more
    torch.manual_seed(0)
    weights = [torch.randn(INNER, HIDDEN) / 8, torch.randn(INNER, HIDDEN) / 8, torch.randn(HIDDEN, INNER) / 14]
    x = torch.randn(TOKENS, HIDDEN)
    partials = [mlp(TensorParallel(rank, 2), *weights, x) for rank in range(2)]
    whole = mlp(TensorParallel(), *weights, x)
    print(f"one rank's partial sum is the whole: {torch.allclose(partials[0], whole, atol=1e-5)}")
    print(f"both together are: {torch.allclose(partials[0] + partials[1], whole, atol=1e-5)}")

    tokens, _, _ = generate(1)
    same, counts, num_bytes = generate(2)
    print(f"a decode step of 8 layers: {counts['all_reduce']} all-reduces of {num_bytes:,} bytes")
    print(f"and {counts['all_gather']} all-gather, of the logits; tokens as on one rank: {same == tokens}")


if __name__ == "__main__":
    main()
