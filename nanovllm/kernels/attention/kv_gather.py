"""Which blocks a decode step on a CPU copies together, group by group, before it multiplies them.

Planned once a step, used by every layer: `cpu_attention.py` says why blocks are copied.
"""

from dataclasses import dataclass

import torch

GROUP_BYTES = 8 << 20  # of keys and values gathered at a time


@dataclass(slots=True)
class GatherGroup:
    """Sequences `first` to `last` of a step sorted by length.

    `index [seqs * kv_heads * blocks]` picks (block, head) tiles of the cache; `mask [seqs * kv_heads, 1, tokens]`
    float32 is 0 where the sequence's newest token sees a gathered one and -inf elsewhere, or None if all sequences see
    `begin` to `length - 1` of the gathered tokens.
    """

    first: int
    last: int
    index: torch.Tensor
    begin: int
    length: int
    mask: torch.Tensor | None


@dataclass(slots=True)
class KvGather:
    """A step's groups, and the workspace into which each is copied."""

    order: torch.Tensor | None  # [seqs] int64, by length; None when they are in that order
    inverse: torch.Tensor | None  # [seqs] int64
    groups: list[GatherGroup]
    workspace: torch.Tensor  # [2, elements]
    window: int | None = None  # of the layers that it is for


def gather_blocks(
    seq_lens: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    k_cache: torch.Tensor,
    previous: KvGather | None = None,
    window: int | None = None,
) -> KvGather:
    """Group a decode step's reads; `previous` hands its workspace on.

    With a window only the blocks that hold some of a sequence's last `window` tokens are read, and lengths, below,
    count from the first of these blocks.

    seq_lens, rows `[seqs]` int32, of which padding (row -1, length 0) reads nothing; block_table `[rows, max_blocks]`
    int32; k_cache `[num_blocks, kv_heads, block_size, head_dim]`, for its shape.
    """
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    block_bytes = 2 * num_kv_heads * block_size * head_dim * k_cache.element_size()
    order = inverse = skipped_blocks = begins = None
    if window is not None:
        unseen = (seq_lens - window).clamp_(min=0)
        skipped_blocks = torch.div(unseen, block_size, rounding_mode="floor")
        seq_lens, begins = seq_lens - skipped_blocks * block_size, unseen % block_size
    if len(seq_lens) > 1:
        seq_lens, order = seq_lens.sort()
        rows, inverse = rows[order], order.argsort()
        if window is not None:
            skipped_blocks, begins = skipped_blocks[order], begins[order]
    counts = -(-seq_lens // block_size)
    num_blocks, lengths = counts.tolist(), seq_lens.tolist()
    table = block_table[rows].long()
    heads = torch.arange(num_kv_heads)[:, None]
    groups, first, most = [], lengths.count(0), 0  # padding is the shortest
    while first < len(num_blocks):
        last = first + 1
        while last < len(num_blocks) and (last + 1 - first) * num_blocks[last] * block_bytes <= GROUP_BYTES:
            last += 1
        width = num_blocks[last - 1]
        # Past its own blocks a sequence gathers its last one again: another's might hold what is not finite.
        columns = torch.minimum(torch.arange(width), counts[first:last, None] - 1).long()
        if window is not None:
            columns += skipped_blocks[first:last, None]
        index = (table[first:last].gather(1, columns)[:, None] * num_kv_heads + heads).flatten()
        mask, begin = None, 0 if begins is None else int(begins[first])
        is_uniform = lengths[first] == lengths[last - 1] and (
            begins is None or bool((begins[first:last] == begin).all())
        )
        if not is_uniform:
            tokens = torch.arange(width * block_size)
            inside = tokens < seq_lens[first:last, None]
            if begins is not None:
                inside &= tokens >= begins[first:last, None]
            mask = torch.where(inside, 0.0, float("-inf"))[:, None, :].repeat_interleave(num_kv_heads, dim=0)
        groups.append(GatherGroup(first, last, index, begin, lengths[last - 1], mask))
        most = max(most, index.numel() * block_size * head_dim)
        first = last
    workspace = previous.workspace if previous is not None else k_cache.new_empty(2, 0)
    if workspace.shape[1] < most:
        workspace = k_cache.new_empty(2, most + most // 4)
    return KvGather(order, inverse, groups, workspace, window)
