"""y = x Wᵀ + b for the few rows of a decode step, at the speed memory can be read.

Up to some 100 rows the work is to read the weight once, `N * K * itemsize` bytes, with 2 FLOPs a row for every
element. A general library leaves half of the bandwidth unused here, because every call starts from nothing. Here a
program asks the L2 cache to fetch its rows of the weight before it waits for its input, while the kernel before it
still runs (`early_launch.py`).

What counts then is how much each multiprocessor reads from that cache: its tile of the weight, and as many columns of
all rows of x. A narrow weight has too few rows for well-shaped tiles to fill the device. So where a norm comes next,
which can add up partial sums, the kernel also cuts K into *slices*: the result is one *partial sum* per slice, in
float32, and a program reads only its slice of x's columns. `skinny_tilings.py` has the tiles, and how many slices.

The kernel also computes the gate of an MLP: with `gate`, W is the rows of a gate and then those of an up, and the
result is silu(x gateᵀ) · x upᵀ, or gelu's.
"""

import torch
import torch.nn.functional as F

from nanovllm.kernels.device import shared_memory_bytes
from nanovllm.kernels.early_launch import LINE_BYTES, early_launch, fetch, wait_for_previous
from nanovllm.kernels.linear.gate_mul import Gate, gate_mul, gate_value
from nanovllm.kernels.linear.skinny_tilings import choose_tiling, columns_ahead, dividing, fit, num_slices
from nanovllm.kernels.triton_shim import TensorDescriptor, tl, triton

MAX_ROWS = 256  # of x: with more, a library's kernels are as fast
K_MULTIPLE = 256


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gate: Gate | None = None,
    in_slices: bool = False,
) -> torch.Tensor:
    """`x [tokens, K]` times `weight [N, K]` transposed, plus `bias [N]`: `[tokens, N]`, in the dtype of both.

    With `gate`, silu or gelu of the first half · second half of that: `[tokens, N / 2]`. With `in_slices` the result
    may be partial sums instead, `[slices, tokens, N]` in float32. All sums are in float32. `F.linear` takes what the
    kernels are not made for: many rows, float32, a CPU, an odd K.
    """
    if x.is_cuda and _can_take(x, weight, bias, gate, in_slices):
        return _launch(x, weight, bias, gate, in_slices)
    out = F.linear(x, weight, bias)
    return gate_mul(out, gate) if gate else out


def _can_take(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gate: Gate | None, in_slices: bool
) -> bool:
    """Whether the kernels take this product: few rows, a multiple of K_MULTIPLE contiguous columns, aligned rows."""
    num_tokens, (n, k) = len(x), weight.shape
    is_small = 0 < num_tokens <= MAX_ROWS and x.element_size() == 2
    is_product = x.shape[1] == k and x.dtype == weight.dtype and (bias is None or bias.shape == (n,))
    is_whole = not (gate and (in_slices or n % 2))  # the gate needs complete sums, and an up of its size
    is_regular = k % K_MULTIPLE == 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and weight.is_contiguous()
    is_aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0
    if not (is_small and is_product and is_whole and is_regular and is_aligned):
        return False
    return num_tokens == 1 or choose_tiling(num_tokens, n, k, gate is not None, in_slices) is not None


