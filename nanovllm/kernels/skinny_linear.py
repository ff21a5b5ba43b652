"""y = x Wᵀ + b for the few rows of a decode step, at the speed memory can be read.

Up to some 100 rows the work is to read the weight once, `N * K * itemsize` bytes, with 2 FLOPs a row for every
element; the rows stay in the L2 cache. A general library leaves half of the bandwidth unused here: its tiles are few
and large, and every call starts from nothing. Here a program has a few of the weight's rows, all `K` columns of them,
few enough that the device is full without partial sums to combine; its warps share K among themselves; and before it
waits for its input it fetches its part of the weight, while the kernel before it still runs (`early_launch.py`).

The gate of an MLP comes along: with `gated`, W is a gate's rows and then an up's, and the result silu(x gateᵀ) · x upᵀ.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from nanovllm.kernels.early_launch import LINE_BYTES, early_launch, fetch, wait_for_previous
from nanovllm.kernels.paged_kv import next_power_of_2
from nanovllm.kernels.silu_mul import silu, silu_mul
from nanovllm.kernels.triton_shim import tl, triton

MAX_ROWS = 128  # of x: with more, a library's kernels are as fast
WIDE = 4096  # a weight of more rows than this fills a library's larger tiles: half of MAX_ROWS
LARGE = 1 << 23  # elements of a weight: where there is more to read, a library is faster from two rows on
NARROW = 2048  # a weight of so many rows or fewer must be cut finely to fill the device
K_MULTIPLE = 256

MAX_TILE_M = 64
# Rows of x (at most) -> for a narrow, for a wide weight: rows of a tile, columns of a tile, parts of K, pipeline depth.
# Measured on an H100 on Qwen3-0.6B's four shapes: docs/performance.md.
TILES = {
    16: ((8, 1024, 4, 4), (16, 512, 4, 4)),
    32: ((8, 512, 4, 4), (32, 256, 1, 4)),
    64: ((16, 256, 1, 4), (32, 256, 1, 3)),
    128: ((32, 256, 1, 4), (64, 128, 1, 4)),
}


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False
) -> torch.Tensor:
    """`x [tokens, K]` times `weight [N, K]` transposed, plus `bias [N]`: `[tokens, N]`, in the dtype of both.

    With `gated`, silu(first half) · second half of that: `[tokens, N / 2]`. Sums are in float32. What the kernels are
    not for (many rows, float32, a CPU, an odd K) goes to `F.linear`.
    """
    n, k = weight.shape
    if 0 < len(x) <= _most_rows(n, k) and k % K_MULTIPLE == 0 and x.is_cuda and x.element_size() == 2:
        return skinny_linear_triton(x, weight, bias, gated)
    out = F.linear(x, weight, bias)
    return silu_mul(out) if gated else out


def _most_rows(n: int, k: int) -> int:
    """How many rows of x a weight `[n, k]` may meet here."""
    if n * k > LARGE:
        return min(MAX_ROWS, 1)
    return MAX_ROWS if n <= WIDE else MAX_ROWS // 2


def skinny_linear_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False
) -> torch.Tensor:
    """`skinny_linear` as one launch, for up to 128 rows of 16-bit elements.

    Raises ValueError for more rows, a K that is not a multiple of 256, or rows that are not contiguous.
    """
    num_tokens, (n, k) = len(x), weight.shape
    if num_tokens > max(TILES) or k % K_MULTIPLE or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)} must have at most {max(TILES)} rows of x, contiguous "
            f"rows, and a multiple of {K_MULTIPLE} columns"
        )
    n_out = n // 2 if gated else n
    out = torch.empty((num_tokens, n_out), dtype=x.dtype, device=x.device)
    arguments = (x, weight, bias, out, num_tokens, x.stride(0), n_out)
    if num_tokens == 1:
        tile_n, tile_k = (8, 512) if k <= 1024 else (4, 1024)
        options = {"TILE_N": tile_n, "TILE_K": _dividing(k, tile_k), "num_warps": 8}
        kernel = _vector_kernel
    else:
        padded = max(16, next_power_of_2(num_tokens))
        tile_m = min(MAX_TILE_M, padded)
        tile_n, tile_k, parts, num_stages = TILES[padded][n > NARROW]
        in_registers = tile_m == 16 and k <= 1024
        if in_registers and _is_better_cut(n, 2 * tile_n, tile_n, x.device):
            tile_n, tile_k = 2 * tile_n, 2 * tile_k
        options = {"TILE_M": tile_m, "TILE_N": tile_n, "TILE_K": _dividing(k, tile_k), "PARTS": parts}
        options |= {"IN_REGISTERS": in_registers, "LINE": LINE_BYTES // 2, "num_warps": 4, "num_stages": num_stages}
        kernel = _skinny_kernel
    kernel[(triton.cdiv(n, tile_n), triton.cdiv(num_tokens, MAX_TILE_M))](
        *arguments, K=k, GATED=gated, **options, **early_launch(x)
    )
    return out


def _dividing(k: int, tile: int) -> int:
    """The largest power of two up to `tile` that divides `k`."""
    return min(tile, k & -k)


@lru_cache
def _is_better_cut(n: int, tile: int, other: int, device: torch.device) -> bool:
    """Whether tiles of `tile` rows fill the last round of the device's multiprocessors as well as those of `other`."""
    if device.type != "cuda":
        return False
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    used, used_by_other = (-(-n // t) / multiprocessors for t in (tile, other))
    return used / math.ceil(used) >= used_by_other / math.ceil(used_by_other)


@triton.jit
def _weight_rows(TILE_N: tl.constexpr, GATED: tl.constexpr, n_out):
    """A program's rows of the weight; of a gated one a row of the gate and its row of the up in turn."""
    index = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    if GATED:
        return tl.minimum(index // 2, n_out - 1) + index % 2 * n_out
    return tl.minimum(index, n_out - 1)


@triton.jit(do_not_specialize=["num_tokens"])
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    x_stride,
    n_out,
    K: tl.constexpr,
    GATED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PARTS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    LINE: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = _weight_rows(TILE_N, GATED, n_out)
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    column = tl.arange(0, TILE_K)
    m_inside = (m < num_tokens)[:, None]
    weight_rows = weight_ptr + row.to(tl.int64)[:, None] * K
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride
    if IN_REGISTERS:
        next_w = tl.load(weight_rows + column[None, :])
    elif EARLY:
        lines = tl.arange(0, TILE_K // LINE) * LINE
        for start in range(0, K, TILE_K):
            fetch(weight_rows + start + lines[None, :], (row >= 0)[:, None])
    wait_for_previous(EARLY)
    if PARTS == 1:
        acc = tl.zeros([TILE_M, TILE_N], tl.float32)
    else:
        acc = tl.zeros([PARTS, TILE_M, TILE_N], tl.float32)
    for start in range(0, K, TILE_K):
        if IN_REGISTERS:
            w = next_w
            if start + TILE_K < K:
                next_w = tl.load(weight_rows + start + TILE_K + column[None, :])
        else:
            w = tl.load(weight_rows + start + column[None, :])
        x = tl.load(x_rows + start + column[None, :], mask=m_inside, other=0.0)
        if PARTS == 1:
            acc = tl.dot(x, tl.trans(w), acc)
        else:
            # A product for each part of the columns; the warps spread over the parts.
            x_parts = tl.permute(tl.reshape(x, [TILE_M, PARTS, TILE_K // PARTS]), (1, 0, 2))
            w_parts = tl.permute(tl.reshape(w, [TILE_N, PARTS, TILE_K // PARTS]), (1, 2, 0))
            acc = tl.dot(x_parts, w_parts, acc)
    out = acc
    if PARTS > 1:
        out = tl.sum(acc, axis=0)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(out, [TILE_M, TILE_N // 2, 2]))
        out = silu(gate) * up
    TILE_OUT: tl.constexpr = TILE_N // 2 if GATED else TILE_N
    n = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    place = out_ptr + m.to(tl.int64)[:, None] * n_out + n[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=m_inside & (n < n_out)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _vector_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    x_stride,
    n_out,
    K: tl.constexpr,
    GATED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One row: too little arithmetic for matrix units, whose padded rows would cost more than they save."""
    row = _weight_rows(TILE_N, GATED, n_out)
    column = tl.arange(0, TILE_K)
    weight_rows = weight_ptr + row.to(tl.int64)[:, None] * K + column[None, :]
    next_w = tl.load(weight_rows)
    wait_for_previous(EARLY)
    acc = tl.zeros([TILE_N, TILE_K], tl.float32)
    for start in range(0, K, TILE_K):
        w = next_w
        if start + TILE_K < K:
            next_w = tl.load(weight_rows + start + TILE_K)
        acc += w.to(tl.float32) * tl.load(x_ptr + start + column).to(tl.float32)[None, :]
    out = tl.sum(acc, axis=1)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.reshape(out, [TILE_N // 2, 2]))
        out = silu(gate) * up
    TILE_OUT: tl.constexpr = TILE_N // 2 if GATED else TILE_N
    n = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < n_out)
