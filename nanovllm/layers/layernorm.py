"""RMSNorm (Zhang & Sennrich, 2019, arXiv:1910.07467), fused with the residual addition before it."""

import torch
from torch import nn

from nanovllm.kernels.norm.rms_norm import add_rms_norm, rms_norm
from nanovllm.layers.linear import PartialSum, copy_exactly


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, in float32, over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(
        self, x: torch.Tensor | PartialSum, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x`, `residual [tokens, size]` -> (normed, residual + x). The sum is written over `residual`.

        Without a residual, x itself becomes it. A partial sum is reduced over the ranks on the way.
        """
        if residual is None:
            x = x.total() if isinstance(x, PartialSum) else x
            return rms_norm(x, self.weight, self.eps), x
        if isinstance(x, PartialSum):
            return x.add_to(residual, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        """Copy the weight, whole on every rank. Raises ValueError on a wrong shape."""
        copy_exactly(param, loaded)
