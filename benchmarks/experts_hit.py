"""Counts the experts that a decode step of few or many sequences hits, on average over layers and steps.

The roofline of a mixture of experts counts their bytes. Tokens that choose alike hit fewer experts than tokens that
choose at random, so the number is counted in the model that is timed, on steps without CUDA graphs.
"""

from collections import defaultdict

import torch

from benchmarks.engines import BenchmarkedEngine
from benchmarks.workloads import LengthMix, draw
from nanovllm.layers import moe

BATCHES = (1, 8, 32, 128, 256)  # numbers of sequences for which there are graphs, so none is padded
STEPS = 8


def count_experts_hit(engine: BenchmarkedEngine, vocab_size: int, temperature: float) -> tuple[tuple[int, float], ...]:
    """(sequences, mean number of experts hit in a layer) for each of BATCHES; () for a model without experts."""
    runner = engine.llm.engine.runner
    if not any(isinstance(module, moe.Experts) for module in runner.model.modules()):
        return ()
    counts: dict[int, list[torch.Tensor]] = defaultdict(list)
    route, graphs = moe.route, runner.graphs

    def count(scores: torch.Tensor, k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = route(scores, k, renormalize)
        hit = torch.zeros(scores.shape[1], dtype=torch.bool, device=ids.device)
        counts[len(scores)].append(hit.index_fill_(0, ids.flatten().long(), True).sum())
        return weights, ids

    moe.route, runner.graphs = count, None
    try:
        for batch in (batch for batch in BATCHES if batch <= runner.num_rows):
            mix = LengthMix(num_seqs=batch, min_input=64, max_input=64, min_output=STEPS + 1, max_output=STEPS + 1)
            engine.generate(draw(f"{batch} sequences", mix, vocab_size, temperature, seed=batch))
    finally:
        moe.route, runner.graphs = route, graphs
    engine.reset()
    return tuple((batch, float(torch.stack(counts[batch]).float().mean())) for batch in BATCHES if counts[batch])
