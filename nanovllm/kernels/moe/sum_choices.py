"""Adds up the rows that a token's experts have left: `[tokens, k, n]` -> `[tokens, n]`, in float32, rounded once.

It reads `k` and writes one row of n elements a token. The product before it could leave float32 slices for the next
norm to add up instead: that saves this launch, some 2 microseconds, but a slice's element is written and read again in
4 bytes instead of 2, which is `4 n (k - 1)` bytes more a token, 57 KB for k = 8 and n = 2048. So slices are for up to
some 128 tokens (`experts.py`).
"""

import torch

from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import tl, triton


def sum_choices_reference(rows: torch.Tensor, ids: torch.Tensor, first: int, num_experts: int) -> torch.Tensor:
    """`sum_choices_triton` in PyTorch."""
    is_here = (ids >= first) & (ids < first + num_experts)
    return torch.where(is_here[..., None], rows.float(), 0.0).sum(dim=1).to(rows.dtype)


def sum_choices_triton(rows: torch.Tensor, ids: torch.Tensor, first: int, num_experts: int) -> torch.Tensor:
    """The sum over `rows [tokens, k, n]` of those whose expert, in `ids [tokens, k]`, is here; the others' are unread.

    Args:
        first, num_experts: experts `first` to `first + num_experts - 1` are here.
    """
    num_tokens, k, n = rows.shape
    out = torch.empty((num_tokens, n), dtype=rows.dtype, device=rows.device)
    tile = min(1024, triton.next_power_of_2(n))
    _sum_choices_kernel[(num_tokens, triton.cdiv(n, tile))](
        rows, ids, out, n, first, num_experts, K=k, TILE=tile, num_warps=max(tile // 256, 1), **early_launch(rows)
    )
    return out


@triton.jit(do_not_specialize=["first", "num_experts"])
def _sum_choices_kernel(
    rows_ptr, ids_ptr, out_ptr, n, first, num_experts, K: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < n
    total = tl.zeros([TILE], tl.float32)
    wait_for_previous(EARLY)
    for choice in tl.static_range(K):
        expert = tl.load(ids_ptr + token * K + choice) - first
        is_here = (expert >= 0) & (expert < num_experts)
        row = tl.load(rows_ptr + (token * K + choice) * n + column, mask=inside & is_here, other=0.0)
        total += row.to(tl.float32)
    tl.store(out_ptr + token * n + column, total.to(out_ptr.dtype.element_ty), mask=inside)
