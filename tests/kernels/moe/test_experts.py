"""Promises of the experts' products, kept by the kernels (interpreted on a CPU): the loop's results, rounded once."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels.moe import experts as kernels
from nanovllm.kernels.moe.experts import ExpertWeights
from nanovllm.kernels.moe.sum_choices import sum_choices_reference, sum_choices_triton
from nanovllm.kernels.moe.tilings import Tiling, choose_tilings

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TILINGS = {
    "turned": (Tiling(16, 32, 64, 2), Tiling(16, 16, 32, 2)),
    "plain": (Tiling(64, 16, 32, 2, 4, 3), Tiling(64, 32, 64, 2, 4, 8)),
    "copied": (Tiling(32, 16, 64, 2, 4, 2, True), Tiling(32, 32, 64, 2, 4, 2, True)),
}


class Case(NamedTuple):
    tokens: int
    hidden: int
    size: int
    experts: int
    k: int


CASES = [
    (Case(1, 64, 32, 8, 2), "turned", False, torch.bfloat16),
    (Case(1, 72, 40, 5, 2), "plain", True, torch.float16),
    (Case(7, 72, 40, 6, 3), "turned", False, torch.float16),
    (Case(7, 72, 40, 6, 3), "turned", True, torch.float32),
    (Case(6, 64, 56, 20, 4), "copied", False, torch.bfloat16),
    (Case(12, 40, 24, 4, 2), "copied", True, torch.float16),
    (Case(20, 100, 36, 3, 2), "turned", True, torch.bfloat16),
    (Case(20, 100, 36, 3, 2), "plain", False, torch.float32),
    (Case(21, 100, 36, 3, 2), "plain", True, torch.bfloat16),
]


def draw(case: Case, dtype: torch.dtype, device: str, has_bias: bool = False, activation: str = "silu"):
    """(x as columns of a wider tensor, routing weights, experts of each token, the experts)."""
    generator = torch.Generator().manual_seed(sum(case))

    def random(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    wide = random(case.tokens, case.hidden + 16, scale=1.0)
    gate_up = random(case.experts, 2 * case.size, case.hidden, scale=3 * case.hidden**-0.5)
    down = random(case.experts, case.hidden, case.size, scale=case.size**-0.5)
    biases = (random(case.experts, 2 * case.size, scale=2.0), random(case.experts, case.hidden, scale=1.0))
    weights, ids = torch.rand(case.tokens, case.experts, generator=generator).topk(case.k, dim=-1)
    experts = ExpertWeights(gate_up, down, *(biases if has_bias else (None, None)), activation, 0, case.experts)
    return wide[:, 8 : 8 + case.hidden], weights.to(device), ids.int().to(device), experts


def exact(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: ExpertWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum in float64, but for the hidden features, which are rounded; and the sum of its terms' magnitudes."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    magnitude = torch.zeros_like(out)
    for token, choice in torch.cartesian_prod(*(torch.arange(n) for n in ids.shape)).tolist():
        expert = int(ids[token, choice]) - experts.first
        if not 0 <= expert < len(experts.gate_up):
            continue
        bias = None if experts.gate_up_bias is None else experts.gate_up_bias[expert].double()
        gate, up = F.linear(x[token].double(), experts.gate_up[expert].double(), bias).chunk(2)
        if experts.activation == "clamped":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        else:
            hidden = F.silu(gate) * up
        hidden, down = hidden.to(x.dtype).double(), experts.down[expert].double()
        bias = torch.zeros_like(x[0]) if experts.down_bias is None else experts.down_bias[expert]
        weight = weights[token, choice].double()
        out[token] += F.linear(hidden, down, bias.double()) * weight
        magnitude[token] += F.linear(hidden.abs(), down.abs(), bias.double().abs()) * weight
    return out, magnitude


def assert_near(out: torch.Tensor, want: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> None:
    """Hidden features may round the other way, each expert's row is rounded, and so is the sum."""
    error, allowed = (out.double() - want[0]).abs(), (torch.finfo(dtype).eps + 1e-5) * want[1]
    if dtype == torch.float16:
        allowed += 2.0**-24  # the spacing of its subnormals
    assert bool((error <= allowed).all()), f"error is {(error / allowed).max():.3g} of what is allowed"


