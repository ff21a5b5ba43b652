"""The experts' products by a loop over the experts that were hit: what a CPU runs, and the kernels' oracle.

A CPU reads each weight that was hit once, whatever the number of its tokens, so the loop's own cost, some 20
microseconds an expert, hides behind its megabytes.
"""

from collections.abc import Callable

import torch

Product = Callable[[int, torch.Tensor], torch.Tensor]


def loop_over_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    num_local: int,
    first: int,
    hidden: Product,
    down: Product,
) -> torch.Tensor:
    """The weighted sum of each token's experts `[tokens, out]`, added up in float32 and rounded to the dtype of x.

    Args:
        x: `[tokens, hidden_size]`.
        weights, experts: `[tokens, k]`, from `route`.
        num_local: experts `first` to `first + num_local - 1` are here; the others add nothing.
        hidden: (an expert here, counted from 0; its rows of x) -> the rows after gate and up.
        down: (the same expert, those rows) -> the rows of the result, before their weights.
    """
    num_tokens, k = experts.shape
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    local = experts.flatten().long() - first
    # One bin more for the experts of other ranks, at the end.
    local = torch.where((local < 0) | (local >= num_local), num_local, local)
    order = local.argsort(stable=True)
    counts = torch.bincount(local, minlength=num_local + 1).tolist()
    flat_weights = weights.flatten()
    start = 0
    for expert, count in enumerate(counts[:num_local]):
        if count:
            pairs = order[start : start + count]
            rows = x if num_tokens == 1 else x[pairs // k]
            result = down(expert, hidden(expert, rows))
            out.index_add_(0, pairs // k, result.float() * flat_weights[pairs, None])
            start += count
    return out.to(x.dtype)
