"""Promises of the routing, kept by the kernel (interpreted on a CPU) and the reference."""

import pytest
import torch

from nanovllm.kernels.moe import route as kernels

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 8, 2), (5, 128, 8), (3, 32, 4), (2, 7, 7), (4, 1, 1), (0, 8, 2), (2, 512, 16), (3, 60, 5)]
FUNCTIONS = [kernels.route_triton, kernels.route_reference, kernels.route]


def draw(tokens: int, experts: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows without ties, strided. The 8 bits of bfloat16 have too few numbers for the most experts."""
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    numbers = torch.rand(tokens, experts + 3, generator=generator).argsort(dim=-1)
    return (numbers / 16 - 2).to(device, torch.float32 if experts > 250 else dtype)[:, :experts]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_routing_is_a_softmax_and_its_largest(function, shape, dtype, renormalize: bool, device: str) -> None:
    tokens, num_experts, k = shape
    scores = draw(tokens, num_experts, dtype, device)
    weights, experts = function(scores, k, renormalize)
    want, chosen = torch.softmax(scores.double(), dim=-1).topk(k, dim=-1)
    if renormalize:
        want /= want.sum(dim=-1, keepdim=True)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int32
    assert torch.equal(experts, chosen.int())
    torch.testing.assert_close(weights.double(), want, rtol=1e-5, atol=1e-9)


def test_of_equal_scores_the_lower_experts_are_taken(device: str) -> None:
    scores = torch.tensor([[1.0, 3, 3, 0, 3, 1, 1]], device=device)
    weights, experts = kernels.route_triton(scores, 5, True)
    assert experts.tolist() == [[1, 2, 4, 0, 5]]
    torch.testing.assert_close(weights, torch.softmax(scores[:, experts[0].long()], dim=-1))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_no_numbers_choose_valid_experts_and_hurt_no_other_token(
    function, bad: float, renormalize: bool, device: str
) -> None:
    scores = draw(4, 12, torch.float32, device).contiguous()
    want = function(scores, 3, renormalize)
    scores[1, 5] = bad
    scores[2] = bad
    weights, experts = function(scores, 3, renormalize)
    assert ((experts >= 0) & (experts < 12)).all()
    assert all(len(set(row)) == 3 for row in experts.tolist())
    for token in (0, 3):
        assert torch.equal(weights[token], want[0][token]) and torch.equal(experts[token], want[1][token])
    assert weights[2].isnan().all()
    assert bool(weights[1].isnan().any()) == (bad != float("-inf"))
    if bad == float("-inf"):
        assert 5 not in experts[1].tolist()
    elif bad != bad:
        assert weights[1].isnan().all()


def test_experts_without_a_chance_come_last_and_weigh_nothing(device: str) -> None:
    scores = torch.full((1, 9), float("-inf"), device=device)
    scores[0, 4] = -1e30
    weights, experts = kernels.route_triton(scores, 4, True)
    assert experts.tolist() == [[4, 0, 1, 2]] and weights.tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("k", [0, 9])
def test_an_impossible_number_of_experts_is_refused(k: int, device: str) -> None:
    with pytest.raises(ValueError, match=rf"k={k} must be in \[1, 8\]"):
        kernels.route_triton(torch.zeros(2, 8, device=device), k, True)
