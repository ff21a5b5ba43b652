"""Random paged caches for the attention tests, and the oracle: dense attention in float64, one head at a time."""

import os
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class PagedCase:
    """A paged cache, and the same keys and values as dense tensors. Slots that no kernel may use hold NaN."""

    k_cache: torch.Tensor  # [num_blocks, kv_heads, block_size, head_dim]
    v_cache: torch.Tensor
    block_table: torch.Tensor  # [R, max_blocks] int32
    rows: torch.Tensor  # [S] int32
    seq_lens: torch.Tensor  # [S] int32
    keys: list[torch.Tensor]  # a sequence's [length, kv_heads, head_dim]
    values: list[torch.Tensor]


def make_case(
    seed: int,
    lengths: list[int],
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: str,
) -> PagedCase:
    """Sequences of `lengths` (0: a padding entry, row -1) in shuffled blocks, at rows neither sorted nor dense.

    Slots past a sequence's length, unused blocks, and whatever unused entries of the block table point at are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 3
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    if seed % 2:  # keys and values side by side in each block, or one after the other
        k_cache, v_cache = torch.full((num_blocks, 2, *shape[1:]), float("nan"), dtype=dtype).unbind(1)
    else:
        k_cache, v_cache = torch.full((2, *shape), float("nan"), dtype=dtype).unbind(0)
    ids = torch.randperm(num_blocks, generator=generator).int()
    num_rows = 2 * len(lengths) + 1
    block_table = ids[-1].repeat(num_rows, max(counts) + 2)  # a block of NaN
    rows = torch.randperm(num_rows, generator=generator)[: len(lengths)].int()
    keys, values = [], []
    used = 0
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = ids[used : used + count]
        used += count
        block_table[rows[i], :count] = own
        for cache, dense in ((k_cache, keys), (v_cache, values)):
            dense.append(torch.randn(length, num_kv_heads, head_dim, generator=generator).to(dtype))
            for j, block in enumerate(own.tolist()):
                chunk = dense[-1][j * block_size : (j + 1) * block_size]
                cache[block, :, : chunk.shape[0]] = chunk.transpose(0, 1)
        if length == 0:
            rows[i] = -1
    move = k_cache._base.to(device)  # views must stay views of one tensor
    k_cache, v_cache = move.unbind(1) if seed % 2 else move.unbind(0)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return PagedCase(k_cache, v_cache, block_table.to(device), rows.to(device), seq_lens, keys, values)


def dense_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the last `q.shape[0]` tokens, and the same over |values|, which bounds its rounding error.

    q `[tokens, heads, head_dim]`, keys and values `[length, kv_heads, head_dim]`; float64 results like q.
    """
    q, keys, values = q.cpu().double(), keys.double(), values.double()
    num_queries, num_heads, _ = q.shape
    length, num_kv_heads, _ = keys.shape
    hidden = torch.ones(num_queries, length, dtype=torch.bool).triu(length - num_queries + 1)
    out, bound = torch.zeros_like(q), torch.zeros_like(q)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        scores = q[:, head] @ keys[:, kv_head].T * scale
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=1)
        out[:, head] = weights @ values[:, kv_head]
        bound[:, head] = weights @ values[:, kv_head].abs()
    return out, bound


def assert_within_rounding(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """Each element within what its dtype warrants: the softmax weights are rounded once, and so is the result.

    That is two unit roundoffs, one eps, of the attention over |values|; float32 arithmetic itself gets 5e-6.
    """
    error = (actual.cpu().double() - expected).abs()
    allowed = (torch.finfo(actual.dtype).eps + 5e-6) * bound
    assert bool((error <= allowed).all()), f"error is {(error / allowed).max():.3g} of what is allowed"


def mend_interpreter() -> None:
    """Give Triton's interpreter the arithmetic of bf16: its dot multiplies the bit patterns, and its casts truncate."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert_float, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_to_nearest(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert_float(data, source, target, mode)
        nearest = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
        return nearest.view(torch.int16).numpy().view(np.uint16)

    def dot_of_values(self: object, a: object, b: object, *rest: object) -> object:
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return dot(self, a, b, *rest)

    interpreter._convert_float = convert_to_nearest
    interpreter.InterpreterBuilder.create_dot = dot_of_values


if os.environ.get("TRITON_INTERPRET") == "1":
    mend_interpreter()
