"""Routing: the k experts with the largest scores of each token, and their weights, a softmax.

The softmax goes over the chosen scores, or over all of them. The first is the same as a softmax over all whose chosen
part is divided by its sum, so one kernel serves Mixtral and gpt-oss, and Qwen3-MoE and OLMoE either way. A token reads
`experts * itemsize` bytes and writes 8 k; it takes k passes over registers: some microseconds whatever the number of
tokens, where torch.topk and its neighbours are five launches or more.

Ties go to the lower expert. A NaN among a token's scores makes all its weights NaN, and its experts stay valid ones.
"""

import torch

from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import tl, triton


def route(scores: torch.Tensor, k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`scores [tokens, experts]` -> (weights `[tokens, k]` in float32, experts `[tokens, k]` in int32).

    With `renormalize` a token's weights sum to 1; without, they are its shares of the softmax over all experts.
    """
    return route_triton(scores, k, renormalize) if scores.is_cuda else route_reference(scores, k, renormalize)


def route_reference(scores: torch.Tensor, k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` in PyTorch; it serves a CPU too."""
    top, experts = scores.float().topk(k, dim=-1)
    if renormalize:
        return torch.softmax(top, dim=-1), experts.int()
    return torch.softmax(scores, dim=-1, dtype=torch.float32).gather(-1, experts), experts.int()


def route_triton(scores: torch.Tensor, k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` in one launch, a program for each token. Rows of `scores` may be strided."""
    num_tokens, num_experts = scores.shape
    if not 0 < k <= num_experts:
        raise ValueError(f"{k=} must be in [1, {num_experts}], the number of experts")
    weights = torch.empty((num_tokens, k), dtype=torch.float32, device=scores.device)
    experts = torch.empty((num_tokens, k), dtype=torch.int32, device=scores.device)
    if num_tokens:
        _route_kernel[(num_tokens,)](
            scores, weights, experts, scores.stride(0), EXPERTS=num_experts, K=k,
            TILE=triton.next_power_of_2(num_experts), CHOSEN=triton.next_power_of_2(k), RENORMALIZE=renormalize,
            num_warps=1, **early_launch(scores),
        )  # fmt: skip
    return weights, experts


@triton.jit
def _route_kernel(
    scores_ptr,
    weights_ptr,
    experts_ptr,
    scores_stride,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    CHOSEN: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, TILE)
    place = tl.arange(0, CHOSEN)
    wait_for_previous(EARLY)
    score = tl.load(scores_ptr + token * scores_stride + expert, mask=expert < EXPERTS, other=float("-inf"))
    score = score.to(tl.float32)
    # What orders the experts: a NaN first, as torch.topk has it; -inf before the tile's padding and what was taken.
    LOWEST: tl.constexpr = -3.4028234e38
    key = tl.where(score != score, float("inf"), tl.maximum(score, LOWEST))
    key = tl.where(expert < EXPERTS, key, float("-inf"))
    top = tl.max(key, axis=0)
    top = tl.where(top > LOWEST, top, float("-inf"))
    power = tl.exp(score - top)  # NaN where the score is NaN; and if `top` is infinite, as in any softmax
    weights = tl.zeros([CHOSEN], tl.float32)
    experts = tl.zeros([CHOSEN], tl.int32)
    for i in tl.static_range(K):
        best = tl.argmax(key, axis=0)
        weights = tl.where(place == i, tl.sum(tl.where(expert == best, power, 0.0), axis=0), weights)
        experts = tl.where(place == i, best, experts)
        key = tl.where(expert == best, float("-inf"), key)
    total = tl.sum(weights, axis=0) if RENORMALIZE else tl.sum(power, axis=0)
    inside = place < K
    tl.store(weights_ptr + token * K + place, weights / total, mask=inside)
    tl.store(experts_ptr + token * K + place, experts, mask=inside)
