"""All work between the QKV projection and attention, in one launch: QK-norm, RoPE, and the store of K and V.

The kernel RMS-normalizes each head of q and k (Qwen3; arXiv:2505.09388), and rotates the first `rotary_dim` of its
dimensions by the angles of its position (Su et al., 2021, arXiv:2104.09864; halves are paired, as in GPT-NeoX). Then it
writes q to a new tensor, and k and v to the token's slot of the paged cache (Kwon et al., 2023, arXiv:2309.06180).

A token of bf16 takes 4 · (heads + 2 · kv_heads) · head_dim bytes, 4 · rotary_dim bytes of cos and sin, and about 8
FLOPs for each element, so memory is the bound. The kernel computes in float32 and rounds once, at the end.
"""

import torch

from nanovllm.kernels.attention.contract import AttentionSpec, ChunkBatch, KVCache
from nanovllm.kernels.attention.cpu_rope_store import qk_norm_rope_store_cpu
from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import tl, triton


def qk_norm_rope_store(qkv: torch.Tensor, spec: AttentionSpec, cache: KVCache, chunks: ChunkBatch) -> torch.Tensor:
    """Write the chunks' k and v to their slots of `cache` and return q, `[tokens, heads, head_dim]`.

    `qkv [tokens, (heads + 2 * kv_heads) * head_dim]`, whose rows may be strided. On a GPU the positions and slots must
    be older than the last launch: see `early_launch.py`.
    """
    if chunks.places is not None:
        return qk_norm_rope_store_cpu(qkv, spec, cache, chunks.places)
    where = (chunks.positions, spec.cos_sin(qkv.device), chunks.slot_mapping)
    return qk_norm_rope_store_triton(qkv, *spec.norms, *where, *cache, spec.num_heads)


