"""Where to cut the sequences of a decode step, so that programs of equal work fill the device.

Lengths differ by orders of magnitude and are known on the device only. Once a step `split_contexts` cuts every sequence
into splits of one size there, and writes them into a fixed number of slots. `paged_decode` launches a program per (kv
head, slot) in every layer: its grid depends on shapes alone, and one captured CUDA graph serves every mix of lengths.
The device takes slots in order, so long splits come before short ones, which fill up the end (Graham, 1969, "Bounds on
multiprocessing timing anomalies": longest processing time first).

Bytes: 4 per sequence read by each program, 24 per slot written; a few microseconds a step.
"""

from dataclasses import dataclass

import torch

from nanovllm.kernels.device import multiprocessors
from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import tl, triton

# Measured on an H100: docs/performance.md; benchmarks/paged_attention.py measures alternatives.
PROGRAMS_PER_SM = 3  # splits * kv_heads a multiprocessor to aim for: as many as run at a time, to merge few
MIN_SPLIT = 512  # tokens; smaller splits give few streams more programs, at more fixed costs and merging
SPLIT_MULTIPLE = 64  # tokens; a multiple of every tile, so that only the end of a sequence is a partial tile

# Sequence (-1: idle), begin, end; where its partial result goes, where the sequence's first one is, how many it has.
SPLIT_FIELDS = 6


