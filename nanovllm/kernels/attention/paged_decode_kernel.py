"""`paged_decode` in one launch.

With a program for each sequence, the device would wait for the longest one. Here a program takes one kv head and one
split of a sequence ("flash decoding", Dao et al. 2023), as `split_contexts` has cut it, and runs an online softmax
(Milakov & Gimelshein 2018) over the split's tokens. A sequence's programs count their arrivals with an atomic, and the
last one merges all partial results (`decode_merge.py`), so there is no second launch.

Each program also does for its few heads what `qk_norm_rope_store` does for prompts (`own_token.py`): a launch would
cost more than those few hundred numbers.

Two choices save energy. A large GPU that decodes draws all the power it may, so what a kernel wastes slows the clock:

- Scores are K qᵀ, `[tokens, heads]`: the few query heads of a kv head are the second factor of the product, which
  matrix units pad to 8 columns. As the first factor, in q Kᵀ, they would be padded to 16 rows.
- The device's copy engine (TMA) copies tiles, not the threads.

A layer without window, soft cap and sinks has None for them, and a kernel without a trace of them.
"""

import torch

from nanovllm.kernels.attention.decode_config import FEW, MANY, MIN_TILE, DecodeConfig, decode_config
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
from nanovllm.kernels.attention.sinks import sink_mass
from nanovllm.kernels.attention.soft_cap import cap_score, score_factors
from nanovllm.kernels.device import is_hopper, multiprocessors, shared_memory_bytes
from nanovllm.kernels.early_launch import LINE_BYTES, early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import TensorDescriptor, tl, triton

