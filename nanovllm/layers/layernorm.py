"""RMSNorm (Zhang & Sennrich, 2019, arXiv:1910.07467), fused with the residual addition before it."""

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.kernels.norm.rms_norm import add_rms_norm, norm_add_rms_norm, rms_norm
from nanovllm.layers.linear import PartialSum
from nanovllm.layers.pointwise import norm_add
from nanovllm.layers.shards import copy_exactly


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, in float32, over the last dimension.

    `one_plus`: the checkpoint has the weight less one (Gemma). It is kept in float32 then, with the one: in 16 bits the
    sum would lose most of the checkpoint's digits.
    """

    chains = ("norm_add",)

    def __init__(self, size: int, eps: float, one_plus: bool = False) -> None:
        super().__init__()
        self.eps, self.one_plus = eps, one_plus
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.norm_add = norm_add

    def forward(
        self, x: "torch.Tensor | PartialSum | NormedSum", residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x`, `residual [tokens, size]` -> (normed, residual + x). The sum may be written over `residual`.

        Without a residual, x itself becomes it. A partial sum is reduced over the ranks on the way.
        """
        if residual is None:
            x = x.total() if isinstance(x, PartialSum) else x
            return rms_norm(x, self.weight, self.eps), x
        if isinstance(x, torch.Tensor):
            return add_rms_norm(x, residual, self.weight, self.eps)
        return x.add_to(residual, self.weight, self.eps)

    def add_normed(self, x: PartialSum, residual: torch.Tensor) -> torch.Tensor:
        """residual + normed x, `[tokens, size]`."""
        return self.norm_add(x.reduced(), residual, self.weight, self.eps)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        """Copy the weight, whole on every rank. Raises ValueError on a wrong shape."""
        copy_exactly(param, loaded)
        if self.one_plus:
            param.data.add_(1)


@dataclass(slots=True, frozen=True)
class NormedSum:
    """A partial sum that goes through a norm before it is added to the residual. The norm that comes next does both."""

    sum: PartialSum
    norm: RMSNorm

    def add_to(self, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """As `PartialSum.add_to`."""
        norm = self.norm
        return norm_add_rms_norm(self.sum.reduced(), norm.weight, norm.eps, residual, weight, eps)