@dataclass(slots=True)
class DecodeSplits:
    """How a decode step's KV is cut, and the workspace of its partial results. Allocated once, refilled every step.

    A step of S sequences uses the first `S + target_splits` split slots; all layers share the workspace, since each
    layer's launch leaves `arrivals` at zero and reads no partial result that it has not written.
    """

    target_splits: int  # split slots beyond one a sequence
    min_split: int  # tokens
    multiprocessors: int  # which steps of few sequences would leave idle, so that their splits may be smaller; 0: no
    splits: torch.Tensor  # [slots, SPLIT_FIELDS] int32
    partial_out: torch.Tensor  # [slots, heads, head_dim] float32, each split normalised by itself
    partial_lse: torch.Tensor  # [slots, heads] float32, log2 of the sum of exponentials
    arrivals: torch.Tensor  # [max_seqs, kv_heads] int32

    @classmethod
    def allocate(
        cls,
        max_seqs: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        *,
        target_splits: int | None = None,
        min_split: int | None = None,
    ) -> "DecodeSplits":
        """Workspace for steps of up to `max_seqs` sequences.

        `target_splits` defaults to what gives every multiprocessor PROGRAMS_PER_SM programs, `min_split` to
        MIN_SPLIT, or less in steps whose sequences are too few to give every one a program.
        Raises ValueError when `min_split` is not a positive multiple of SPLIT_MULTIPLE or `target_splits` < 1.
        """
        device = torch.device(device)
        if target_splits is None:
            target_splits = -(-PROGRAMS_PER_SM * multiprocessors(device) // num_kv_heads)
        num_multiprocessors = 0
        if min_split is None:
            min_split, num_multiprocessors = MIN_SPLIT, multiprocessors(device)
        if target_splits < 1:
            raise ValueError(f"target_splits={target_splits}: must be at least 1")
        if min_split <= 0 or min_split % SPLIT_MULTIPLE:
            raise ValueError(f"min_split={min_split}: must be a positive multiple of {SPLIT_MULTIPLE} tokens")
        slots = max_seqs + target_splits
        return cls(
            target_splits=target_splits,
            min_split=min_split,
            multiprocessors=num_multiprocessors,
            splits=torch.full((slots, SPLIT_FIELDS), -1, dtype=torch.int32, device=device),
            partial_out=torch.zeros(slots, num_heads, head_dim, dtype=torch.float32, device=device),
            partial_lse=torch.zeros(slots, num_heads, dtype=torch.float32, device=device),
            arrivals=torch.zeros(max_seqs, num_kv_heads, dtype=torch.int32, device=device),
        )

    def require(self, num_seqs: int, num_kv_heads: int) -> None:
        """Raises ValueError when this is for fewer sequences or other heads."""
        max_seqs, heads = self.arrivals.shape
        if num_seqs > max_seqs or num_kv_heads != heads:
            raise ValueError(
                f"plan is for up to {max_seqs} sequences of {heads} kv heads, the step has {num_seqs} of {num_kv_heads}"
            )


def split_contexts(seq_lens: torch.Tensor, num_kv_heads: int, plan: DecodeSplits) -> DecodeSplits:
    """Cut the KV of a step's sequences into splits; once a step, before any layer's `paged_decode`.

    At least one launch must lie between the two: `paged_decode` reads the plan before it waits (`early_launch.py`).
    seq_lens `[S] int32` (0 for a padding entry, which gets one empty split). Fills the first `S + target_splits` slots
    of `plan`, zeroes the arrivals and returns `plan`. All splits have the same multiple of SPLIT_MULTIPLE tokens, the
    end of a sequence excepted: the total spread over `target_splits`, but at least `min_split`. They always fit, since
    sum(ceil(len / size)) <= S + total / size.
    Raises ValueError when `plan` was allocated for fewer sequences or other heads.
    """
    plan.require(seq_lens.shape[0], num_kv_heads)
    return (split_contexts_triton if seq_lens.is_cuda else split_contexts_reference)(seq_lens, num_kv_heads, plan)


def split_contexts_reference(seq_lens: torch.Tensor, num_kv_heads: int, plan: DecodeSplits) -> DecodeSplits:
    """`split_contexts` in PyTorch."""
    num_seqs, device = seq_lens.shape[0], seq_lens.device
    lens = seq_lens.long()
    share = -(-lens.sum() // plan.target_splits)
    size = (-(-share // SPLIT_MULTIPLE) * SPLIT_MULTIPLE).clamp(min=_min_split(plan, num_seqs))
    counts = (-(-lens // size)).clamp(min=1)
    firsts = counts.cumsum(0) - counts
    seq = torch.repeat_interleave(torch.arange(num_seqs, device=device), counts)
    partial = torch.arange(seq.shape[0], device=device)
    begin = (partial - firsts[seq]) * size
    end = torch.minimum(begin + size, lens[seq])
    is_last = partial == (firsts + counts - 1)[seq]
    # Whole splits first, then the ends of the sequences.
    order = torch.argsort(torch.where(is_last, end - begin, size + 1), descending=True, stable=True)
    used = torch.stack([seq, begin, end, partial, firsts[seq], counts[seq]], dim=1)[order]
    plan.splits[: num_seqs + plan.target_splits] = -1
    plan.splits[: used.shape[0]] = used.int()
    plan.arrivals[:num_seqs] = 0
    return plan


def _min_split(plan: DecodeSplits, num_seqs: int) -> int:
    """Half of `plan.min_split` where there are no more heads of sequences than multiprocessors, and so on."""
    programs, split = num_seqs * plan.arrivals.shape[1], plan.min_split
    while 0 < programs <= plan.multiprocessors and split > SPLIT_MULTIPLE:
        programs, split = 2 * programs, split // 2
    return split


def split_contexts_triton(seq_lens: torch.Tensor, num_kv_heads: int, plan: DecodeSplits) -> DecodeSplits:
    """`split_contexts` in one launch: a program per sequence and one for the idle slots."""
    num_seqs = seq_lens.shape[0]
    _plan_kernel[(num_seqs + 1,)](
        seq_lens,
        plan.splits,
        plan.arrivals,
        num_seqs,
        num_seqs + plan.target_splits,
        plan.target_splits,
        _min_split(plan, num_seqs),
        num_kv_heads,
        SPLIT_MULTIPLE=SPLIT_MULTIPLE,
        SPLIT_FIELDS=SPLIT_FIELDS,
        CHUNK=1024,
        num_warps=4,
        **early_launch(seq_lens),
    )
    return plan


@triton.jit(do_not_specialize=["num_seqs", "num_slots", "target_splits", "min_split", "num_kv_heads"])
def _plan_kernel(
    seq_lens_ptr,
    splits_ptr,
    arrivals_ptr,
    num_seqs,
    num_slots,
    target_splits,
    min_split,
    num_kv_heads,
    SPLIT_MULTIPLE: tl.constexpr,
    SPLIT_FIELDS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    # Every program redoes the sums over all sequences (4 KB from L2), so that none waits for another.
    seq = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    total = 0
    for base in range(0, num_seqs, CHUNK):
        total += tl.sum(tl.load(seq_lens_ptr + base + lanes, mask=base + lanes < num_seqs, other=0))
    size = tl.maximum(min_split, tl.cdiv(tl.cdiv(total, target_splits), SPLIT_MULTIPLE) * SPLIT_MULTIPLE)

    length = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    count = tl.maximum(tl.cdiv(length, size), 1)
    end_length = length - (count - 1) * size
    first = 0  # of this sequence's partial results
    num_splits = 0  # of all sequences
    num_ends = 0  # that come before this sequence's
    for base in range(0, num_seqs, CHUNK):
        other = base + lanes
        lens = tl.load(seq_lens_ptr + other, mask=other < num_seqs, other=0)
        counts = tl.where(other < num_seqs, tl.maximum(tl.cdiv(lens, size), 1), 0)
        end_lengths = lens - (counts - 1) * size
        is_before = (end_lengths > end_length) | ((end_lengths == end_length) & (other < seq))
        num_ends += tl.sum(tl.where(is_before & (other < num_seqs), 1, 0))
        first += tl.sum(tl.where(other < seq, counts, 0))
        num_splits += tl.sum(counts)

    if seq < num_seqs:
        for base in range(0, count, CHUNK):
            index = base + lanes
            is_last = index == count - 1
            slot = tl.where(is_last, num_splits - num_seqs + num_ends, first - seq + index)
            split = splits_ptr + slot * SPLIT_FIELDS
            inside = index < count
            tl.store(split, tl.zeros_like(index) + seq, mask=inside)
            tl.store(split + 1, index * size, mask=inside)
            tl.store(split + 2, tl.minimum(index * size + size, length), mask=inside)
            tl.store(split + 3, first + index, mask=inside)
            tl.store(split + 4, tl.zeros_like(index) + first, mask=inside)
            tl.store(split + 5, tl.zeros_like(index) + count, mask=inside)
        for head in range(0, num_kv_heads, CHUNK):
            tl.store(arrivals_ptr + seq * num_kv_heads + head + lanes, 0, mask=head + lanes < num_kv_heads)
    else:
        for base in range(num_splits * SPLIT_FIELDS, num_slots * SPLIT_FIELDS, CHUNK):
            tl.store(splits_ptr + base + lanes, -1, mask=base + lanes < num_slots * SPLIT_FIELDS)
