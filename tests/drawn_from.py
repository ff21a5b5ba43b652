"""Whether drawn tokens, or any outcomes, have the distribution that they should have."""

from typing import Any

import torch


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