def skinny_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gate: Gate | None = None,
    in_slices: bool = False,
) -> torch.Tensor:
    """`skinny_linear` in one launch. Raises ValueError for a product that `skinny_linear` leaves to the library."""
    if not _can_take(x, weight, bias, gate, in_slices):
        raise ValueError(
            f"x {list(x.shape)} {x.dtype}, weight {list(weight.shape)} {weight.dtype}, bias "
            f"{None if bias is None else list(bias.shape)}, {gate=}, {in_slices=}: must be a product of 1 to "
            f"{MAX_ROWS} rows that has tiles, of 16-bit elements, with a multiple of {K_MULTIPLE} columns side by "
            "side, in rows that begin at multiples of 16 bytes"
        )
    return _launch(x, weight, bias, gate, in_slices)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gate: Gate | None, in_slices: bool
) -> torch.Tensor:
    """Launch the kernel for a product that `_can_take` accepts."""
    num_tokens, (n, k) = len(x), weight.shape
    tiling = choose_tiling(num_tokens, n, k, gate is not None, in_slices)
    halves = 2 if gate else 1
    n_out = n // halves
    if num_tokens == 1:
        out = torch.empty((1, n_out), dtype=x.dtype, device=x.device)
        tile_n, tile_k = (8, 512) if k <= 1024 else (4, 1024)
        _vector_kernel[(triton.cdiv(n, tile_n),)](
            x, weight, bias, out, n_out, K=k, HALVES=halves, GELU=gate == "gelu", TILE_N=tile_n,
            TILE_K=dividing(k, tile_k), num_warps=8, **early_launch(x),
        )  # fmt: skip
        return out
    num_tiles = triton.cdiv(n, tiling.weight_rows), triton.cdiv(num_tokens, tiling.rows)
    slices = num_slices(num_tiles[0] * num_tiles[1], k, tiling.longest, x.device) if in_slices else 1
    columns = k // slices
    tile_m, tile_n = tiling.rows, tiling.weight_rows
    tile_k, depth = fit(tiling, columns, x.element_size(), shared_memory_bytes(x.device))
    x_tiles = TensorDescriptor(x, [num_tokens, k], [x.stride(0), 1], [tile_m, tile_k])
    weight_tiles = TensorDescriptor(weight, [halves, n_out, k], [n_out * k, k, 1], [halves, tile_n // halves, tile_k])
    shape, dtype = ((slices, num_tokens, n), torch.float32) if slices > 1 else ((num_tokens, n_out), x.dtype)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    _tile_kernel[(*num_tiles, slices)](
        x, weight, x_tiles, weight_tiles, bias, out, num_tokens, x.stride(0), n_out, K=k, HALVES=halves,
        GELU=gate == "gelu", SLICES=slices, TILE_M=tile_m, TILE_N=tile_n, TILE_K=tile_k,
        AHEAD=columns_ahead(n, k, columns), LINE=LINE_BYTES // 2, num_warps=4, num_stages=depth, **early_launch(x),
    )  # fmt: skip
    return out


@triton.jit
def _weight_rows(TILE_N: tl.constexpr, HALVES: tl.constexpr, n_out):
    """A program's rows of the weight; of a gated weight, its rows of the gate and then those of the up."""
    TILE_OUT: tl.constexpr = TILE_N // HALVES
    index = tl.arange(0, TILE_N)
    return tl.minimum(tl.program_id(0) * TILE_OUT + index % TILE_OUT, n_out - 1) + index // TILE_OUT * n_out


@triton.jit
def _gated(out, GELU: tl.constexpr, TILE_M: tl.constexpr, TILE_OUT: tl.constexpr):
    """silu(gate) · up or gelu(gate) · up, from `[TILE_M, 2 * TILE_OUT]`, which is gate, then up."""
    gate, up = tl.split(tl.permute(tl.reshape(out, [TILE_M, 2, TILE_OUT]), [0, 2, 1]))
    return gate_value(gate, GELU) * up


@triton.jit(do_not_specialize=["num_tokens"])
def _tile_kernel(
    x_ptr,
    weight_ptr,
    x_tiles,
    weight_tiles,
    bias_ptr,
    out_ptr,
    num_tokens,
    x_stride,
    n_out,
    K: tl.constexpr,
    HALVES: tl.constexpr,
    GELU: tl.constexpr,
    SLICES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    AHEAD: tl.constexpr,
    LINE: tl.constexpr,
    EARLY: tl.constexpr,
):
    # Matrix units take 64 rows of the first factor at once. If x has fewer, the weight is the first factor.
    TURNED: tl.constexpr = TILE_M < 64
    COLUMNS: tl.constexpr = K // SLICES
    TILE_OUT: tl.constexpr = TILE_N // HALVES
    row = _weight_rows(TILE_N, HALVES, n_out)
    # The last tile of x ends with the last row of x, since the copy engine is slow to fill rows past it. The last two
    # tiles may therefore overlap; both programs then store the same bits.
    first_m = tl.maximum(tl.minimum(tl.program_id(1) * TILE_M, num_tokens - TILE_M), 0)
    first_n = tl.program_id(0) * TILE_OUT
    slice_index = tl.program_id(2)
    first = slice_index * COLUMNS
    m = first_m + tl.arange(0, TILE_M)
    m_inside = (m < num_tokens)[:, None]
    column = tl.arange(0, TILE_K)[None, :]
    weight_rows = weight_ptr + row.to(tl.int64)[:, None] * K
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride
    if EARLY:
        lines = tl.arange(0, TILE_K // LINE) * LINE
        for start in range(0, AHEAD, TILE_K):
            fetch(weight_rows + first + start + lines[None, :], (row >= 0)[:, None])
    wait_for_previous(EARLY)
    if TURNED:
        acc = tl.zeros([TILE_N, TILE_M], tl.float32)
    else:
        acc = tl.zeros([TILE_M, TILE_N], tl.float32)
    for start in range(first, first + COLUMNS, TILE_K):
        if TURNED and HALVES == 2:  # halves that the engine copies would pass through registers: threads load sooner
            w = tl.load(weight_rows + start + column)
            x = tl.load(x_rows + start + column, mask=m_inside, other=0.0)
        else:
            w = tl.reshape(weight_tiles.load([0, first_n, start]), [TILE_N, TILE_K])
            x = x_tiles.load([first_m, start])
        if TURNED:
            acc = tl.dot(w, tl.trans(x), acc)
        else:
            acc = tl.dot(x, tl.trans(w), acc)
    out = acc
    if TURNED:
        out = tl.trans(acc)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + row).to(tl.float32)
        out += tl.where(slice_index == 0, bias, 0.0)[None, :]
    if HALVES == 2:
        out = _gated(out, GELU, TILE_M, TILE_OUT)
    n = first_n + tl.arange(0, TILE_OUT)
    place = out_ptr + (slice_index * num_tokens + m).to(tl.int64)[:, None] * n_out + n[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=m_inside & (n < n_out)[None, :])


@triton.jit
def _vector_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    n_out,
    K: tl.constexpr,
    HALVES: tl.constexpr,
    GELU: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One row of x, without matrix units: their padded rows would cost more than they save."""
    row = _weight_rows(TILE_N, HALVES, n_out)
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
    TILE_OUT: tl.constexpr = TILE_N // HALVES
    if HALVES == 2:
        out = tl.reshape(_gated(tl.reshape(out, [1, TILE_N]), GELU, 1, TILE_OUT), [TILE_OUT])
    n = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < n_out)
