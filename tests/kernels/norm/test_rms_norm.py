"""Promises of RMSNorm, kept by the kernel (interpreted on a CPU) and the reference."""

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from nanovllm.kernels.norm import rms_norm as kernels

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1024), (5, 64), (3, 96), (2, 1), (7, 1000), (0, 32), (3, 4096)]
NORMS = [kernels.rms_norm_triton, kernels.rms_norm_reference, kernels.rms_norm]
ADD_NORMS = [kernels.add_rms_norm_triton, kernels.add_rms_norm_reference, kernels.add_rms_norm]
EPS = 1e-6


def draw(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of very different magnitudes inside a wider tensor, and a weight."""
    generator = torch.Generator().manual_seed(shape[0] * 10007 + shape[1])
    wide = torch.randn(shape[0], shape[1] + 16, generator=generator) * 10 ** torch.linspace(-3, 2, shape[0])[:, None]
    weight = torch.randn(shape[1], generator=generator)
    return wide.to(device, dtype)[:, 8 : 8 + shape[1]], weight.to(device, dtype)


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def assert_rounded_once(out: torch.Tensor, exact: torch.Tensor) -> None:
    """Half a unit in the last place of the dtype, and a few of float32 for the sum and the root."""
    unit = torch.finfo(out.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    tiny = torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
    assert ((out.double() - exact).abs() <= exact.abs() * unit + tiny).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_rounds_the_exact_norm_once(norm, shape: tuple[int, int], dtype: torch.dtype, device: str):
    x, weight = draw(shape, dtype, device)
    before = x.clone()
    out = norm(x, weight, EPS)
    assert out.dtype == dtype and out.shape == shape
    assert_rounded_once(out, exact_norm(x, weight))
    assert torch.equal(x, before)


@pytest.mark.parametrize("norm", [kernels.norm_add_rms_norm_triton, kernels.norm_add_rms_norm])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_slices", [0, 3])
def test_a_norm_before_the_addition_is_rounded_by_itself(norm, num_slices: int, shape, dtype, device: str):
    """The weights may be float32, as Gemma's."""
    x, weight = draw(shape, dtype, device)
    first_weight = draw((1, shape[1]), torch.float32, device)[1].float() + 1
    residual = draw(shape, dtype, device)[0].flip(1).contiguous()
    source = torch.stack([x.float() * 0.5, x.float() * 0.25, x.float() * 0.25]) if num_slices else x
    expected = residual + kernels.rms_norm_triton(x, first_weight, 1e-5)
    out, returned = norm(source, first_weight, 1e-5, residual, weight, EPS)
    assert returned is residual
    unit = torch.finfo(dtype).eps  # float32's norms differ in their last digits, before and after the addition
    torch.testing.assert_close(residual, expected, rtol=unit, atol=16 * unit if dtype == torch.float32 else 0)
    assert_rounded_once(out, exact_norm(residual, weight))


@pytest.mark.parametrize("norm", NORMS)
def test_rms_norm_is_that_of_transformers(norm, device: str):
    x, weight = draw((5, 96), torch.float32, device)
    theirs = Qwen3RMSNorm(96, eps=EPS).to(device)
    theirs.weight.data.copy_(weight)
    torch.testing.assert_close(norm(x, weight, EPS), theirs(x).detach(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("norm", ADD_NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_stores_the_rounded_sum_and_normalizes_it(norm, shape, dtype: torch.dtype, device: str):
    x, weight = draw(shape, dtype, device)
    wide = torch.full((shape[0], shape[1] + 3), 7.0, dtype=dtype, device=device)
    residual = wide[:, 2:-1]
    residual.copy_(draw(shape, dtype, device)[0].flip(1))
    total = residual + x
    out, returned = norm(x, residual, weight, EPS)
    assert returned is residual and torch.equal(residual, total)
    assert (wide[:, :2] == 7).all() and (wide[:, -1] == 7).all()
    assert_rounded_once(out, exact_norm(total, weight))


@pytest.mark.parametrize("norm", ADD_NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_slices", [2, 3, 8])
def test_partial_sums_are_summed_and_rounded_before_they_are_added(norm, num_slices, dtype: torch.dtype, device: str):
    shape = (5, 96)
    residual, weight = draw(shape, dtype, device)
    slices = torch.stack([draw(shape, torch.float32, device)[0].roll(i, 1) for i in range(num_slices)])
    expected = residual.clone()
    x = slices[0].clone()
    for slice_ in slices[1:]:
        x += slice_
    out, returned = norm(slices, residual, weight, EPS)
    assert returned is residual and out.dtype == dtype
    unit = torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(residual, expected + x.to(dtype), rtol=unit, atol=float(slices.abs().max()) * unit)
    assert_rounded_once(out, exact_norm(residual, weight))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
@pytest.mark.parametrize("shape", [(16384, 1024), (8192, 4096), (512, 4096), (4096, 12288)])
def test_add_rms_norm_at_a_prefills_size(shape: tuple[int, int], device: str):
    x, weight = draw(shape, torch.bfloat16, device)
    residual = x.flip(0).contiguous()
    total = residual + x
    out, _ = kernels.add_rms_norm_triton(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert_rounded_once(out, exact_norm(total, weight))