MIN_COLUMNS = 8  # least columns of a matrix unit's second factor: heads are padded to it


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
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """`paged_decode` in one launch; `config` overrides the default launch parameters.

    The window is the one that `splits` were cut for; sinks are `[heads]`.
    Raises ValueError for caches whose layouts differ or are not contiguous within a block, for one norm of two, for
    splits of fewer sequences or other heads, and for a tile that does not divide all splits.
    """
    check_caches(out, k_cache, v_cache)
    if (q_weight is None) != (k_weight is None) or (q_weight is not None and q_weight.dtype != k_weight.dtype):
        raise ValueError("q_weight and k_weight must both be given, or neither, and have one dtype")
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
    cap_rate, scale_log2 = score_factors(scale, soft_cap)
    k_tiles, v_tiles = (_tiles(cache, config.tile) for cache in (k_cache, v_cache))
    # The kv head varies fastest, so programs that run together read neighbouring heads of the same blocks. The idle
    # entries of the table come last, so their programs start when the device runs empty anyway.
    _decode_kernel[(num_kv_heads, num_seqs + splits.target_splits)](
        qkv, q_weight, k_weight, cos_sin, k_cache, v_cache, k_tiles, v_tiles, out, block_table, rows, seq_lens,
        splits.table, splits.partial_out, splits.partial_lse, splits.arrivals, sinks,
        eps, cap_rate, scale_log2, splits.window,
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
    """A cache as tiles of `tile` tokens for the copy engine; None if the device has none or it cannot copy them."""
    *_, block_size, head_dim = cache.shape
    is_aligned = (cache.data_ptr() | head_dim * cache.element_size()) % 16 == 0
    if not is_hopper(cache.device) or not cache.is_contiguous() or block_size % tile or not is_aligned:
        return None
    shape, strides = [cache.numel() // head_dim, head_dim], [head_dim, 1]
    return TensorDescriptor(cache, shape, strides, [tile, next_power_of_2(head_dim)])


@triton.jit
def _attend(q, k, v, valid, top, mass, acc, cap_rate, scale_log2):
    """Take one tile into the online softmax: `q [dim, heads]`, `k` and `v [TILE, dim]`, `acc [dim, heads]`.

    The caller sums `mass [TILE, heads]` over the tokens once, at the end: in each step the sum would make all warps
    wait for each other.
    """
    scores = cap_score(tl.dot(k, q, input_precision="ieee"), cap_rate)
    scores = tl.where(valid, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 0) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_top[None, :])
    decay = tl.exp2(top - new_top)[None, :]
    return (
        new_top,
        mass * decay + weights,
        tl.dot(tl.trans(v), weights.to(v.dtype), acc * decay, input_precision="ieee"),
    )


@triton.jit(do_not_specialize=["window"])
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
    sinks_ptr,
    eps,
    cap_rate,
    scale_log2,
    window,
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

    visible = 0  # the first token that the query sees
    if window is not None:
        visible = tl.maximum(length - window, 0)
        begin = tl.maximum(begin, visible // TILE * TILE)  # so that each tile has a token that it sees
    dims = tl.arange(0, PADDED_DIM)
    blocks = tile_blocks(table_ptr, begin, end, BLOCK_SIZE, TILE)
    rest = begin
    if TILED:  # up to the newest token's tile: the copy engine may not see what this program's threads store there
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
        (length > 0) & (end == length),  # the programs of the last split store
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
    tl.debug_barrier()  # the loop below may read what other threads of this program have stored

    if OWN_ROWS > HEADS:
        q, _ = tl.split(tl.permute(tl.reshape(q, [2, HEADS, PADDED_DIM]), [1, 2, 0]))
    q = tl.trans(q)

    top = tl.full([HEADS], float("-inf"), tl.float32)
    mass = tl.zeros([TILE, HEADS], tl.float32)  # see `_attend`
    acc = tl.zeros([PADDED_DIM, HEADS], tl.float32)
    if TILED:
        for start in range(begin, rest, TILE):
            place = ((blocks * num_kv_heads + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE).to(tl.int32)
            blocks = tile_blocks(table_ptr, start + TILE, end, BLOCK_SIZE, TILE)
            k, v = k_tiles.load([place, 0]), v_tiles.load([place, 0])
            valid = True
            if window is not None:
                valid = (start + tl.arange(0, TILE) >= visible)[:, None]
            top, mass, acc = _attend(q, k, v, valid, top, mass, acc, cap_rate, scale_log2)
    for start in tl.range(rest, end, TILE, num_stages=1 if TILED else None):
        offsets = kv_offsets(blocks, start, kv_head, stride_block, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE)
        blocks = tile_blocks(table_ptr, start + TILE, end, BLOCK_SIZE, TILE)
        valid = (start + tl.arange(0, TILE) < end)[:, None]
        if window is not None:
            valid = valid & (start + tl.arange(0, TILE) >= visible)[:, None]
        # Slots past the end hold anything, even NaN, and 0 * NaN is NaN: so load them as zeros; so do the blocks below
        # a window, which may be another sequence's by now. The mask is constant along head_dim, so it costs one
        # predicate for each row and no vector width.
        kv_mask = valid
        if HEAD_DIM != PADDED_DIM:
            kv_mask = kv_mask & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offsets, mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + offsets, mask=kv_mask, other=0.0)
        top, mass, acc = _attend(q, k, v, valid, top, mass, acc, cap_rate, scale_log2)
    mass = tl.sum(mass, 0)
    acc = tl.trans(acc)
    total = mass
    if sinks_ptr is not None:  # once a sequence: of several splits, the merge counts it
        own_heads = tl.minimum(tl.arange(0, HEADS), GROUP - 1)
        total += tl.where(num_splits == 1, sink_mass(sinks_ptr + kv_head * GROUP + own_heads, top), 0.0)
    acc = acc / tl.where(mass > 0, total, 1.0)[:, None]  # a padding entry has no mass and gets zeros

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
    # The barrier orders the stores of all threads before the release, which one thread makes. By its acquire, the last
    # program to arrive sees the stores of all programs.
    tl.debug_barrier()
    arrival_ptr = arrivals_ptr + seq * num_kv_heads + kv_head
    arrived = tl.atomic_add(arrival_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == num_splits - 1:
        tl.store(arrival_ptr, 0)
        merged = merge_splits(
            partial_out_ptr, partial_lse_ptr, sinks_ptr, first_partial, num_splits, kv_head, num_heads,
            GROUP, PADDED_GROUP, HEAD_DIM, PADDED_DIM, MERGE_SPLITS,
        )  # fmt: skip
        group_heads = tl.arange(0, PADDED_GROUP)
        merged_ptrs = out_head_ptr + group_heads[:, None] * stride_out_head + dims[None, :]
        merged_mask = (group_heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(merged_ptrs, merged.to(out_ptr.dtype.element_ty), mask=merged_mask)
