"""Chains of elementwise operations that have no kernel of ours, in PyTorch's own operations.

Run one by one, each operation is a launch on a GPU, and reads and writes a whole tensor. `torch.compile` makes one
kernel of a chain. `compile_chains` is the only place that calls it. Every chain computes in float32 and rounds where
the model does, so that compiled or not it gives the same numbers, but for the last digit of an exponential.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import nn

Chain = Callable[..., Any]


def compile_chains(model: nn.Module) -> None:
    """Let the model's chains run compiled: a module names those of its attributes that are chains in `chains`.

    A chain is compiled on its first call, for any number of tokens; then PyTorch's cache on disk has it.
    """
    for module in model.modules():
        for name in getattr(module, "chains", ()):
            setattr(module, name, _compiled(getattr(module, name)))


@lru_cache
def _compiled(chain: Chain) -> Chain:
    """One compiled chain for all modules. To ask PyTorch for it takes seconds of imports: the first call does that."""
    made: list[Chain] = []

    @wraps(chain)
    def run(*args: Any) -> Any:
        if not made:
            # Without the option a number that is rounded to 16 bits, and read on in float32, would not be rounded.
            made.append(torch.compile(chain, dynamic=True, options={"emulate_precision_casts": True}))
        return made[0](*args)

    return run


def cap(x: torch.Tensor, limit: float) -> torch.Tensor:
    """limit · tanh(x / limit), elementwise: near x for small x, and never above the limit (Gemma 2)."""
    return ((x.float() / limit).tanh() * limit).to(x.dtype)


def norm_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual + the RMSNorm of `x`, which is `[tokens, size]` or, in slices to add up, `[slices, tokens, size]`."""
    h = (x.sum(dim=0).to(residual.dtype) if x.dim() == 3 else x).float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.float()
    return residual + h.to(residual.dtype)


def grow_queries(qkv: torch.Tensor, positions: torch.Tensor, q_size: int, beta: float, original: int) -> torch.Tensor:
    """qkv with its queries times 1 + beta · log(1 + ⌊position / original⌋) (Llama 4: Meta, 2025).

    Attention over many more tokens than the model was trained with would be too flat otherwise.
    """
    factors = 1 + beta * (1 + positions // original).float().log()  # [tokens]
    q = qkv[:, :q_size] * factors[:, None].to(qkv.dtype)
    return torch.cat([q, qkv[:, q_size:]], dim=-1)


def mean_squares(qkv: torch.Tensor, shares: torch.Tensor, q_size: int) -> torch.Tensor:
    """The mean square of a token's queries, and of its keys: `[tokens, 2]` float32.

    `shares [q_size + k_size]` float32 is each element's share in its mean.
    """
    squares = qkv[:, : len(shares)].float().square() * shares
    return torch.stack([squares[:, :q_size].sum(-1), squares[:, q_size:].sum(-1)], dim=-1)


def scale_heads(
    qkv: torch.Tensor, mean_squares: torch.Tensor, weight: torch.Tensor, q_size: int, eps: float
) -> torch.Tensor:
    """qkv with its queries and keys normalized: `mean_squares [tokens, 2]`, `weight [q_size + k_size]`."""
    scale = torch.rsqrt(mean_squares + eps)
    q = qkv[:, :q_size].float() * scale[:, :1] * weight[:q_size]
    k = qkv[:, q_size : len(weight)].float() * scale[:, 1:] * weight[q_size:]
    return torch.cat([q.to(qkv.dtype), k.to(qkv.dtype), qkv[:, len(weight) :]], dim=-1)
