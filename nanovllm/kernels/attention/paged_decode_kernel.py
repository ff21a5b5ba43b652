"""`paged_decode` in one launch.

A program per sequence would leave the device waiting for the longest one. Split-KV ("flash decoding", Dao et al. 2023)
gives a program one (kv head, split of a sequence), with an online softmax (Milakov & Gimelshein 2018) over its tokens;
the splits, cut by `split_contexts`, are then merged (`decode_merge.py`). That needs no second launch: of a sequence's
programs the last to arrive, by an atomic count, merges all.

What `qk_norm_rope_store` does for prompts, each program does here for the few heads it needs: a launch of its own would
cost more than those few hundred numbers.

The few query heads of a kv head stand where matrix units want the *smaller* factor: scores are K qᵀ, `[tokens, heads]`,
with 8 columns where q Kᵀ would have 16 rows, mostly padding. That, and tiles copied by the device's copy engine (TMA)
and not by threads, is energy: a large GPU that decodes draws all the power it may have, and what a kernel wastes the
clock pays for.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from nanovllm.kernels.attention.decode_merge import MERGE_ELEMENTS, merge_splits
from nanovllm.kernels.attention.decode_splits import SPLIT_FIELDS, SPLIT_MULTIPLE, DecodeSplits
from nanovllm.kernels.attention.own_token import own_token
from nanovllm.kernels.attention.paged_kv import (
    check_caches,
    fetch_tile,
    kv_offsets,
    next_power_of_2,
    tile_blocks,
)
from nanovllm.kernels.constants import LOG2_E
from nanovllm.kernels.device import is_hopper, multiprocessors, shared_memory_bytes
from nanovllm.kernels.early_launch import LINE_BYTES, early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import TensorDescriptor, tl, triton

# Measured on an H100 and an H200: docs/performance.md; benchmarks/paged_attention.py measures alternatives.
TILE_BYTES = 16 * 1024  # of K a loop iteration: 64 tokens of 128 bf16
MAX_STAGES = 3  # of the load pipeline
# Programs a multiprocessor, were no sequence cut: how many splits there are is known on the device only.
MANY = 4  # from which on it has enough to do meanwhile, and 2 stages suffice
FEW = 2  # up to which they wait together: a later one would ask for lines twice in a row
MIN_TILE = 16  # tokens: what a dot sums over
NUM_WARPS = 2
MIN_COLUMNS = 8  # of the second factor that matrix units take: heads, padded


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Launch parameters: tokens a loop iteration, warps a program, depth of the load pipeline."""

    tile: int
    num_warps: int
    num_stages: int


