"""A decode step's attention, from the QKV projection's output to the heads': one query token per sequence.

    q, k = RoPE(norm(q)), RoPE(norm(k)); k and v go to the sequence's newest slot, then
    out[s, h] = softmax(scale * q[s, h] @ K[s].T) @ V[s]          K, V: tokens 0 .. seq_lens[s]-1, through block_table

With a window K and V are the window's last tokens alone; a soft cap and sinks change the softmax (`AttentionSpec`).

Bytes moved: every cached token once, 2 * kv_heads * head_dim * itemsize. FLOPs: 4 * heads * head_dim per cached token,
2 * (heads / kv_heads) / itemsize a byte: memory-bound whatever the GQA ratio.
"""

import torch

from nanovllm.kernels.attention.contract import AttentionSpec, DecodeBatch, KVCache
from nanovllm.kernels.attention.cpu_attention import paged_decode_cpu
from nanovllm.kernels.attention.cpu_rope_store import qk_norm_rope_store_cpu
from nanovllm.kernels.attention.paged_decode_kernel import paged_decode_triton
from nanovllm.kernels.attention.paged_kv import gather_kv
from nanovllm.kernels.attention.qk_norm_rope_store import qk_norm_rope_store_reference
from nanovllm.kernels.attention.softmax_cpu import softmax_reference


def paged_decode(
    qkv: torch.Tensor, spec: AttentionSpec, cache: KVCache, decodes: DecodeBatch, out: torch.Tensor
) -> None:
    """Store each sequence's newest token, and attend from it to the sequence, as far as the window goes, into `out`.

    Args:
        qkv: `[seqs, (heads + 2 * kv_heads) * head_dim]`, rows may be strided: the newest token of each sequence.
        cache: the newest slots are written. On a GPU nothing past a sequence's length is read, on a CPU those slots
            must be finite. Below the window nothing is read: the block table's entries there may be stale.
        decodes: no two sequences share the block of their newest slot. Padding (row -1, length 0) gets zeros.
        out: `[seqs, heads, head_dim]`, the last dimension contiguous.

    Raises:
        ValueError: `decodes` was made for another window than the layer's.
    """
    reads = decodes.splits if decodes.gather is None else decodes.gather
    if reads.window != spec.window:
        raise ValueError(f"the step's decodes were planned for window={reads.window}, the layer has {spec.window}")
    changes = {"soft_cap": spec.soft_cap, "sinks": spec.sink_scores}
    if decodes.gather is not None:
        q = qk_norm_rope_store_cpu(qkv, spec, cache, decodes.places)
        paged_decode_cpu(q, cache.k, cache.v, decodes.gather, spec.scale, out, **changes)
    else:
        where = (decodes.block_table, decodes.rows, decodes.seq_lens, decodes.splits)
        paged_decode_triton(qkv, *spec.norms, spec.cos_sin(qkv.device), *cache, *where, spec.scale, out, **changes)


def paged_decode_reference(
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
    scale: float,
    out: torch.Tensor,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """`paged_decode` in PyTorch, in float32, one sequence after the other."""
    (_, num_kv_heads, block_size, _), num_heads = k_cache.shape, out.shape[1]
    positions = (seq_lens - 1).clamp(min=0)
    blocks = block_table[rows.long(), positions.long() // block_size].long()
    slots = (blocks * block_size + positions % block_size).masked_fill(seq_lens == 0, -1)
    q = qk_norm_rope_store_reference(
        qkv, q_weight, k_weight, eps, positions, cos_sin, slots, k_cache, v_cache, num_heads
    )
    for i, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        if length == 0:
            out[i] = 0
            continue
        first = 0 if window is None else max(0, length - window)
        keys = gather_kv(k_cache, block_table[row], length, first).float()
        values = gather_kv(v_cache, block_table[row], length, first).float()
        grouped = q[i].float().view(num_kv_heads, num_heads // num_kv_heads, -1)
        weights = softmax_reference(grouped @ keys.transpose(1, 2) * scale, soft_cap, sinks)
        out[i] = (weights @ values).flatten(0, 1).to(out.dtype)
