"""RMSNorm, alone or with the residual addition before it: x / sqrt(mean(x²) + eps) · weight.

Zhang & Sennrich, 2019 (arXiv:1910.07467). Memory bounds both, so one kernel does both: it reads a row once, and keeps
it in registers between the sum of squares and the scaling. An element of bf16 takes 4 bytes, or 8 with the residual,
and about 4 FLOPs. The kernel computes in float32 and rounds once, at the end.
"""

import torch

from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import tl, triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize the rows of `x [tokens, size]` (rows may be strided) by `weight [size]` into a new tensor."""
    return rms_norm_triton(x, weight, eps) if x.is_cuda else rms_norm_reference(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x [tokens, size]` to `residual [tokens, size]` in place; return (its RMSNorm, `residual`).

    x may also be partial sums `[slices, tokens, size]` in float32: they are added up and rounded to the residual's
    dtype first. The norm is of the new residual as stored, rounded to its dtype. Rows of both may be strided.
    """
    run = add_rms_norm_triton if x.is_cuda else add_rms_norm_reference
    return run(x, residual, weight, eps)


def norm_add_rms_norm(
    x: torch.Tensor,
    first_weight: torch.Tensor,
    first_eps: float,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` of the RMSNorm of x by `first_weight`, rounded as if stored: Gemma's norms on both sides."""
    run = norm_add_rms_norm_triton if x.is_cuda else norm_add_rms_norm_reference
    return run(x, first_weight, first_eps, residual, weight, eps)


def count_slices(x: torch.Tensor) -> int:
    """The number of partial sums in x: `[slices, tokens, size]`, or `[tokens, size]`, which is one."""
    return len(x) if x.dim() == 3 else 1


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in PyTorch; fast enough to serve a CPU too."""
    h = x.to(torch.float32, copy=True)
    # Not F.rms_norm: on a CPU its temporaries cost more than this in-place chain at hundreds of tokens.
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return h.mul_(scale).mul_(weight).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in PyTorch; fast enough to serve a CPU too."""
    residual.add_(x.sum(dim=0).to(residual.dtype) if x.dim() == 3 else x)
    return rms_norm_reference(residual, weight, eps), residual


def norm_add_rms_norm_reference(
    x: torch.Tensor,
    first_weight: torch.Tensor,
    first_eps: float,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_add_rms_norm` in PyTorch; fast enough to serve a CPU too."""
    x = x.sum(dim=0).to(residual.dtype) if x.dim() == 3 else x
    return add_rms_norm_reference(rms_norm_reference(x, first_weight, first_eps), residual, weight, eps)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in one launch, a program for each row."""
    return _launch(x, x, weight, eps, has_residual=False)


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in one launch, a program for each row."""
    return _launch(x, residual, weight, eps, has_residual=True), residual


def norm_add_rms_norm_triton(
    x: torch.Tensor,
    first_weight: torch.Tensor,
    first_eps: float,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_add_rms_norm` in one launch, a program for each row."""
    return _launch(x, residual, weight, eps, has_residual=True, first=(first_weight, first_eps)), residual


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    has_residual: bool,
    first: tuple[torch.Tensor | None, float] = (None, 0.0),
) -> torch.Tensor:
    num_tokens, size = residual.shape
    num_slices = count_slices(x)
    out = torch.empty((num_tokens, size), dtype=residual.dtype, device=x.device)
    tile = triton.next_power_of_2(size)
    elements = 8 if num_slices == 1 else 4  # of a thread: 16 bytes of bf16 or of float32
    _rms_norm_kernel[(num_tokens,)](
        x,
        residual,
        first[0],
        weight,
        out,
        x.stride(-2),
        x.stride(0),
        residual.stride(0),
        first[1],
        eps,
        SIZE=size,
        TILE=tile,
        NUM_SLICES=num_slices,
        HAS_RESIDUAL=has_residual,
        num_warps=min(max(tile // (32 * elements), 1), 16),
        **early_launch(x),
    )
    return out


@triton.jit
def load_sum(row_ptr, slice_stride, inside, NUM_SLICES: tl.constexpr, dtype: tl.constexpr):
    """Load a row: add up its partial sums, `slice_stride` apart, in their dtype, and round to `dtype`."""
    x = tl.load(row_ptr, mask=inside, other=0.0)
    for index in tl.static_range(1, NUM_SLICES):
        x += tl.load(row_ptr + index * slice_stride, mask=inside, other=0.0)
    return x.to(dtype)


@triton.jit
def add_to_residual(x, place, inside):
    """Add the row x to the residual's row at `place`, in memory; return the sum as stored."""
    x = (x.to(tl.float32) + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
    tl.store(place, x, mask=inside)
    return x


@triton.jit
def normed(x, weight, eps, SIZE: tl.constexpr):
    """The RMSNorm of a row, in float32, as `weight` is."""
    x = x.to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps) * weight


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    first_weight_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    slice_stride,
    residual_stride,
    first_eps,
    eps,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < SIZE
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if first_weight_ptr is not None:
        first_weight = tl.load(first_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(EARLY)
    x = load_sum(x_ptr + token * x_stride + column, slice_stride, inside, NUM_SLICES, residual_ptr.dtype.element_ty)
    if first_weight_ptr is not None:
        x = normed(x, first_weight, first_eps, SIZE).to(x.dtype)
    if HAS_RESIDUAL:
        x = add_to_residual(x, residual_ptr + token * residual_stride + column, inside)
    tl.store(out_ptr + token * SIZE + column, normed(x, weight, eps, SIZE).to(out_ptr.dtype.element_ty), mask=inside)
