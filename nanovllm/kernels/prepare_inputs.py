"""Builds a step's inputs on the device, from the rows: token ids, positions, KV slots, lengths.

The host sends only which rows run, and how many tokens each computes. Everything else is on the device already, even
the token that the previous step sampled, so the host can plan a step before it knows the last one's result.

For each token the kernel reads 4 bytes and writes 8, and as many again for each group of layers, which has block tables
of its own (mostly from L2); it computes next to nothing.
"""

from dataclasses import dataclass

import torch

from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import tl, triton


@dataclass(slots=True)
class StepInputs:
    """Buffers for one step. Each may be longer than the step needs; the rest stays as it is.

    Attributes:
        input_ids: `[tokens]` int32.
        positions: `[tokens]` int32, counted from the start of the sequence.
        slot_mapping: `[groups, tokens]` int64, block id * block_size + offset, where the token's K and V go in the
            layers of each group; -1: nowhere.
        seq_lens: `[sequences]` int32, tokens with K and V in the cache once this step has stored its own.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor

    @classmethod
    def allocate(cls, num_tokens: int, num_seqs: int, num_groups: int, device: torch.device | str) -> "StepInputs":
        return cls(
            input_ids=torch.zeros(num_tokens, dtype=torch.int32, device=device),
            positions=torch.zeros(num_tokens, dtype=torch.int32, device=device),
            slot_mapping=torch.zeros(num_groups, num_tokens, dtype=torch.int64, device=device),
            seq_lens=torch.zeros(num_seqs, dtype=torch.int32, device=device),
        )


def prepare_inputs(
    rows: torch.Tensor,
    query_start: torch.Tensor,
    token_ids: torch.Tensor,
    num_computed: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    out: StepInputs,
) -> None:
    """Write the next `query_len` tokens of each row to `out`, and advance `num_computed` past them.

    A padding entry (row -1) gets id 0, position 0, slot -1, length 0, and touches no row.

    Args:
        rows: `[sequences]` int32, each row at most once, or -1.
        query_start: `[sequences + 1]` int32, cumulative query lengths from 0.
        token_ids: `[rows, max_len]` int32, any strides.
        num_computed: `[rows]` int32, any stride; tokens of all steps before this one.
        block_tables: `[groups, rows, max_blocks]` int32, any strides.
        block_size: tokens in a block.
        out: written.
    """
    run = prepare_inputs_triton if rows.is_cuda else prepare_inputs_reference
    run(rows, query_start, token_ids, num_computed, block_tables, block_size, out)


def prepare_inputs_reference(
    rows: torch.Tensor,
    query_start: torch.Tensor,
    token_ids: torch.Tensor,
    num_computed: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    out: StepInputs,
) -> None:
    """`prepare_inputs` in PyTorch; fast enough to serve a CPU too."""
    live = rows >= 0
    row = rows.clamp(min=0).long()  # a padding entry reads row 0, and every use of it is multiplied by `live`
    query_len = query_start.diff()
    start = num_computed[row] * live
    torch.mul(start + query_len, live, out=out.seq_lens[: len(rows)])
    num_computed.index_add_(0, row, query_len * live)

    num_tokens = int(query_start[-1])
    token = torch.arange(num_tokens, device=rows.device, dtype=torch.int32)
    if num_tokens != len(rows) or not query_len.all():  # chunks: repeat each sequence's entry for each of its tokens
        sequence = torch.repeat_interleave(query_len, output_size=num_tokens)
        start, row, live = start[sequence], row[sequence], live[sequence]
        token = (token - query_start[sequence]) * live
    else:
        token -= query_start[:-1]
    positions = torch.add(start, token, out=out.positions[:num_tokens])
    torch.mul(token_ids[row, positions], live, out=out.input_ids[:num_tokens])
    block = block_tables[:, row, positions // block_size].long()  # [groups, tokens]
    slot = block.mul_(block_size).add_(positions % block_size)
    out.slot_mapping[:, :num_tokens] = slot.masked_fill_(~live, -1)


def prepare_inputs_triton(
    rows: torch.Tensor,
    query_start: torch.Tensor,
    token_ids: torch.Tensor,
    num_computed: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    out: StepInputs,
) -> None:
    """`prepare_inputs` in one launch, a program for each sequence."""
    _prepare_inputs_kernel[(len(rows),)](
        rows,
        query_start,
        token_ids,
        num_computed,
        block_tables,
        out.input_ids,
        out.positions,
        out.slot_mapping,
        out.seq_lens,
        *token_ids.stride(),
        *num_computed.stride(),
        *block_tables.stride(),
        out.slot_mapping.stride(0),
        NUM_GROUPS=len(block_tables),
        BLOCK_SIZE=block_size,
        TILE=1024,
        num_warps=4,
        **early_launch(rows),
    )


@triton.jit
def _prepare_inputs_kernel(
    rows_ptr,
    query_start_ptr,
    token_ids_ptr,
    num_computed_ptr,
    block_tables_ptr,
    input_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    seq_lens_ptr,
    token_ids_stride_row,
    token_ids_stride,
    num_computed_stride,
    block_tables_stride_group,
    block_tables_stride_row,
    block_tables_stride,
    slot_mapping_stride_group,
    NUM_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    sequence = tl.program_id(0)
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    first = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - first
    lanes = tl.arange(0, TILE)
    if row < 0:
        tl.store(seq_lens_ptr + sequence, 0)
        for done in range(0, query_len, TILE):
            token = first + done + lanes
            inside = done + lanes < query_len
            tl.store(input_ids_ptr + token, 0, mask=inside)
            tl.store(positions_ptr + token, 0, mask=inside)
            for group in range(NUM_GROUPS):
                tl.store(slot_mapping_ptr + group * slot_mapping_stride_group + token, -1, mask=inside)
    else:
        start = tl.load(num_computed_ptr + row * num_computed_stride)
        # All threads must have read the old count before one of them overwrites it.
        tl.debug_barrier()
        tl.store(num_computed_ptr + row * num_computed_stride, start + query_len)
        tl.store(seq_lens_ptr + sequence, start + query_len)
        token_ids_ptr += row * token_ids_stride_row
        block_tables_ptr += row * block_tables_stride_row
        for done in range(0, query_len, TILE):
            token = first + done + lanes
            inside = done + lanes < query_len
            position = start + done + lanes
            token_id = tl.load(token_ids_ptr + position.to(tl.int64) * token_ids_stride, mask=inside)
            tl.store(input_ids_ptr + token, token_id, mask=inside)
            tl.store(positions_ptr + token, position, mask=inside)
            index = (position // BLOCK_SIZE).to(tl.int64) * block_tables_stride
            for group in range(NUM_GROUPS):
                block = tl.load(block_tables_ptr + group * block_tables_stride_group + index, mask=inside, other=0)
                slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
                tl.store(slot_mapping_ptr + group * slot_mapping_stride_group + token, slot, mask=inside)
