"""Rows times their experts' weights: a grouped product, gated or weighted.

The first product is fused with the gate: `gate(x Wᵀ_gate + b, x Wᵀ_up + b)`, so gates and ups never reach memory. The
second one adds its bias and multiplies by the routing weight. A pair of a token and an expert is 6 · size · hidden_size
FLOPs over both. Few tokens read the weights of the experts that they hit, 3 · size · hidden_size · itemsize bytes each,
which bounds the time up to some 150 rows an expert on an H200; beyond, the matrix units do.

A program multiplies a tile of pairs that have one expert with a tile of that expert's rows (`tile_rows.py`). Tiles
without work end at once, so launches depend on shapes alone and a captured graph serves any routing. Padding rows of a
tile repeat the first token's row: nothing masks their loads, and nothing stores them.
"""

import torch

from nanovllm.kernels.early_launch import LINE_BYTES, early_launch, fetch, wait_for_previous
from nanovllm.kernels.moe.activation import Activation, gated
from nanovllm.kernels.moe.sort_by_expert import ExpertOrder
from nanovllm.kernels.moe.tile_rows import rows_of_tile
from nanovllm.kernels.moe.tilings import Tiling
from nanovllm.kernels.triton_shim import TensorDescriptor, tl, triton

AHEAD = 256  # columns of the weight to fetch before the wait
LEAST_PAIRS = 64  # that a program looks through: fewer would be no faster, and another kernel to compile


def gated_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    first: int,
    order: ExpertOrder | None,
    activation: Activation,
    tiling: Tiling,
) -> torch.Tensor:
    """`x [tokens, K]` -> the hidden features of every pair, `[tokens * k, size]`; of experts elsewhere, undefined.

    Args:
        weight: `[experts here, 2 * size, K]`, an expert's gate and then its up. bias: `[experts here, 2 * size]`.
        ids: `[tokens, k]` int32, the expert of each pair.
        first: the number of the first expert here.
        order: the pairs in tiles of `tiling.rows`; None: a tile for each pair.
    """
    size = weight.shape[1] // 2
    out = torch.empty((ids.numel(), size), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, None, out, (size, 0), ids, first, order, activation == "clamped", 2, tiling)
    return out


def weighted_product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    order: ExpertOrder | None,
    in_slices: bool,
    tiling: Tiling,
) -> torch.Tensor:
    """`hidden [tokens * k, K]` -> every pair's part of the sum, times its weight; of experts elsewhere, undefined.

    Args:
        weight: `[experts here, N, K]`. bias: `[experts here, N]`.
        weights: `[tokens, k]` float32, from the router.
        in_slices: the result is `[k, tokens, N]` in float32, otherwise `[tokens, k, N]` in the dtype of `hidden`.
    """
    (num_tokens, k), n = ids.shape, weight.shape[1]
    if in_slices:
        out = torch.empty((k, num_tokens, n), dtype=torch.float32, device=hidden.device)
        strides = n, num_tokens * n
    else:
        out = torch.empty((num_tokens, k, n), dtype=hidden.dtype, device=hidden.device)
        strides = k * n, n
    _launch(hidden, weight, bias, weights, out, strides, ids, first, order, False, 1, tiling)
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    strides: tuple[int, int],
    ids: torch.Tensor,
    first: int,
    order: ExpertOrder | None,
    is_clamped: bool,
    halves: int,
    tiling: Tiling,
) -> None:
    num_experts, n, k = weight.shape
    n_out, num_pairs = n // halves, ids.numel()
    num_tiles = num_pairs if order is None else len(order.experts)
    pairs, experts = (None, None) if order is None else order
    columns = triton.cdiv(n_out, tiling.weight_rows)
    with_engine = tiling.copy_engine and k * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    searched = LEAST_PAIRS if order else max(triton.next_power_of_2(num_pairs), LEAST_PAIRS)
    block = [1, tiling.weight_rows, tiling.columns]
    _product_kernel[(num_tiles * columns,)](
        x, weight, TensorDescriptor(weight, [num_experts, n, k], [n * k, k, 1], block) if with_engine else None,
        bias, weights, out, ids, pairs, experts, num_pairs, num_tiles, first, x.stride(0), strides[0], strides[1],
        n_out, CHOICES=ids.shape[1], K=k, EXPERTS=num_experts, HALVES=halves, IS_CLAMPED=is_clamped,
        IS_SORTED=order is not None, PAIRS=searched,
        ROWS=tiling.rows, TILE_N=tiling.weight_rows, TILE_K=tiling.columns, GROUP=tiling.group,
        AHEAD=min(AHEAD, k), LINE=LINE_BYTES // weight.element_size(), num_warps=tiling.warps,
        num_stages=tiling.depth, **early_launch(x),
    )  # fmt: skip


