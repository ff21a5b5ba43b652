"""Promises of the masks of tokens; on the CPU, and the same on a GPU."""

import math

import numpy as np
import pytest
import torch

from nanovllm.kernels.sampling.tensors import TokenBits
from nanovllm.kernels.sampling.token_masks import mask_reference, mask_tokens, mask_triton


def draw_masks(num: int, vocab_size: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Which tokens are allowed, `[num, vocab]`, and the same as bits, with whole words of padding behind."""
    is_allowed = torch.rand(num, vocab_size, generator=torch.Generator().manual_seed(seed)) < 0.5
    padded = np.ones((num, -(-vocab_size // 32) * 32 + 64), dtype=np.uint8)
    padded[:, :vocab_size] = is_allowed.numpy()
    return is_allowed, np.packbits(padded, axis=1, bitorder="little").view(np.int32)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 6144, 10_007])
def test_forbidden_tokens_are_minus_infinity_and_all_else_stays(vocab_size: int, device: str) -> None:
    is_allowed, bits = draw_masks(2, vocab_size, seed=vocab_size)
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(1))
    expected = logits.clone()
    expected[0][~is_allowed[0]] = -math.inf
    expected[2][~is_allowed[1]] = -math.inf
    found = logits.to(device)
    mask_tokens(found, TokenBits(torch.tensor([0, 2], device=device), torch.from_numpy(bits).to(device)))
    assert torch.equal(found.cpu(), expected)


def test_without_a_mask_nothing_changes(device: str) -> None:
    logits = torch.randn(3, 40, device=device)
    before = logits.clone()
    none = torch.zeros(0, dtype=torch.int64, device=device)
    mask_tokens(logits, TokenBits(none, torch.zeros(0, 2, dtype=torch.int32, device=device)))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab_size", [33, 5000])
def test_kernel_equals_its_reference(vocab_size: int, device: str) -> None:
    _, bits = draw_masks(3, vocab_size, seed=0)
    logits = torch.randn(5, vocab_size + 3)[:, :vocab_size]
    entries = torch.tensor([4, 0, 2])
    expected = logits.clone()
    mask_reference(expected, entries, torch.from_numpy(bits))
    found = logits.to(device)
    mask_triton(found, entries.to(device), torch.from_numpy(bits).to(device))
    assert torch.equal(found.cpu(), expected) and torch.isinf(expected).any()
