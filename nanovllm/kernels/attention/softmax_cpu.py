"""The softmax of attention scores in PyTorch, with a soft cap and sinks: for the references, and, in place, for a CPU.

score = soft_cap * tanh(score / soft_cap)          weight = exp(score) / (exp(sink) + sum of exp(scores))
"""

import torch


def softmax_reference(
    scores: torch.Tensor,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights of `scores [kv_heads, ..., tokens]` in float32, of which `hidden` ones are no part.

    `sinks [heads]`: a score of each head beside those of its tokens, which gets a weight and has no value.
    """
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    of_heads = sinks.float().view(scores.shape[0], -1, *[1] * (scores.dim() - 2))  # [kv_heads, group, 1, ...]
    with_sink = torch.cat([scores, of_heads.expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.softmax(with_sink, dim=-1)[..., :-1]


def cap_(scores: torch.Tensor, scale: float, soft_cap: float | None) -> torch.Tensor:
    """`scores * scale` with the soft cap, in place, of float32 products of queries and keys."""
    return scores.mul_(scale) if soft_cap is None else scores.mul_(scale / soft_cap).tanh_().mul_(soft_cap)


def softmax_with_sinks_(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """The weights of float32 `scores [..., tokens]`, which are overwritten; `sinks [..., 1]`."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    largest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    weights = scores.sub_(largest).exp_()
    return weights.div_(weights.sum(-1, keepdim=True).add_((sinks - largest).exp_()))
