"""Promises of the log-probabilities; on the CPU, and the same on a GPU."""

import math

import pytest
import torch

from nanovllm.kernels.sampling.logprobs import summarize_reference, summarize_triton, token_logprobs, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_top", [0, 1, 7, 311])
def test_logprobs_are_those_of_a_float64_softmax(num_top: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(num_top)
    logits = (torch.randn(6, 314, generator=generator) * 5).to(dtype)[:, :311]
    chosen = torch.tensor([0, 310, 5, 5, 100, 200], dtype=torch.int32)
    expected = logits.double().log_softmax(1)
    found = unpack(token_logprobs(logits.to(device), chosen.to(device), num_top).cpu())
    assert len(found) == 6
    for i, (ids, logprobs, ranks) in enumerate(found):
        assert len(ids) == len(logprobs) == len(ranks) == 1 + num_top
        assert ids[0] == chosen[i]
        torch.testing.assert_close(torch.tensor(logprobs).double(), expected[i, ids], rtol=1e-6, atol=4e-6)
        assert ranks[0] == 1 + int((expected[i] > expected[i, ids[0]]).sum())
        assert ranks[1:] == list(range(1, num_top + 1))
        best = expected[i].sort(descending=True).values[:num_top]
        assert torch.equal(expected[i, ids[1:]], best) and len(set(ids[1:])) == num_top


def test_equally_likely_tokens_share_the_better_rank(device: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]], device=device).expand(4, -1)
    ranks = [r[0] for _, _, r in unpack(token_logprobs(logits, torch.arange(4, device=device), 2).cpu())]
    assert ranks == [4, 1, 1, 3]


def test_logits_of_any_size_do_not_overflow(device: str) -> None:
    logits = torch.tensor([[3e38, -3e38, 3e38, -math.inf]], device=device)
    (_, logprobs, ranks), *_ = unpack(token_logprobs(logits, torch.tensor([2], device=device), 4).cpu())
    assert logprobs[0] == pytest.approx(-math.log(2)) and ranks[0] == 1
    assert logprobs[-2:] == [-math.inf] * 2


def test_no_entries(device: str) -> None:
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    assert unpack(token_logprobs(torch.zeros(0, 50, device=device), empty, 3).cpu()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [3, 311, 20_000])
def test_kernel_equals_its_reference(vocab_size: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    wide = (torch.randn(5, vocab_size + 3, generator=generator) * 5).to(dtype)
    wide[1] += 100  # far from 0
    wide[2, 1:] = -math.inf  # one token is left
    wide[3] = 1.0
    logits, chosen = wide[:, :vocab_size].to(device), torch.tensor([2, 1, 0, 1, vocab_size - 1], device=device)
    for found, expected in zip(summarize_triton(logits, chosen), summarize_reference(logits, chosen), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


def test_logits_that_are_nan_stay_so(device: str) -> None:
    logits = torch.full((1, 300), float("nan"), device=device)
    for largest, log_mass, _ in (summarize_triton(logits, torch.tensor([1], device=device)),):
        assert not (largest + log_mass).isfinite().any()
