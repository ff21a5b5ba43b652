"""Promises of silu(gate) · up and gelu(gate) · up, kept by the kernel (interpreted on a CPU) and the reference."""

import pytest
import torch
from transformers.activations import ACT2FN

from nanovllm.kernels.linear import gate_mul as kernels

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 3072), (5, 48), (3, 1000), (0, 16), (2, 1), (70, 80)]
FUNCTIONS = [kernels.gate_mul_triton, kernels.gate_mul_reference, kernels.gate_mul]


def draw(shape: tuple[int, int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """`[tokens, 2 * size]` inside a wider tensor, some gates so large that exp overflows."""
    generator = torch.Generator().manual_seed(shape[0] * 10007 + shape[1])
    wide = torch.randn(shape[0], 2 * shape[1] + 9, generator=generator) * 3
    wide[:, ::17] *= 100
    return wide.to(device, dtype)[:, 1:-8]


def exact(gate_up: torch.Tensor, kind: str = "silu") -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    z = gate if kind == "silu" else 2 * (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate * torch.sigmoid(z) * up


def assert_rounded_once(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Half a unit in the last place of the dtype, a few of float32, and what float32's exp loses below 1e-30."""
    unit = torch.finfo(out.dtype).eps / 2 + 16 * torch.finfo(torch.float32).eps
    tiny = torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps + 1e-30
    assert ((out.double() - expected).abs() <= expected.abs() * unit + tiny).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_mul_rounds_the_exact_product_once(function, shape: tuple[int, int], dtype: torch.dtype, device: str):
    gate_up = draw(shape, dtype, device)
    if dtype == torch.float16:  # products of its largest gates would overflow
        gate_up = gate_up.clamp(-100, 100)
    before = gate_up.clone()
    out = function(gate_up)
    assert out.dtype == dtype and out.shape == shape and out.is_contiguous()
    assert_rounded_once(out, exact(gate_up))
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gates_far_below_zero_keep_float32s_precision(function, device: str):
    """exp2(x · log2(e)) would not do: the product's rounding costs up to 4e-6 of the result at these gates."""
    gate = -torch.linspace(44, 68, 512, device=device)
    out = function(torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0))[0]
    expected = gate.double() * torch.sigmoid(gate.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "name"), [("silu", "silu"), ("gelu", "gelu_pytorch_tanh")])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gate_mul_is_that_of_transformers(function, kind: str, name: str, device: str):
    gate_up = draw((3, 96), torch.float32, device)
    gate, up = gate_up.chunk(2, dim=-1)
    # 1 + tanh, which PyTorch computes for gelu, loses digits where the gate is far below zero.
    atol = 1e-7 if kind == "silu" else 2e-6 * float(gate.abs().max())
    torch.testing.assert_close(function(gate_up, kind), ACT2FN[name](gate) * up, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_gelu_is_rounded_once(shape: tuple[int, int], dtype: torch.dtype, device: str):
    gate_up = draw(shape, dtype, device)
    if dtype == torch.float16:
        gate_up = gate_up.clamp(-100, 100)
    # z is a cubic of the gate: its rounding costs exp(z) some more units where the gate is far below zero.
    out, expected = kernels.gate_mul_triton(gate_up, "gelu"), exact(gate_up, "gelu")
    gate, up = gate_up.double().chunk(2, dim=-1)
    unit = torch.finfo(dtype).eps / 2 + 64 * torch.finfo(torch.float32).eps
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps + 1e-9 * (gate * up).abs()
    assert ((out.double() - expected).abs() <= expected.abs() * unit + tiny).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
@pytest.mark.parametrize("shape", [(16384, 3072), (4096, 12288), (512, 12288)])
def test_gate_mul_at_a_prefills_size(shape: tuple[int, int], device: str):
    gate_up = draw(shape, torch.bfloat16, device)
    assert_rounded_once(kernels.gate_mul_triton(gate_up), exact(gate_up))
