"""What sampling should give, written the plain way: dense, in float64, one row at a time."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from nanovllm import SamplingParams


def edited_logits(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    bad_words: tuple[tuple[int, ...], ...] = (),
    stop_ids: Sequence[int] = (),
) -> torch.Tensor:
    """`[vocab]` float64: what temperature and truncation are applied to, in the order that vLLM documents."""
    x = logits.cpu().double().clone()
    if params.allowed_token_ids is not None:
        banned = torch.ones(len(x), dtype=torch.bool)
        banned[list(params.allowed_token_ids)] = False
        x[banned] = -math.inf
    for *start, last in bad_words:
        if output[len(output) - len(start) :] == start and len(start) <= len(output):
            x[last] = -math.inf
    if len(output) < params.min_tokens:
        x[list(stop_ids)] = -math.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(prompt + output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return x


def distribution(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Probabilities `[vocab]` float64, by sorting."""
    p = torch.softmax(logits.detach().cpu().double() / temperature, dim=0)
    p[p < min_p * p.max() * (1 - 1e-9)] = 0
    if top_k > 0:
        p[p < p.sort(descending=True).values[min(top_k, len(p)) - 1]] = 0
    p /= p.sum()
    if top_p < 1:
        in_order = p.sort(descending=True).values
        last = int((in_order.cumsum(0) < top_p).sum())
        p[p < in_order[last]] = 0
    return p / p.sum()


def distribution_asked(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    return distribution(logits, params.temperature, params.top_k, params.top_p, params.min_p)


def assert_drawn_from(drawn: list[Any], p: dict[Any, float] | torch.Tensor, false_alarm: float = 1e-6) -> None:
    """Nothing of probability 0, and Pearson's chi-square no larger than chance makes it once in a million times.

    Outcomes expected less than 5 times are taken together, as is usual.
    """
    probabilities = dict(enumerate(p.tolist())) if isinstance(p, torch.Tensor) else p
    counts = dict.fromkeys(probabilities, 0)
    for outcome in drawn:
        assert probabilities.get(outcome, 0) > 0, f"{outcome} has probability 0"
        counts[outcome] += 1
    bins, rare = [], [0.0, 0.0]
    for outcome, probability in probabilities.items():
        if probability * len(drawn) >= 5:
            bins.append((counts[outcome], probability * len(drawn)))
        else:
            rare = [rare[0] + counts[outcome], rare[1] + probability * len(drawn)]
    if rare[1] >= 5 or not bins:
        bins.append((rare[0], rare[1]))
    if len(bins) == 1:
        return  # nothing to be uncertain of
    chi_square = sum((count - expected) ** 2 / expected for count, expected in bins)
    degrees = torch.tensor((len(bins) - 1) / 2, dtype=torch.float64)
    p_value = float(torch.special.gammaincc(degrees, torch.tensor(chi_square / 2, dtype=torch.float64)))
    assert p_value > false_alarm, (chi_square, len(bins) - 1, p_value)
