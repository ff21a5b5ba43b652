"""Masks of tokens, a bit each: -inf for the logits of tokens that a grammar forbids.

For entries with other edits besides, which need a copy of their logits anyway; `sample` itself reads the bits of all
others. The kernel reads a bit and writes at most 4 bytes for each logit: 0.6 MB for an entry of 151,936 tokens. The
plain version serves a CPU, and is the kernel's reference.
"""

import math

import numpy as np
import torch

from nanovllm.kernels.sampling.tensors import TokenBits
from nanovllm.kernels.triton_shim import tl, triton

TILE = 4096  # logits of a program


def mask_tokens(logits: torch.Tensor, masks: TokenBits) -> None:
    """Set the logits of forbidden tokens to -inf, in place, without waiting for the device.

    Args:
        logits: `[entries, vocab]` float32, contiguous.
        masks: of some of these entries; the others stay as they are.
    """
    if len(masks.entries):
        run = mask_triton if logits.is_cuda else mask_reference
        run(logits, masks.entries, masks.bits)


def mask_reference(logits: torch.Tensor, entries: torch.Tensor, bits: torch.Tensor) -> None:
    """Mask the logits of `entries`, `[any]` int64, by `bits`, `[any, words]` int32."""
    as_bytes = bits.cpu().numpy().astype("<i4", copy=False).view(np.uint8)
    is_allowed = np.unpackbits(as_bytes, axis=1, bitorder="little", count=logits.shape[1]).view(bool)
    logits[entries] = logits[entries].masked_fill_(torch.from_numpy(~is_allowed).to(logits.device), -math.inf)


def mask_triton(logits: torch.Tensor, entries: torch.Tensor, bits: torch.Tensor) -> None:
    """`mask_reference` on a GPU, in one launch."""
    vocab_size = logits.shape[1]
    tile = min(TILE, max(32, triton.next_power_of_2(vocab_size)))
    _mask_kernel[(len(entries), triton.cdiv(vocab_size, tile))](
        logits, logits.stride(0), vocab_size, entries, bits, bits.stride(0), TILE=tile
    )


@triton.jit
def _mask_kernel(logits_ptr, logits_stride, vocab_size, entries_ptr, bits_ptr, bits_stride, TILE: tl.constexpr):
    mask = tl.program_id(0)
    entry = tl.load(entries_ptr + mask)
    index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_token = index < vocab_size
    word = tl.load(bits_ptr + mask * bits_stride + index // 32, mask=is_token, other=0)
    is_forbidden = is_token & ((word >> (index % 32)) & 1 == 0)
    tl.store(logits_ptr + entry * logits_stride + index, tl.full([TILE], float("-inf"), tl.float32), mask=is_forbidden)
