"""Gumbel noise as a function of (seed, position, vocabulary index), not of a generator's state.

argmax_i(logit_i / temperature + g_i) with independent Gumbel g_i is a draw from softmax(logit / temperature) (Gumbel,
1954; Maddison et al., 2014, arXiv:1411.0030). There is no state to advance, so a request's draws depend neither on the
batch, nor on preemption, nor on which program computes them (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", 2011). PyTorch and Triton compute the same integers, bit for bit.

`noise_keys` mixes two 32-bit keys from seed and position, once for a draw. `noise_bits` then takes each vocabulary
index through the two multiply-xorshift steps of `lowbias32` (Chris Wellons, hash-prospector, public domain), with one
key before each step: 11 integer instructions.
"""

from functools import lru_cache

import torch

from nanovllm.kernels.triton_shim import INTERPRETED, tl, triton

# PyTorch's int32 arithmetic wraps, so it equals uint32 arithmetic, except for the right shift, which needs a mask.
WEYL = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive indices over all bits
MULTIPLY_1, MULTIPLY_2 = 0x7FEB352D, 0x846CA68B
POSITION_0, POSITION_1 = 0x243F6A88, 0x85A308D3  # two streams from one position: digits of pi
# The bits pick one of 2^31 intervals of (0, 1), and v is its middle. float32 would round the largest v to 1, so all are
# scaled down to end at 1 - 2^-24: then -log(1 - v) is always finite and never 0.
TO_UNIT = 2.0**-31 * (1 - 2.0**-24)
# Above it, all logits are as good as equal, so a higher temperature is taken for this one. With a temperature from
# MIN_TEMPERATURE to this, a finite logit's product with its inverse is finite.
MAX_TEMPERATURE = 1e30
MAX_GUMBEL = 22.2  # -log(-log1p(-v)) at the smallest v, 0.5 * TO_UNIT


def noise_keys(
    seed_lo: torch.Tensor, seed_hi: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int32 keys for each (seed, position). The arguments are int32 tensors that broadcast together."""
    key_0 = _lowbias32(_lowbias32(_lowbias32(position ^ _signed(POSITION_0)) ^ seed_hi) ^ seed_lo)
    key_1 = _lowbias32(_lowbias32(_lowbias32(position ^ _signed(POSITION_1)) ^ seed_lo) ^ seed_hi)
    return key_0, key_1


def noise_bits(spread: torch.Tensor, key_0: int | torch.Tensor, key_1: int | torch.Tensor) -> torch.Tensor:
    """31 random bits, as int32, for each vocabulary index of `spread` (see `spread_indices`). The keys broadcast."""
    x = spread ^ key_0
    high = x >> 16
    x.bitwise_xor_(high.bitwise_and_(0xFFFF))
    x.mul_(_signed(MULTIPLY_1)).bitwise_xor_(key_1)
    torch.bitwise_right_shift(x, 15, out=high)
    x.bitwise_xor_(high.bitwise_and_(0x1FFFF))
    return x.mul_(_signed(MULTIPLY_2)).bitwise_and_(0x7FFFFFFF)


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel values, float32, from `noise_bits`."""
    # log1p keeps all 31 bits where they matter: at small v, whose Gumbel values are large.
    return bits.float().add_(0.5).mul_(-TO_UNIT).log1p_().neg_().log_().neg_()


@lru_cache(maxsize=4)
def spread_indices(vocab_size: int, device: torch.device) -> torch.Tensor:
    """`[vocab_size]` int32: every index times WEYL, the part of the hash that is the same for all keys."""
    return spread_index(torch.arange(vocab_size, dtype=torch.int32, device=device))


def spread_index(index: torch.Tensor) -> torch.Tensor:
    """`spread_indices` of some vocabulary indices only, `index` int32."""
    return index * _signed(WEYL)


def _lowbias32(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ (x >> 16 & 0xFFFF)) * _signed(MULTIPLY_1)
    x = (x ^ (x >> 15 & 0x1FFFF)) * _signed(MULTIPLY_2)
    return x ^ (x >> 16 & 0xFFFF)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


@triton.jit
def lowbias32_kernel(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_keys_kernel(seed_lo, seed_hi, position):
    """`noise_keys` in Triton: int32 in, uint32 out."""
    seed_lo = seed_lo.to(tl.uint32, bitcast=True)
    seed_hi = seed_hi.to(tl.uint32, bitcast=True)
    position = position.to(tl.uint32, bitcast=True)
    key_0 = lowbias32_kernel(lowbias32_kernel(lowbias32_kernel(position ^ 0x243F6A88) ^ seed_hi) ^ seed_lo)
    key_1 = lowbias32_kernel(lowbias32_kernel(lowbias32_kernel(position ^ 0x85A308D3) ^ seed_lo) ^ seed_hi)
    return key_0, key_1


@triton.jit
def noise_bits_kernel(index, key_0, key_1):
    """`noise_bits` in Triton, from the vocabulary index itself: int32 index and uint32 keys in, int32 out."""
    x = index.to(tl.uint32, bitcast=True) * 0x9E3779B9 ^ key_0
    x = (x ^ (x >> 16)) * 0x7FEB352D ^ key_1
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x & 0x7FFFFFFF).to(tl.int32, bitcast=True)


@triton.jit
def gumbel_kernel(bits):
    """`gumbel` in Triton, to 3e-6. Where 1 - v would round away bits of v, log1p(-v) is a series."""
    v = (bits.to(tl.float32) + 0.5) * (2.0**-31 * (1 - 2.0**-24))
    series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v * (1 / 6 + v * (1 / 7)))))))
    minus_log1p = tl.where(v < 2.0**-3, series, fast_log2(1 - v) * -0.6931471805599453)
    return fast_log2(minus_log1p) * -0.6931471805599453


@triton.jit
def fast_log2(x):
    """log2 in one instruction, good to 2^-22 (PTX ISA, lg2.approx); `tl.log2` is a polynomial of thirty."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
