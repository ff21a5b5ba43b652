"""The gated activation between the two halves of an MLP."""

import torch
from torch import nn

from nanovllm.kernels.silu_mul import silu_mul


class SiluAndMul(nn.Module):
    """SwiGLU's gate (Shazeer, 2020, arXiv:2002.05202): silu(gate) · up."""

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`gate_up [tokens, 2 * intermediate]` -> `[tokens, intermediate]`."""
        return silu_mul(gate_up)