@pytest.mark.parametrize(("case", "tilings", "is_sorted", "dtype"), CASES)
def test_the_sum_of_the_experts_is_exact_up_to_rounding(
    case: Case, tilings: str, is_sorted: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "UNSORTED_PAIRS", 0 if is_sorted else 1 << 20)
    has_bias, activation = (True, "clamped") if case.tokens % 2 else (False, "silu")
    drawn = draw(case, dtype, device, has_bias, activation)
    want = exact(*drawn)
    out = kernels.sum_experts_triton(*drawn, tilings=TILINGS[tilings])
    assert out.dtype == dtype and out.shape == want[0].shape
    assert_near(out, want, dtype)
    slices = kernels.sum_experts_triton(*drawn, in_slices=True, tilings=TILINGS[tilings])
    assert slices.dtype == torch.float32 and slices.shape == (case.k, *want[0].shape)
    assert_near(slices.sum(dim=0).to(dtype), want, dtype)


@pytest.mark.parametrize("unsorted_pairs", [1 << 20, 0], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("hit", ["one expert by all", "one expert twice by a token", "the last alone"])
def test_uneven_loads(hit: str, unsorted_pairs: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pairs of an expert than a tile has rows, and experts without any."""
    monkeypatch.setattr(kernels, "UNSORTED_PAIRS", unsorted_pairs)
    x, weights, ids, experts = draw(Case(37, 32, 16, 9, 2), torch.float32, device)
    if hit == "one expert by all":
        ids[:, 0], ids[:, 1] = 4, torch.arange(37) % 4
    elif hit == "one expert twice by a token":
        ids[:] = 3
    else:
        ids = torch.full_like(ids[:, :1], 8)
        weights = weights[:, :1].contiguous()
    assert_near(kernels.sum_experts_triton(x, weights, ids, experts), exact(x, weights, ids, experts), torch.float32)


@pytest.mark.parametrize("unsorted_pairs", [1 << 20, 0], ids=["unsorted", "sorted"])
def test_experts_of_other_ranks_add_nothing(unsorted_pairs: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "UNSORTED_PAIRS", unsorted_pairs)
    x, weights, ids, experts = draw(Case(11, 32, 32, 10, 3), torch.float32, device, has_bias=True)
    total = torch.zeros_like(x)
    for first, last in ((0, 4), (4, 9), (9, 10), (10, 10)):
        own = replace(
            experts,
            gate_up=experts.gate_up[first:last],
            down=experts.down[first:last],
            gate_up_bias=experts.gate_up_bias[first:last],
            down_bias=experts.down_bias[first:last],
            first=first,
        )
        out = kernels.sum_experts_triton(x, weights, ids, own, in_slices=True)
        assert out.dim() == 2
        assert_near(out, exact(x, weights, ids, own), torch.float32)
        total += out
    assert_near(total, exact(x, weights, ids, experts), torch.float32)


@pytest.mark.parametrize("unsorted_pairs", [1 << 20, 0], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("activation", ["silu", "clamped"])
def test_a_token_of_nans_hurts_no_other(
    activation: str, unsorted_pairs: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "UNSORTED_PAIRS", unsorted_pairs)
    x, weights, ids, experts = draw(Case(9, 32, 32, 3, 2), torch.float32, device, True, activation)
    want = kernels.sum_experts_triton(x, weights, ids, experts)
    for bad in (0, 4):  # the first token's rows also serve as padding
        spoiled = x.clone()
        spoiled[bad] = float("nan")
        out = kernels.sum_experts_triton(spoiled, weights, ids, experts)
        assert out[bad].isnan().all()
        others = [token for token in range(9) if token != bad]
        assert torch.equal(out[others], want[others])


def test_no_tokens_are_no_launch(device: str) -> None:
    x, weights, ids, experts = draw(Case(0, 64, 32, 3, 2), torch.float32, device)
    assert kernels.sum_experts_triton(x, weights, ids, experts).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_choices_are_added_up_where_their_expert_is_here(dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 4, 1100, generator=generator).to(device, dtype)
    ids = torch.randint(0, 9, (5, 4), generator=generator).int().to(device)
    rows[(ids < 2) | (ids >= 7)] = float("nan")
    out = sum_choices_triton(rows, ids, 2, 5)
    torch.testing.assert_close(out, sum_choices_reference(rows, ids, 2, 5), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shared_memory", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("num_pairs", [1, 8, 64, 500, 2000, 10_000, 1_000_000])
def test_every_tiling_fits_into_the_shared_memory(num_pairs: int, shared_memory: int) -> None:
    gated, weighted = choose_tilings(num_pairs, 64, 2, shared_memory)
    assert gated.rows == weighted.rows
    for tiling, halves in ((gated, 2), (weighted, 1)):
        stage = 2 * (tiling.rows + halves * tiling.weight_rows) * tiling.columns
        assert tiling.depth >= 1 and tiling.depth * stage <= shared_memory
