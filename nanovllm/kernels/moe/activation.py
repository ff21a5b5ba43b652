"""An expert's gate: SwiGLU, or gpt-oss's clamped variant of it. Each has its PyTorch and its Triton form.

gpt-oss (OpenAI, 2025, arXiv:2508.10925) clamps the gate from above and the up on both sides, uses 1.702 · gate within
the sigmoid, and adds 1 to the up, so that an up of zero passes the gate through. Some 10 FLOPs an element.
"""

from typing import Literal

import torch

from nanovllm.kernels.linear.gate_mul import gate_mul, silu
from nanovllm.kernels.triton_shim import tl, triton

Activation = Literal["silu", "clamped"]


def gate_reference(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """`gate_up [rows, 2 * size]`, the gates and then the ups -> `[rows, size]`; computed in float32, rounded once."""
    if activation == "silu":
        return gate_mul(gate_up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)).to(gate_up.dtype)


@triton.jit
def gated(gate, up, CLAMPED: tl.constexpr):
    """`gate_reference` of float32 tiles of equal shapes. A NaN stays one."""
    if CLAMPED:
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return (up + 1) * gate / (1 + tl.exp(gate * -1.702))
    else:
        return silu(gate) * up