def qk_norm_rope_store_reference(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """`qk_norm_rope_store` in PyTorch, from the tensors themselves.

    Args:
        q_weight, k_weight: `[head_dim]` of the heads' norms, or None for none.
        eps: of the norms.
        positions: `[tokens]` int32.
        cos_sin: `[max_position, rotary_dim]` float32, cosines first; rotary_dim <= head_dim.
        slot_mapping: `[tokens]` int64, block * block_size + offset; -1 stores nothing.
        k_cache, v_cache: `[blocks, kv_heads, block_size, head_dim]`, a block contiguous; written.
    """
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    half = cos_sin.shape[1] // 2
    angles = cos_sin[positions.long(), None]  # [tokens, 1, rotary_dim]
    cos, sin = angles[..., :half], angles[..., half:]

    def normalize_and_rotate(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x.float()
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
        a, b, rest = x.split([half, half, head_dim - 2 * half], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(qkv.dtype)

    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    stored = slot_mapping >= 0
    block, offset = slot_mapping[stored] // block_size, slot_mapping[stored] % block_size
    k_cache[block, :, offset] = normalize_and_rotate(k, k_weight)[stored]
    v_cache[block, :, offset] = v[stored]
    return normalize_and_rotate(q, q_weight)


def qk_norm_rope_store_triton(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """`qk_norm_rope_store` in one launch: a program for each token and up to 16 of its heads, of q, k and v alike."""
    num_tokens = len(qkv)
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    rotary_dim = cos_sin.shape[1]
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    heads = num_heads + 2 * num_kv_heads
    # A decode batch is too small to fill the device with few large programs.
    tile_heads = min(16 if num_tokens > 1024 else 8, triton.next_power_of_2(heads))
    _qk_norm_rope_store_kernel[(num_tokens, triton.cdiv(heads, tile_heads))](
        qkv,
        q_weight,
        k_weight,
        positions,
        cos_sin,
        slot_mapping,
        q,
        k_cache,
        v_cache,
        qkv.stride(0),
        cos_sin.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        HALF=rotary_dim // 2,
        TILE_HEADS=tile_heads,
        TILE_HALF=triton.next_power_of_2(max(rotary_dim // 2, 1)),  # without rope a tile of which nothing is read
        TILE_REST=triton.next_power_of_2(head_dim - rotary_dim) if rotary_dim < head_dim else 0,
        num_warps=max(tile_heads // 4, 1),
        **early_launch(qkv),
    )
    return q


# The chunks' tokens come after the decodes', so these pointers may begin anywhere: do not compile for each alignment.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr"])
def _qk_norm_rope_store_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    positions_ptr,
    cos_sin_ptr,
    slot_mapping_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    qkv_stride,
    cos_sin_stride,
    k_cache_stride,
    v_cache_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_HALF: tl.constexpr,
    TILE_REST: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
    is_q = head < NUM_HEADS
    is_v = head >= NUM_HEADS + NUM_KV_HEADS
    inside = head < NUM_HEADS + 2 * NUM_KV_HEADS

    # A head has three ranges of columns: two that rotate into each other, and the rest, which does not rotate.
    column = tl.arange(0, TILE_HALF)[None, :]
    source = qkv_ptr + token * qkv_stride + head * HEAD_DIM
    in_half = inside & (column < HALF)
    angle = cos_sin_ptr + position * cos_sin_stride + column
    cos = tl.load(angle, mask=column < HALF, other=0.0)
    sin = tl.load(angle + HALF, mask=column < HALF, other=0.0)
    wait_for_previous(EARLY)
    stored_a = tl.load(source + column, mask=in_half, other=0.0)
    stored_b = tl.load(source + HALF + column, mask=in_half, other=0.0)
    a, b = stored_a.to(tl.float32), stored_b.to(tl.float32)
    squares = tl.sum(a * a + b * b, axis=1, keep_dims=True)
    if TILE_REST > 0:
        rest_column = 2 * HALF + tl.arange(0, TILE_REST)[None, :]
        in_rest = inside & (rest_column < HEAD_DIM)
        stored_rest = tl.load(source + rest_column, mask=in_rest, other=0.0)
        rest = stored_rest.to(tl.float32)
        squares += tl.sum(rest * rest, axis=1, keep_dims=True)
    scale = tl.rsqrt(squares / HEAD_DIM + eps)

    a *= _norm_factor(scale, q_weight_ptr, k_weight_ptr, column, column < HALF, is_q)
    b *= _norm_factor(scale, q_weight_ptr, k_weight_ptr, HALF + column, column < HALF, is_q)
    rotated_a = tl.where(is_v, stored_a, (a * cos - b * sin).to(stored_a.dtype))
    rotated_b = tl.where(is_v, stored_b, (b * cos + a * sin).to(stored_b.dtype))

    q_place = q_ptr + (token * NUM_HEADS + head) * HEAD_DIM
    tl.store(q_place + column, rotated_a, mask=in_half & is_q)
    tl.store(q_place + HALF + column, rotated_b, mask=in_half & is_q)
    # K and V differ only in cache and block stride, so one tensor of pointers serves both.
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    k_head, v_head = head - NUM_HEADS, head - NUM_HEADS - NUM_KV_HEADS
    k_place = k_cache_ptr + block * k_cache_stride + (k_head * BLOCK_SIZE + offset) * HEAD_DIM
    v_place = v_cache_ptr + block * v_cache_stride + (v_head * BLOCK_SIZE + offset) * HEAD_DIM
    kv_place = tl.where(is_v, v_place, k_place)
    is_stored = inside & (head >= NUM_HEADS) & (slot >= 0)
    tl.store(kv_place + column, rotated_a, mask=in_half & is_stored)
    tl.store(kv_place + HALF + column, rotated_b, mask=in_half & is_stored)
    if TILE_REST > 0:
        rest *= _norm_factor(scale, q_weight_ptr, k_weight_ptr, rest_column, rest_column < HEAD_DIM, is_q)
        rest = tl.where(is_v, stored_rest, rest.to(stored_rest.dtype))
        tl.store(q_place + rest_column, rest, mask=in_rest & is_q)
        tl.store(kv_place + rest_column, rest, mask=in_rest & is_stored)


@triton.jit
def _norm_factor(scale, q_weight_ptr, k_weight_ptr, column, inside, is_q):
    """The factor of a column in each head: the norm's scale times its weight, or 1."""
    q_factor = 1.0
    k_factor = 1.0
    if q_weight_ptr is not None:
        q_factor = scale * tl.load(q_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if k_weight_ptr is not None:
        k_factor = scale * tl.load(k_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_q, q_factor, k_factor)
