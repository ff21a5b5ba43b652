"""Promises of the noise: the same integers everywhere, uniform, and independent of what lies beside them."""

import math

import pytest
import torch

from nanovllm.kernels.sampling import gumbel_noise as noise
from nanovllm.kernels.triton_shim import tl, triton

SEEDS = [(0, 0), (1, 0), (0, 1), (-1, -1), (123456789, -987654321), (-(2**31), 2**31 - 1)]


@triton.jit
def _store_noise(bits_ptr, gumbel_ptr, seed_lo, seed_hi, position, first, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    key_0, key_1 = noise.noise_keys_kernel(tl.load(seed_lo), tl.load(seed_hi), tl.load(position))
    bits = noise.noise_bits_kernel(first + lane, key_0, key_1)
    tl.store(bits_ptr + lane, bits)
    tl.store(gumbel_ptr + lane, noise.gumbel_kernel(bits))


@triton.jit
def _store_gumbel(bits_ptr, gumbel_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(gumbel_ptr + lane, noise.gumbel_kernel(tl.load(bits_ptr + lane)))


def scalar(value: int, device: str) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32, device=device)


def bits_of(
    seed_lo: int | torch.Tensor, seed_hi: int | torch.Tensor, position: int | torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """noise_bits of int32 tensors and integers that broadcast together."""
    asked = (torch.as_tensor(value, dtype=torch.int32) for value in (seed_lo, seed_hi, position))
    return noise.noise_bits(noise.spread_index(index.int()), *noise.noise_keys(*asked))


def expected_bits(seed_lo: int, seed_hi: int, position: int, index: int) -> int:
    """The definition, in Python's integers."""
    word = 2**32 - 1

    def lowbias32(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D & word
        x = (x ^ x >> 15) * 0x846CA68B & word
        return x ^ x >> 16

    seed_lo, seed_hi, position = seed_lo & word, seed_hi & word, position & word
    key_0 = lowbias32(lowbias32(lowbias32(position ^ 0x243F6A88) ^ seed_hi) ^ seed_lo)
    key_1 = lowbias32(lowbias32(lowbias32(position ^ 0x85A308D3) ^ seed_lo) ^ seed_hi)
    x = index * 0x9E3779B9 & word ^ key_0
    x = (x ^ x >> 16) * 0x7FEB352D & word ^ key_1
    x = (x ^ x >> 15) * 0x846CA68B & word
    return x & 0x7FFFFFFF


def assert_uniform(counts: torch.Tensor) -> None:
    """Chi-square within 5 standard deviations of its mean, on either side."""
    counts = counts.double().flatten()
    mean = counts.sum() / len(counts)
    chi_square = float(((counts - mean) ** 2 / mean).sum())
    degrees = len(counts) - 1
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees), (chi_square, degrees)


def assert_independent(a: torch.Tensor, b: torch.Tensor) -> None:
    """The joint distribution of the leading bits of two streams, and of their difference, is uniform."""
    assert_uniform(torch.bincount((a >> 26) * 32 + (b >> 26), minlength=1024))
    assert_uniform(torch.bincount((a - b & 0x7FFFFFFF) >> 21, minlength=1024))
    assert_uniform(torch.bincount((a ^ b) >> 21, minlength=1024))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("position", [0, 1, 40_000])
def test_kernel_and_pytorch_compute_the_same_integers(seed: tuple[int, int], position: int, device: str):
    size, first = 1024, 151_000
    asked = [scalar(value, device) for value in (*seed, position)]
    bits = torch.full((size,), -1, dtype=torch.int32, device=device)
    values = torch.full((size,), math.nan, device=device)
    _store_noise[(1,)](bits, values, *asked, first, SIZE=size)
    index = torch.arange(first, first + size, dtype=torch.int32, device=device)
    in_pytorch = noise.noise_bits(noise.spread_index(index), *noise.noise_keys(*asked))
    assert torch.equal(bits, in_pytorch)
    assert torch.equal(noise.spread_indices(first + size, index.device)[first:], noise.spread_index(index))
    assert bits[:50].tolist() == [expected_bits(*seed, position, i) for i in range(first, first + 50)]
    torch.testing.assert_close(values, noise.gumbel(bits), rtol=3e-6, atol=3e-6)


def test_gumbel_is_finite_and_exact_from_the_first_bit_pattern_to_the_last(device: str):
    size = 8192
    near_0 = torch.arange(size // 4)
    near_1 = 2**31 - 1 - near_0
    seam = int(2.0**-7 * 2**31) + torch.arange(-size // 8, size // 8)
    spaced = torch.logspace(0, 31, size // 4, base=2, dtype=torch.float64).long().clamp(max=2**31 - 1)
    bits = torch.cat([near_0, near_1, seam, spaced]).int().to(device)
    values = torch.full((size,), math.nan, device=device)
    _store_gumbel[(1,)](bits, values, SIZE=size)
    v = ((bits.cpu().float() + 0.5) * noise.TO_UNIT).double()
    assert 0 < v.min() and v.max() < 1
    assert ((v * 2.0**31 - bits.cpu()).abs() <= 0.5 + 2.0**-22 * v * 2.0**31).all()
    exact = -torch.log(-torch.log1p(-v))
    for actual in (values.cpu(), noise.gumbel(bits).cpu()):
        assert actual.isfinite().all() and actual.max() < noise.MAX_GUMBEL
        # 1 - v, for v over 2^-7, is rounded by up to 2^-18 of v
        assert ((actual.double() - exact).abs() <= 2.0**-18 + 3e-7 * exact.abs()).all()


def test_bits_are_uniform_over_the_vocabulary():
    index = torch.arange(1 << 18)
    for seed in SEEDS:
        bits = bits_of(*seed, 7, index)
        assert_uniform(torch.bincount(bits >> 21, minlength=1024))
        assert_uniform(torch.bincount(bits & 1023, minlength=1024))


def test_small_values_are_as_frequent_as_they_should_be():
    """The winner of a draw has a small value: count the values in equal parts of the first 2^-14."""
    position = torch.arange(256)[:, None]
    bits = bits_of(3, 4, position, torch.arange(151_936)[None]).flatten()
    small = bits[bits < 1 << 17]
    expected = len(bits) / 2**14
    assert abs(len(small) - expected) < 5 * math.sqrt(expected)
    assert_uniform(torch.bincount(small >> 13, minlength=16))


def test_bits_are_uniform_over_positions_and_over_seeds():
    many = torch.arange(1 << 17)
    for index in (0, 1, 77_777):
        for bits in (
            bits_of(5, 6, many, torch.tensor(index)),
            bits_of(many, 6, 9, torch.tensor(index)),
            bits_of(5, many, 9, torch.tensor(index)),
            bits_of(many << 15, 6, 9, torch.tensor(index)),
        ):
            assert_uniform(torch.bincount(bits >> 21, minlength=1024))


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_are_independent(seed: tuple[int, int]):
    lo, hi = seed
    index = torch.arange(1 << 18)
    here = bits_of(lo, hi, 100, index)
    for step in (1, 2, 128, 1 << 16):
        assert_independent(here, here.roll(step))
    wrapped = (lo + 1 + 2**31) % 2**32 - 2**31
    for there in (
        bits_of(lo, hi, 101, index),
        bits_of(lo, hi, 100 ^ 64, index),
        bits_of(wrapped, hi, 100, index),
        bits_of(lo, hi ^ 1, 100, index),
        bits_of(lo ^ 1 << 30, hi, 100, index),
        bits_of(hi ^ 5, lo ^ 5, 100, index),
    ):
        assert_independent(here, there)


def test_one_token_is_independent_of_its_neighbour_in_every_step():
    position = torch.arange(1 << 18)
    for index in (0, 1, 2, 1000, 151_935):
        here = bits_of(1, 2, position, torch.tensor(index))
        assert_independent(here, bits_of(1, 2, position, torch.tensor(index + 1)))
        assert_independent(here, bits_of(1, 2, position + 1, torch.tensor(index)))
        assert_independent(here, bits_of(1, 2, position + 1, torch.tensor(index + 1)))
        assert_independent(here, bits_of(2, 2, position, torch.tensor(index)))
