"""`paged_prefill` in one launch.

FlashAttention-2 (Dao 2023): a program keeps a tile of queries on chip, and streams over the keys with an online softmax
in float32. The tile's rows can hold all query heads of a kv head, so that the program reads K and V once for the group.
Keys that all queries of the tile see need no mask. The program masks the keys at the diagonal, and never reads those
beyond it; likewise at the other end of a window. A layer without window, soft cap and sinks has None for them, and a
kernel without a trace of them.

The grid must not depend on lengths that only the device knows. So sequence i of a step gets the tiles from
`query_start[i] // BLOCK_Q + i` on, which is always enough, and a program finds its sequence by counting the sequences
whose first tile it has passed (the indexing of vLLM's unified Triton attention). Programs without work return at once.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from nanovllm.kernels.attention.paged_kv import (
    check_caches,
    kv_offsets,
    next_power_of_2,
    tile_blocks,
)
from nanovllm.kernels.attention.sinks import sink_mass
from nanovllm.kernels.attention.soft_cap import cap_score, score_factors
from nanovllm.kernels.device import shared_memory_bytes
from nanovllm.kernels.triton_shim import tl, triton

# Tuned on an H100; benchmarks/paged_attention.py measures alternatives.
QUERY_BYTES = 16 * 1024  # of q a program: 64 rows of 128 bf16
TILE_BYTES = 16 * 1024  # of K a loop iteration: 64 tokens of 128 bf16
MAX_ROWS, MAX_TILE = 128, 128
MAX_STAGES = 3
NUM_WARPS = 4
PACK_GROUP = True
SEQS_AT_ONCE = 128  # entries of query_start that a program reads in one load


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Launch parameters: rows of q a program, tokens a loop iteration, warps, depth of the load pipeline.

    `pack`: rows are (token, head of a kv head's group) pairs; otherwise tokens of one head.
    """

    rows: int
    tile: int
    num_warps: int
    num_stages: int
    pack: bool