@lru_cache
def decode_config(head_dim: int, itemsize: int, shared_memory: int, is_many: bool = False) -> DecodeConfig:
    """The launch parameters for a head dimension, an element size and a program's shared memory, both in bytes.

    `is_many`: a multiprocessor has MANY programs or more.
    """
    token_bytes = next_power_of_2(head_dim) * itemsize
    tile = max(MIN_TILE, min(SPLIT_MULTIPLE, TILE_BYTES // token_bytes))
    # n stages are n-1 buffers of K and V in flight; 12 KiB are left to the query and to layout conversions.
    fitting = 1 + (shared_memory - 12 * 1024) // (2 * tile * token_bytes)
    num_warps = NUM_WARPS if itemsize <= 2 else 2 * NUM_WARPS  # float32 dots run on ordinary registers: spread them
    num_stages = max(1, min(2 if is_many else MAX_STAGES, fitting))
    return DecodeConfig(tile=tile, num_warps=num_warps, num_stages=num_stages)


def paged_decode_triton(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    splits: DecodeSplits,
    scale: float,
    out: torch.Tensor,
    config: DecodeConfig | None = None,
) -> None:
    """`paged_decode` in one launch; `config` overrides the default launch parameters.

    Raises ValueError for caches whose layouts differ or are not contiguous within a block, for one norm of two, for
    splits of fewer sequences or other heads, and for a tile that does not divide all splits.
    """
    check_caches(out, k_cache, v_cache)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must both be given, or neither")
    num_seqs, num_heads, head_dim = out.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    splits.require(num_seqs, num_kv_heads)
    load = num_seqs * num_kv_heads / multiprocessors(qkv.device)
    if config is None:
        config = decode_config(head_dim, qkv.element_size(), shared_memory_bytes(qkv.device), is_many=load >= MANY)
    if config.tile < MIN_TILE or SPLIT_MULTIPLE % config.tile:
        raise ValueError(f"tile={config.tile}: must divide {SPLIT_MULTIPLE} and be at least {MIN_TILE}")
    early = early_launch(qkv)
    group = num_heads // num_kv_heads
    padded_dim, padded_group = next_power_of_2(head_dim), next_power_of_2(group)
    k_tiles, v_tiles = (_tiles(cache, config.tile) for cache in (k_cache, v_cache))
    # The kv head varies fastest: programs that run together read neighbouring heads of the same blocks, and the idle
    # slots, which are the last, start when the device is draining anyway.
    _decode_kernel[(num_kv_heads, num_seqs + splits.target_splits)](
        qkv, q_weight, k_weight, cos_sin, k_cache, v_cache, k_tiles, v_tiles, out, block_table, rows, seq_lens,
        splits.table, splits.partial_out, splits.partial_lse, splits.arrivals, eps, scale * LOG2_E,
        qkv.stride(0), cos_sin.stride(0), out.stride(0), out.stride(1), k_cache.stride(0), block_table.stride(0),
        GROUP=group,
        PADDED_GROUP=padded_group,
        HEADS=max(MIN_COLUMNS, padded_group),
        OWN_ROWS=max(MIN_COLUMNS, next_power_of_2(group + 2)),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        HALF=cos_sin.shape[1] // 2,
        BLOCK_SIZE=block_size,
        TILE=config.tile,
        TILED=k_tiles is not None,
        MERGE_SPLITS=max(2, MERGE_ELEMENTS // (padded_group * padded_dim)),
        SPLIT_FIELDS=SPLIT_FIELDS,
        LINE=LINE_BYTES // qkv.element_size(),
        FETCH=early["EARLY"] and load <= FEW,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **early,
    )  # fmt: skip


def _tiles(cache: torch.Tensor, tile: int) -> TensorDescriptor | None:
    """A cache as tiles of `tile` tokens that the copy engine takes; None where there is none, or it could not."""
    *_, block_size, head_dim = cache.shape
    is_aligned = (cache.data_ptr() | head_dim * cache.element_size()) % 16 == 0
    if not is_hopper(cache.device) or not cache.is_contiguous() or block_size % tile or not is_aligned:
        return None
    shape, strides = [cache.numel() // head_dim, head_dim], [head_dim, 1]
    return TensorDescriptor(cache, shape, strides, [tile, next_power_of_2(head_dim)])


@triton.jit
def _attend(q, k, v, valid, top, mass, acc, scale_log2):
    """A tile's step of the online softmax: `q [dim, heads]`, `k` and `v [TILE, dim]`, `acc [dim, heads]`.

    `mass [TILE, heads]` is summed over the tokens in the end only: their sum would have all warps wait for each other.
    """
    scores = tl.where(valid, tl.dot(k, q, input_precision="ieee"), float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 0) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_top[None, :])
    decay = tl.exp2(top - new_top)[None, :]
    return (
        new_top,
        mass * decay + weights,
        tl.dot(tl.trans(v), weights.to(v.dtype), acc * decay, input_precision="ieee"),
    )


@triton.jit
def _decode_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    k_ptr,
    v_ptr,
    k_tiles,
    v_tiles,
    out_ptr,
    table_ptr,
    rows_ptr,
    seq_lens_ptr,
    splits_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    arrivals_ptr,
    eps,
    scale_log2,
    stride_qkv,
    stride_cos_sin,
    stride_out_seq,
    stride_out_head,
    stride_block,
    stride_row,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TILED: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
    SPLIT_FIELDS: tl.constexpr,
    LINE: tl.constexpr,
    FETCH: tl.constexpr,
    EARLY: tl.constexpr,
):
    split = tl.program_id(1)
    seq = tl.load(splits_ptr + split * SPLIT_FIELDS)
    if seq < 0:
        wait_for_previous(EARLY)
        return
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    num_heads = num_kv_heads * GROUP
    begin = tl.load(splits_ptr + split * SPLIT_FIELDS + 1)
    end = tl.load(splits_ptr + split * SPLIT_FIELDS + 2)
    partial_index = tl.load(splits_ptr + split * SPLIT_FIELDS + 3)
    first_partial = tl.load(splits_ptr + split * SPLIT_FIELDS + 4)
    num_splits = tl.load(splits_ptr + split * SPLIT_FIELDS + 5)
    table_ptr += tl.load(rows_ptr + seq).to(tl.int64) * stride_row
    length = tl.load(seq_lens_ptr + seq)
    position = tl.maximum(length - 1, 0)
    own_block = tl.load(table_ptr + position // BLOCK_SIZE, mask=length > 0, other=0).to(tl.int64)
    own_slot = own_block * stride_block + (kv_head * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM

    dims = tl.arange(0, PADDED_DIM)
    blocks = tile_blocks(table_ptr, begin, end, BLOCK_SIZE, TILE)
    rest = begin
    if TILED:  # the tile that the newest token is in: what this program's threads store, the copy engine may not see
        rest = begin + (tl.minimum(end, position) - begin) // TILE * TILE
    if FETCH and PADDED_DIM % LINE == 0:
        last = tile_blocks(table_ptr, rest, end, BLOCK_SIZE, TILE)
        fetch_tile(k_ptr, v_ptr, last, rest, end, kv_head, stride_block, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, LINE)
        if TILED:
            fetch_tile(
                k_ptr, v_ptr, blocks, begin, rest, kv_head, stride_block, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, LINE
            )
    q = own_token(
        qkv_ptr + seq.to(tl.int64) * stride_qkv,
        q_weight_ptr,
        k_weight_ptr,
        cos_sin_ptr + position.to(tl.int64) * stride_cos_sin,
        k_ptr,
        v_ptr,
        own_slot,
        (length > 0) & (end == length),  # the last split's programs store
        kv_head,
        num_kv_heads,
        eps,
        GROUP,
        OWN_ROWS,
        HEAD_DIM,
        PADDED_DIM,
        HALF,
        EARLY,
    )
    tl.debug_barrier()  # what this program's threads have stored, the loop below may read

    if OWN_ROWS > HEADS:
        q, _ = tl.split(tl.permute(tl.reshape(q, [2, HEADS, PADDED_DIM]), [1, 2, 0]))
    q = tl.trans(q)

    top = tl.full([HEADS], float("-inf"), tl.float32)
    mass = tl.zeros([TILE, HEADS], tl.float32)  # to be summed over the tokens in the end
    acc = tl.zeros([PADDED_DIM, HEADS], tl.float32)
    if TILED:
        for start in range(begin, rest, TILE):
            place = ((blocks * num_kv_heads + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE).to(tl.int32)
            blocks = tile_blocks(table_ptr, start + TILE, end, BLOCK_SIZE, TILE)
            k, v = k_tiles.load([place, 0]), v_tiles.load([place, 0])
            top, mass, acc = _attend(q, k, v, True, top, mass, acc, scale_log2)
    for start in tl.range(rest, end, TILE, num_stages=1 if TILED else None):
        offsets = kv_offsets(blocks, start, kv_head, stride_block, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE)
        blocks = tile_blocks(table_ptr, start + TILE, end, BLOCK_SIZE, TILE)
        valid = (start + tl.arange(0, TILE) < end)[:, None]
        # Slots past the end hold anything, NaN included, and 0 * NaN is NaN: they must be loaded as zeros. The mask
        # is constant along head_dim, so it costs a predicate a row and no vector width.
        kv_mask = valid
        if HEAD_DIM != PADDED_DIM:
            kv_mask = kv_mask & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offsets, mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + offsets, mask=kv_mask, other=0.0)
        top, mass, acc = _attend(q, k, v, valid, top, mass, acc, scale_log2)
    mass = tl.sum(mass, 0)
    acc = tl.trans(acc)
    acc = acc / tl.where(mass > 0, mass, 1.0)[:, None]  # a padding entry has no mass and gets zeros

    out_head_ptr = out_ptr + seq.to(tl.int64) * stride_out_seq + kv_head * GROUP * stride_out_head
    heads = tl.arange(0, HEADS)
    query_mask = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    if num_splits == 1:
        out_ptrs = out_head_ptr + heads[:, None] * stride_out_head + dims[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=query_mask)
        return

    partial_heads = partial_index.to(tl.int64) * num_heads + kv_head * GROUP + heads
    tl.store(partial_out_ptr + partial_heads[:, None] * HEAD_DIM + dims[None, :], acc, mask=query_mask)
    tl.store(partial_lse_ptr + partial_heads, top + tl.log2(mass), mask=heads < GROUP)
    # The barrier puts all of this program's stores before its one thread's release; the acquire of whoever comes
    # last makes everybody's stores visible to it.
    tl.debug_barrier()
    arrival_ptr = arrivals_ptr + seq * num_kv_heads + kv_head
    arrived = tl.atomic_add(arrival_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == num_splits - 1:
        tl.store(arrival_ptr, 0)
        merged = merge_splits(
            partial_out_ptr, partial_lse_ptr, first_partial, num_splits, kv_head, num_heads,
            GROUP, PADDED_GROUP, HEAD_DIM, PADDED_DIM, MERGE_SPLITS,
        )  # fmt: skip
        group_heads = tl.arange(0, PADDED_GROUP)
        merged_ptrs = out_head_ptr + group_heads[:, None] * stride_out_head + dims[None, :]
        merged_mask = (group_heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(merged_ptrs, merged.to(out_ptr.dtype.element_ty), mask=merged_mask)
