"""How attention kernels find a token of the paged KV cache: from its position, through the block table, to its memory.

A layer's cache is `[num_blocks, kv_heads, block_size, head_dim]`. One block of one head is contiguous, so a tile of
tokens within one block takes one look-up in the block table and is one run of memory. Block id times block stride
passes 2^31 in any cache worth having, so offsets are int64 from there on.
"""

import torch

from nanovllm.kernels.early_launch import fetch
from nanovllm.kernels.triton_shim import tl, triton


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n. Kernels pad n to it."""
    return 1 << (n - 1).bit_length()


def check_caches(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raise ValueError for caches, or a q, that the kernels cannot address."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    inner = (block_size * head_dim, head_dim, 1)
    if k_cache.stride()[1:] != inner or k_cache.stride() != v_cache.stride() or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache {tuple(k_cache.shape)} strides {k_cache.stride()}, v_cache {tuple(v_cache.shape)} strides "
            f"{v_cache.stride()}: must be equal, and contiguous within a block"
        )
    if q.shape[1] % num_kv_heads or q.shape[2] != head_dim or q.dtype != k_cache.dtype or q.dtype != v_cache.dtype:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype} does not fit caches of {num_kv_heads} kv heads of {head_dim} "
            f"{k_cache.dtype} and {v_cache.dtype}"
        )


def gather_kv(cache: torch.Tensor, table_row: torch.Tensor, length: int, first: int = 0) -> torch.Tensor:
    """One sequence's cached tokens `first` to `length - 1`, `[kv_heads, tokens, head_dim]`, by its row of the table.

    Blocks before the one of token `first` are not read.
    """
    block_size = cache.shape[2]
    first_block, num_blocks = first // block_size, -(-length // block_size)
    tokens = cache[table_row[first_block:num_blocks].long()].transpose(0, 1).flatten(1, 2)
    return tokens[:, first - first_block * block_size : length - first_block * block_size]


@triton.jit
def tile_blocks(table_ptr, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block ids of tokens start .. start+TILE-1, 0 where there is no token below `end`.

    One scalar if no tile straddles blocks (start is then a multiple of TILE), otherwise one id a token, `[TILE]`.
    Call it one tile ahead, and carry the result through the loop. If an iteration loaded the id that it uses, Triton's
    pipeliner would spend its stages on that dependent load, and K and V would have one buffer and no overlap.
    """
    if BLOCK_SIZE % TILE == 0:
        return tl.load(table_ptr + start // BLOCK_SIZE, mask=start < end, other=0).to(tl.int64)
    else:
        tokens = start + tl.arange(0, TILE)
        return tl.load(table_ptr + tokens // BLOCK_SIZE, mask=tokens < end, other=0).to(tl.int64)


@triton.jit
def kv_offsets(
    blocks,
    start,
    kv_head,
    stride_block,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Element offsets `[TILE, PADDED_DIM] int64`, within a cache, of the tokens whose `tile_blocks` are `blocks`."""
    lanes = tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    if BLOCK_SIZE % TILE == 0:
        first_slot = kv_head * BLOCK_SIZE + start % BLOCK_SIZE
        return blocks * stride_block + first_slot * HEAD_DIM + (lanes[:, None] * HEAD_DIM + dims[None, :])
    else:
        slots = kv_head * BLOCK_SIZE + (start + lanes) % BLOCK_SIZE
        return (blocks * stride_block + slots * HEAD_DIM)[:, None] + dims[None, :]


@triton.jit
def fetch_tile(
    k_ptr,
    v_ptr,
    blocks,
    start,
    end,
    kv_head,
    stride_block,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    LINE: tl.constexpr,
):
    """Ask the L2 cache to fetch a tile's keys and values."""
    tokens = kv_offsets(blocks, start, kv_head, stride_block, HEAD_DIM, 1, BLOCK_SIZE, TILE)
    lines = tokens + (tl.arange(0, PADDED_DIM // LINE) * LINE)[None, :]
    is_token = (start + tl.arange(0, TILE) < end)[:, None]
    fetch(k_ptr + lines, is_token)
    fetch(v_ptr + lines, is_token)