@lru_cache
def prefill_config(head_dim: int, itemsize: int, shared_memory: int) -> PrefillConfig:
    """The launch parameters for a head dimension, an element size and a program's shared memory (both in bytes)."""
    row_bytes = next_power_of_2(head_dim) * itemsize
    max_rows = MAX_ROWS if itemsize <= 2 else 32  # float32 dots keep operands in registers: more would spill
    if row_bytes == 512 and itemsize == 2:  # a head_dim of 256: fewer rows would leave matrix units idle
        return PrefillConfig(*((128, 32, 8, 3) if shared_memory >= 160 * 1024 else (64, 32, 4, 2)), PACK_GROUP)
    rows = max(16, min(max_rows, QUERY_BYTES // row_bytes))
    tile = max(16, min(MAX_TILE, TILE_BYTES // row_bytes))
    # n stages need n-1 buffers of K and V, beside q. (On Hopper n, but there shared memory does not limit them.)
    fitting = 1 + (shared_memory - rows * row_bytes - 2 * 1024) // (2 * tile * row_bytes)
    return PrefillConfig(rows, tile, NUM_WARPS, max(1, min(MAX_STAGES, fitting)), PACK_GROUP)


def paged_prefill_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    num_tokens: int | None = None,
    config: PrefillConfig | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """`paged_prefill` in one launch; `config` overrides the default launch parameters.

    Raises ValueError for caches whose layouts differ or are not contiguous within a block.
    """
    check_caches(q, k_cache, v_cache)
    cap_rate, scale_log2 = score_factors(scale, soft_cap)
    num_seqs, num_heads, head_dim = rows.shape[0], q.shape[1], q.shape[2]
    _, num_kv_heads, block_size, _ = k_cache.shape
    if config is None:
        config = prefill_config(head_dim, q.element_size(), shared_memory_bytes(q.device))
    if num_seqs == 0:
        return
    group = num_heads // num_kv_heads
    pack = group if config.pack else 1
    tile_rows = max(config.rows, next_power_of_2(pack))
    block_q = tile_rows // pack
    num_tiles = (q.shape[0] if num_tokens is None else num_tokens) // block_q + num_seqs
    _prefill_kernel[(num_heads // pack, num_tiles)](
        q,
        k_cache,
        v_cache,
        out,
        block_table,
        rows,
        query_start,
        seq_lens,
        sinks,
        cap_rate,
        scale_log2,
        window,
        num_seqs,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        k_cache.stride(0),
        block_table.stride(0),
        GROUP=group,
        PACK=pack,
        ROWS=tile_rows,
        BLOCK_Q=block_q,
        HEAD_DIM=head_dim,
        PADDED_DIM=next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        TILE=config.tile,
        SEQS=SEQS_AT_ONCE,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@triton.jit
def _soften(scores, top, mass, scale_log2, SEES_ALL: tl.constexpr):
    """Take `scores [queries, TILE]` into the online softmax; unless SEES_ALL, a query may have seen no key yet.

    Returns (weights of this tile, decay by which to multiply earlier sums, new top, new mass).
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    base = new_top
    if not SEES_ALL:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf less -inf is NaN
    weights = tl.exp2(scores * scale_log2 - base[:, None])
    decay = tl.exp2(top - base)
    return weights, decay, new_top, mass * decay + tl.sum(weights, 1)


@triton.jit
def _attend(
    q,
    positions,
    top,
    mass,
    acc,
    first,
    last,
    k_ptr,
    v_ptr,
    table_ptr,
    kv_head,
    visible,
    cap_rate,
    scale_log2,
    window,
    stride_block,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Take keys first .. last-1 into the online softmax; unless MASKED, every query sees all of them.

    With a window no query sees a key before `visible`.
    """
    dims = tl.arange(0, PADDED_DIM)
    blocks = tile_blocks(table_ptr, first, last, BLOCK_SIZE, TILE)
    for start in range(first, last, TILE):
        offsets = kv_offsets(blocks, start, kv_head, stride_block, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE)
        blocks = tile_blocks(table_ptr, start + TILE, last, BLOCK_SIZE, TILE)
        tokens = start + tl.arange(0, TILE)
        kv_mask = (dims < HEAD_DIM)[None, :]
        if MASKED:
            # Slots past the last token hold anything, even NaN, and 0 * NaN is NaN: so load them as zeros.
            kv_mask = kv_mask & (tokens < last)[:, None]
            if window is not None:  # blocks below the window may be another sequence's by now
                kv_mask = kv_mask & (tokens >= visible)[:, None]
        k = tl.load(k_ptr + offsets, mask=kv_mask, other=0.0)
        scores = cap_score(tl.dot(q, tl.trans(k), input_precision="ieee"), cap_rate)
        if MASKED:
            sees = tokens[None, :] <= positions[:, None]
            if window is not None:
                sees = sees & (tokens[None, :] > positions[:, None] - window)
            scores = tl.where(sees, scores, float("-inf"))
        # Without a window every query sees token 0, which is in the first tile, so `top` is finite from there on.
        weights, decay, top, mass = _soften(scores, top, mass, scale_log2, window is None or not MASKED)
        v = tl.load(v_ptr + offsets, mask=kv_mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return top, mass, acc


@triton.jit(do_not_specialize=["num_seqs", "window"], do_not_specialize_on_alignment=["rows_ptr", "seq_lens_ptr"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    rows_ptr,
    query_start_ptr,
    seq_lens_ptr,
    sinks_ptr,
    cap_rate,
    scale_log2,
    window,
    num_seqs,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_block,
    stride_row,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SEQS: tl.constexpr,
):
    # Later tiles of a sequence see more keys: start them first, so that short ones fill the end of the grid.
    index = tl.num_programs(1) - 1 - tl.program_id(1)
    origin = tl.load(query_start_ptr)
    seq = -1
    for base in range(0, num_seqs, SEQS):
        entries = base + tl.arange(0, SEQS)
        starts = tl.load(query_start_ptr + entries, mask=entries < num_seqs, other=0)
        passed = (entries < num_seqs) & ((starts - origin) // BLOCK_Q + entries <= index)
        seq += tl.sum(passed.to(tl.int32))
    query_begin = tl.load(query_start_ptr + seq)
    num_queries = tl.load(query_start_ptr + seq + 1) - query_begin
    first_query = (index - (query_begin - origin) // BLOCK_Q - seq) * BLOCK_Q
    row = tl.load(rows_ptr + seq).to(tl.int64)
    if (first_query >= num_queries) | (row < 0):
        return

    head = tl.program_id(0) * PACK
    kv_head = head // GROUP
    lanes = tl.arange(0, ROWS)
    queries = first_query + lanes // PACK
    heads = head + lanes % PACK
    dims = tl.arange(0, PADDED_DIM)
    row_mask = (queries < num_queries) & (lanes < BLOCK_Q * PACK)
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (query_begin + queries).to(tl.int64)
    q_offsets = (tokens * stride_q_token + heads * stride_q_head)[:, None] + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=mask, other=0.0)

    context = tl.load(seq_lens_ptr + seq) - num_queries
    positions = context + queries
    table_ptr += row * stride_row
    end = context + tl.minimum(first_query + BLOCK_Q, num_queries)
    diagonal = (context + first_query + 1) // TILE * TILE  # up to here every query sees every key

    visible = 0  # the first key that the tile's first query sees
    begin = 0  # where all the tile's queries begin to see every key
    if window is not None:
        visible = tl.maximum(context + first_query - window + 1, 0)
        begin = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), TILE) * TILE, diagonal)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    if window is not None:
        top, mass, acc = _attend(
            q, positions, top, mass, acc, visible // TILE * TILE, begin, k_ptr, v_ptr, table_ptr, kv_head,
            visible, cap_rate, scale_log2, window, stride_block, True, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE,
        )  # fmt: skip
    top, mass, acc = _attend(
        q, positions, top, mass, acc, begin, diagonal, k_ptr, v_ptr, table_ptr, kv_head,
        visible, cap_rate, scale_log2, window, stride_block, False, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE,
    )  # fmt: skip
    top, mass, acc = _attend(
        q, positions, top, mass, acc, diagonal, end, k_ptr, v_ptr, table_ptr, kv_head,
        visible, cap_rate, scale_log2, window, stride_block, True, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE,
    )  # fmt: skip
    if sinks_ptr is not None:
        mass += sink_mass(sinks_ptr + heads, top)
    out_offsets = (tokens * stride_out_token + heads * stride_out_head)[:, None] + dims[None, :]
    tl.store(out_ptr + out_offsets, (acc / mass[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
