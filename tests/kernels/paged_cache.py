"""Random paged caches for the attention tests, and the oracle: dense attention in float64, one head at a time."""

from dataclasses import dataclass

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


def forget_what_no_query_sees(case: PagedCase, num_queries: list[int], window: int | None) -> None:
    """Give back the blocks that lie wholly below the window of each sequence's oldest query.

    They and their entries of the block table are stale then: NaN, and other sequences' blocks or block 0.
    """
    block_size, unused = case.k_cache.shape[2], int(case.block_table[case.rows.max(), -1])
    for row, length, queries in zip(case.rows.tolist(), case.seq_lens.tolist(), num_queries, strict=True):
        oldest = 0 if window is None or row < 0 else max(0, length - queries + 1 - window)
        for column in range(oldest // block_size):
            block = int(case.block_table[row, column])
            case.k_cache[block] = case.v_cache[block] = float("nan")
            case.block_table[row, column] = (unused, 0, block)[column % 3]


def dense_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the last `q.shape[0]` tokens, and the same over |values|, which bounds its rounding error.

    q `[tokens, heads, head_dim]`, keys and values `[length, kv_heads, head_dim]`, sinks `[heads]`; float64 results like
    q.
    """
    q, keys, values = q.cpu().double(), keys.double(), values.double()
    num_queries, num_heads, _ = q.shape
    length, num_kv_heads, _ = keys.shape
    ages = torch.arange(length - num_queries, length)[:, None] - torch.arange(length)  # of a key when a query comes
    hidden = (ages < 0) | (ages >= (length if window is None else window))
    out, bound = torch.zeros_like(q), torch.zeros_like(q)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        scores = q[:, head] @ keys[:, kv_head].T * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].cpu().double().expand(num_queries, 1)], dim=1)
        weights = torch.softmax(scores, dim=1)[:, :length]
        out[:, head] = weights @ values[:, kv_head]
        bound[:, head] = weights @ values[:, kv_head].abs()
    return out, bound


def assert_within_rounding(
    actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor, score_error: float = 0.0
) -> None:
    """Each element within what its dtype warrants: the softmax weights are rounded once, and so is the result.

    That is two unit roundoffs, one eps, of the attention over |values|; float32 arithmetic itself gets 5e-6, and what
    large scores are off by (`score_error`) their weights are. A sink far above all scores leaves what underflows.
    """
    error, limits = (actual.cpu().double() - expected).abs(), torch.finfo(actual.dtype)
    allowed = (limits.eps + 5e-6 + score_error) * bound + limits.smallest_normal * limits.eps + 1e-37
    assert bool((error <= allowed).all()), f"error is {(error / allowed).max():.3g} of what is allowed"
