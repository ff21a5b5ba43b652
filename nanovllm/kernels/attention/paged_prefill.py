"""Prefill attention: chunks of prompts, causally, against the paged KV cache that already holds the chunk itself.

    out[t, h] = softmax(scale * q[t, h] @ K[: p + 1].T) @ V[: p + 1]       p: position of token t in its sequence

FLOPs: 4 * heads * head_dim per (query token, visible key) pair. Bytes: q and out once, K and V once per BLOCK_Q query
tokens, mostly out of L2: compute-bound from a few dozen query tokens on.

FlashAttention-2 (Dao 2023): a program keeps a tile of queries on chip and streams over the keys with an online softmax
in float32. All the query heads that share a kv head can be packed into the rows of one tile, so that K and V are read
once for the group. Tiles that every query of the program sees run without any mask; only those at the diagonal are
masked, and those beyond it are never touched.

The grid must not depend on lengths that only the device knows: sequence i of a step gets the tiles from
`query_start[i] // BLOCK_Q + i` on, which is always room enough, and a program finds its sequence by counting how many
such firsts it has passed (the indexing of vLLM's unified Triton attention). Programs without work leave at once.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from nanovllm.kernels.attention.contract import AttentionSpec, ChunkBatch, KVCache
from nanovllm.kernels.attention.cpu_attention import paged_prefill_cpu
from nanovllm.kernels.attention.paged_kv import (
    check_caches,
    gather_kv,
    kv_offsets,
    next_power_of_2,
    tile_blocks,
)
from nanovllm.kernels.constants import LOG2_E
from nanovllm.kernels.device import shared_memory_bytes
from nanovllm.kernels.triton_shim import tl, triton

# Tuned on an H100; benchmarks/paged_attention.py measures alternatives.
QUERY_BYTES = 16 * 1024  # of q a program: 64 rows of 128 bf16
TILE_BYTES = 16 * 1024  # of K a loop iteration: 64 tokens of 128 bf16
MAX_ROWS, MAX_TILE = 128, 128
MAX_STAGES = 3
NUM_WARPS = 4
PACK_GROUP = True
SEQS_AT_ONCE = 128  # of query_start that a program looks at in one load


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
    """The launch parameters for a head dimension, an element size and a program's shared memory, both in bytes."""
    row_bytes = next_power_of_2(head_dim) * itemsize
    max_rows = MAX_ROWS if itemsize <= 2 else 32  # float32 dots run on ordinary registers, which more rows would spill
    rows = max(16, min(max_rows, QUERY_BYTES // row_bytes))
    tile = max(16, min(MAX_TILE, TILE_BYTES // row_bytes))
    # n stages are n-1 buffers of K and V, beside q. (On Hopper n, but there shared memory is no limit.)
    fitting = 1 + (shared_memory - rows * row_bytes - 2 * 1024) // (2 * tile * row_bytes)
    return PrefillConfig(rows, tile, NUM_WARPS, max(1, min(MAX_STAGES, fitting)), PACK_GROUP)


def paged_prefill(q: torch.Tensor, spec: AttentionSpec, cache: KVCache, chunks: ChunkBatch, out: torch.Tensor) -> None:
    """Causal attention of the chunks' tokens, through the block table, into `out`.

    q and out are `[tokens, heads, head_dim]`, the last dimension contiguous: chunk i's tokens are
    `query_start[i] .. query_start[i+1]-1`, the last of them at position `seq_lens[i]-1`. The first start may be above
    0. Other tokens of `out`, and those of padding (row -1), are not written. On a GPU nothing past a sequence's length
    is read.
    """
    run = paged_prefill_triton if q.is_cuda else paged_prefill_cpu
    where = (chunks.block_table, chunks.rows, chunks.query_start, chunks.seq_lens)
    run(q, *cache, *where, spec.scale, out)


def paged_prefill_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """`paged_prefill` in PyTorch, in float32, one sequence after the other."""
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[1]
    starts = query_start.tolist()
    for i, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        if row < 0:
            continue
        queries = q[starts[i] : starts[i + 1]].float().transpose(0, 1)  # [heads, query tokens, head_dim]
        grouped = queries.unflatten(0, (num_kv_heads, num_heads // num_kv_heads))
        keys = gather_kv(k_cache, block_table[row], length).float().unsqueeze(1)
        values = gather_kv(v_cache, block_table[row], length).float().unsqueeze(1)
        positions = torch.arange(length - queries.shape[1], length, device=q.device)
        hidden = torch.arange(length, device=q.device) > positions[:, None]
        scores = (grouped @ keys.transpose(2, 3) * scale).masked_fill(hidden, float("-inf"))
        attended = torch.softmax(scores, dim=-1) @ values
        out[starts[i] : starts[i + 1]] = attended.flatten(0, 1).transpose(0, 1).to(out.dtype)


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
) -> None:
    """`paged_prefill` in one launch; `config` overrides the default launch parameters.

    Raises ValueError for caches whose layouts differ or are not contiguous within a block.
    """
    check_caches(q, k_cache, v_cache)
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
        scale * LOG2_E,
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
def _soften(scores, top, mass, scale_log2):
    """A tile's step of the online softmax, for `scores [queries, TILE]`: their weights, and what decays earlier sums.

    Returns (weights, decay, top, mass), the last two brought up to date.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_top[:, None])
    decay = tl.exp2(top - new_top)
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
    scale_log2,
    stride_block,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Take keys first .. last-1 into the online softmax; unless MASKED, every query sees all of them."""
    dims = tl.arange(0, PADDED_DIM)
    blocks = tile_blocks(table_ptr, first, last, BLOCK_SIZE, TILE)
    for start in range(first, last, TILE):
        offsets = kv_offsets(blocks, start, kv_head, stride_block, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE)
        blocks = tile_blocks(table_ptr, start + TILE, last, BLOCK_SIZE, TILE)
        tokens = start + tl.arange(0, TILE)
        kv_mask = (dims < HEAD_DIM)[None, :]
        if MASKED:
            # Slots past the last token hold anything, NaN included, and 0 * NaN is NaN: they must be loaded as zeros.
            kv_mask = kv_mask & (tokens < last)[:, None]
        k = tl.load(k_ptr + offsets, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        # Every query sees token 0, which is in the first tile: from there on `top` is finite.
        weights, decay, top, mass = _soften(scores, top, mass, scale_log2)
        v = tl.load(v_ptr + offsets, mask=kv_mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return top, mass, acc


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=["rows_ptr", "seq_lens_ptr"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    rows_ptr,
    query_start_ptr,
    seq_lens_ptr,
    scale_log2,
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
    # Later tiles of a sequence see more keys: started first, they leave the short ones to fill the tail of the grid.
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

    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    top, mass, acc = _attend(
        q, positions, top, mass, acc, 0, diagonal, k_ptr, v_ptr, table_ptr, kv_head, scale_log2, stride_block,
        False, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE,
    )  # fmt: skip
    top, mass, acc = _attend(
        q, positions, top, mass, acc, diagonal, end, k_ptr, v_ptr, table_ptr, kv_head, scale_log2, stride_block,
        True, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE,
    )  # fmt: skip
    out_offsets = (tokens * stride_out_token + heads * stride_out_head)[:, None] + dims[None, :]
    tl.store(out_ptr + out_offsets, (acc / mass[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
