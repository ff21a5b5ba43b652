"""Prefill attention: chunks of prompts attend, causally, to the paged KV cache, which already holds the chunks too.

    out[t, h] = softmax(scale * q[t, h] @ K[: p + 1].T) @ V[: p + 1]       p: position of token t in its sequence

FLOPs: 4 * heads * head_dim per (query token, visible key) pair. Bytes: q and out once, K and V once per BLOCK_Q query
tokens, mostly out of L2. Compute is the bound from a few dozen query tokens on.

With a window K and V are the window's last tokens alone; a soft cap and sinks change the softmax (`AttentionSpec`).
"""

import torch

from nanovllm.kernels.attention.contract import AttentionSpec, ChunkBatch, KVCache
from nanovllm.kernels.attention.cpu_attention import paged_prefill_cpu
from nanovllm.kernels.attention.paged_kv import gather_kv
from nanovllm.kernels.attention.paged_prefill_kernel import paged_prefill_triton
from nanovllm.kernels.attention.softmax_cpu import softmax_reference


def paged_prefill(q: torch.Tensor, spec: AttentionSpec, cache: KVCache, chunks: ChunkBatch, out: torch.Tensor) -> None:
    """Causal attention of the chunks' tokens, through the block table, into `out`.

    q and out are `[tokens, heads, head_dim]`, the last dimension contiguous: chunk i's tokens are
    `query_start[i] .. query_start[i+1]-1`, the last of them at position `seq_lens[i]-1`. The first start may be above
    0. Other tokens of `out`, and those of padding (row -1), are not written. On a GPU nothing past a sequence's length
    is read, and nothing below the window of a chunk's first token: the block table's entries there may be stale.
    """
    run = paged_prefill_triton if q.is_cuda else paged_prefill_cpu
    where = (chunks.block_table, chunks.rows, chunks.query_start, chunks.seq_lens)
    run(q, *cache, *where, spec.scale, out, window=spec.window, soft_cap=spec.soft_cap, sinks=spec.sink_scores)


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
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """`paged_prefill` in PyTorch, in float32, one sequence after the other."""
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[1]
    starts = query_start.tolist()
    for i, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        if row < 0:
            continue
        queries = q[starts[i] : starts[i + 1]].float().transpose(0, 1)  # [heads, query tokens, head_dim]
        grouped = queries.unflatten(0, (num_kv_heads, num_heads // num_kv_heads))
        first = 0 if window is None else max(0, length - queries.shape[1] - window + 1)
        keys = gather_kv(k_cache, block_table[row], length, first).float().unsqueeze(1)
        values = gather_kv(v_cache, block_table[row], length, first).float().unsqueeze(1)
        positions = torch.arange(length - queries.shape[1], length, device=q.device)[:, None]
        tokens = torch.arange(first, length, device=q.device)
        hidden = tokens > positions
        if window is not None:
            hidden |= tokens <= positions - window
        scores = grouped @ keys.transpose(2, 3) * scale
        attended = softmax_reference(scores, soft_cap, sinks, hidden) @ values
        out[starts[i] : starts[i + 1]] = attended.flatten(0, 1).transpose(0, 1).to(out.dtype)
