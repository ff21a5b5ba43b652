"""What the sampler is told, as tensors on the device: each row's parameters, which the host writes when its request
begins, and the masks of a step's grammars.
"""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class SamplingTensors:
    """The sampling parameters of all rows. Each tensor is `[rows]`, of any stride, and indexed by row.

    Attributes:
        temperature: float32; 0 is greedy.
        top_k: int32, sample among the k likeliest tokens; <= 0: all.
        top_p: float32, sample among the likeliest tokens that together have this probability; 1: all.
        min_p: float32, drop tokens less likely than this times the likeliest; 0: none.
        seed_lo, seed_hi: int32, the two halves of the request's 64-bit seed.
        min_len: int32, the sampler draws no `stop_ids` while the row is shorter.
        stop_ids: `[rows, any]` int32, filled up with -1.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed_lo: torch.Tensor
    seed_hi: torch.Tensor
    min_len: torch.Tensor
    stop_ids: torch.Tensor


@dataclass(slots=True)
class TokenBits:
    """Masks of tokens for some of a step's entries.

    Attributes:
        entries: `[masks]` int64, the entry of each mask.
        bits: `[masks, at least vocab / 32]` int32, the last dimension contiguous: token t is bit t % 32 of word
            t // 32, and 0 forbids it.
    """

    entries: torch.Tensor
    bits: torch.Tensor