@triton.jit
def _weight_tile(
    weight_rows, weight_tiles, expert, n, start, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr
):
    """`[TILE_N, TILE_K]` of the expert's weight from row `n` and column `start` on."""
    column = tl.arange(0, TILE_K)
    if weight_tiles is not None:
        return tl.reshape(weight_tiles.load([expert, n, start]), [TILE_N, TILE_K])
    elif K % TILE_K == 0:
        return tl.load(weight_rows + start + column[None, :])
    else:
        return tl.load(weight_rows + start + column[None, :], mask=(start + column < K)[None, :], other=0.0)


@triton.jit
def _times(w, x, acc, IS_TURNED: tl.constexpr):
    if IS_TURNED:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["num_pairs", "num_tiles", "first"])
def _product_kernel(
    x_ptr,
    weight_ptr,
    weight_tiles,
    bias_ptr,
    weights_ptr,
    out_ptr,
    ids_ptr,
    pairs_ptr,
    experts_ptr,
    num_pairs,
    num_tiles,
    first,
    x_stride,
    token_stride,
    choice_stride,
    n_out,
    CHOICES: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    HALVES: tl.constexpr,
    IS_CLAMPED: tl.constexpr,
    IS_SORTED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
    LINE: tl.constexpr,
    EARLY: tl.constexpr,
):
    # Matrix units take 64 rows of the first factor at once. If a tile has fewer, the weight is the first factor.
    IS_TURNED: tl.constexpr = ROWS < 64
    # Programs that run together share tiles: GROUP tiles of pairs, most of one expert, for each tile of the weight.
    columns = tl.cdiv(n_out, TILE_N)
    program = tl.program_id(0)
    group = program // (GROUP * columns)
    in_group = program % (GROUP * columns)
    height = tl.minimum(num_tiles - group * GROUP, GROUP)
    tile = group * GROUP + in_group % height
    first_n = in_group // height * TILE_N

    if HALVES == 2:  # the launch before may have written the order
        wait_for_previous(EARLY)
    expert, pairs = rows_of_tile(
        tile, ids_ptr, pairs_ptr, experts_ptr, num_pairs, first, EXPERTS, IS_SORTED, PAIRS, ROWS
    )
    n = first_n + tl.arange(0, TILE_N)
    row = expert.to(tl.int64) * HALVES * n_out + tl.minimum(n, n_out - 1)
    weight_rows = weight_ptr + row[:, None] * K
    if HALVES == 1:  # the order is older than the launch before, so the weight can be fetched while that runs
        if EARLY:
            lines = tl.arange(0, (TILE_K + LINE - 1) // LINE) * LINE
            for start in range(0, AHEAD, TILE_K):
                fetch(weight_rows + start + lines[None, :], (row >= 0)[:, None] & (start + lines < K)[None, :])
        wait_for_previous(EARLY)
    if expert < 0:
        return

    is_pair = pairs >= 0
    pair = tl.maximum(pairs, 0)
    if HALVES == 2:
        x_rows = x_ptr + (pair // CHOICES).to(tl.int64)[:, None] * x_stride
    else:
        x_rows = x_ptr + pair.to(tl.int64)[:, None] * x_stride
    up_rows = weight_rows + n_out * K
    column = tl.arange(0, TILE_K)
    if IS_TURNED:
        acc = tl.zeros([TILE_N, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, TILE_N], tl.float32)
    acc_up = acc
    for start in range(0, K, TILE_K):
        if K % TILE_K == 0:
            x = tl.load(x_rows + start + column[None, :])
        else:
            x = tl.load(x_rows + start + column[None, :], mask=(start + column < K)[None, :], other=0.0)
        acc = _times(
            _weight_tile(weight_rows, weight_tiles, expert, first_n, start, K, TILE_N, TILE_K), x, acc, IS_TURNED
        )
        if HALVES == 2:
            acc_up = _times(
                _weight_tile(up_rows, weight_tiles, expert, n_out + first_n, start, K, TILE_N, TILE_K),
                x, acc_up, IS_TURNED,
            )  # fmt: skip
    out = tl.trans(acc) if IS_TURNED else acc  # [ROWS, TILE_N]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    if HALVES == 2:
        up = tl.trans(acc_up) if IS_TURNED else acc_up
        if bias_ptr is not None:
            up += tl.load(bias_ptr + row + n_out).to(tl.float32)[None, :]
        out = gated(out, up, IS_CLAMPED)
        place = pair.to(tl.int64) * token_stride
    else:
        out *= tl.load(weights_ptr + pair)[:, None]
        place = (pair // CHOICES).to(tl.int64) * token_stride + (pair % CHOICES).to(tl.int64) * choice_stride
    inside = is_pair[:, None] & (n < n_out)[None, :]
    tl.store(out_ptr + place[:, None] + n[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
