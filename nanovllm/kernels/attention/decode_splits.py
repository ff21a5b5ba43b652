"""Cuts the contexts of a decode step into splits, so that programs of equal work fill the device.

The lengths of sequences differ by orders of magnitude, and only the device knows them. Once a step, `split_contexts`
cuts every sequence into splits of one size, on the device, and writes them into a table of fixed size. In every layer
`paged_decode` launches a program for each kv head and table entry: its grid depends on shapes alone, and one captured
CUDA graph serves every mix of lengths. The device starts the entries in order, so long splits come first, and short
ones fill up the end (Graham, 1969, "Bounds on multiprocessing timing anomalies": longest processing time first).

Bytes: each program reads 4 per sequence, and writes 24 per table entry; a few microseconds a step.
"""

from dataclasses import dataclass

import torch

from nanovllm.kernels.device import multiprocessors
from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import tl, triton

# Measured on an H100: docs/lab-notebook.md; benchmarks/paged_attention.py measures alternatives.
PROGRAMS_PER_SM = 3  # the aim for splits * kv_heads on a multiprocessor: as many as run at a time; more cost merging
MIN_SPLIT = 512  # tokens; smaller splits give few sequences more programs, but cost more launching and merging
SPLIT_MULTIPLE = 64  # tokens; every tile divides it, so that only the end of a sequence is a partial tile

# A table entry: sequence (-1: idle), begin and end of the split in tokens, index of its partial result, index of the
# sequence's first partial result, number of the sequence's splits.
SPLIT_FIELDS = 6


@dataclass(slots=True)
class DecodeSplits:
    """The splits of a decode step, and the workspace for their partial results. Allocated once, refilled every step.

    A step of S sequences uses the first `S + target_splits` entries. All layers share the workspace: each layer's
    launch leaves `arrivals` at zero, and reads only partial results that it has written itself.
    """

    target_splits: int  # table entries beyond one a sequence
    min_split: int  # tokens
    multiprocessors: int  # of the device: a step with fewer programs may make its splits smaller; 0: it may not
    table: torch.Tensor  # [entries, SPLIT_FIELDS] int32
    partial_out: torch.Tensor  # [entries, heads, head_dim] float32, each split's softmax normalized by itself
    partial_lse: torch.Tensor  # [entries, heads] float32, log2 of the sum of exponentials
    arrivals: torch.Tensor  # [max_seqs, kv_heads] int32
    window: int | None = None  # what the table was cut for: a query sees so many tokens, the newest the last of them

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
        """Allocate for steps of up to `max_seqs` sequences.

        By default `target_splits` gives every multiprocessor PROGRAMS_PER_SM programs, and `min_split` is MIN_SPLIT, or
        less in steps with too few sequences to give every multiprocessor a program.
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
        entries = max_seqs + target_splits
        return cls(
            target_splits=target_splits,
            min_split=min_split,
            multiprocessors=num_multiprocessors,
            table=torch.full((entries, SPLIT_FIELDS), -1, dtype=torch.int32, device=device),
            partial_out=torch.zeros(entries, num_heads, head_dim, dtype=torch.float32, device=device),
            partial_lse=torch.zeros(entries, num_heads, dtype=torch.float32, device=device),
            arrivals=torch.zeros(max_seqs, num_kv_heads, dtype=torch.int32, device=device),
        )

    def require(self, num_seqs: int, num_kv_heads: int) -> None:
        """Raise ValueError if these were allocated for fewer sequences or for other heads."""
        max_seqs, heads = self.arrivals.shape
        if num_seqs > max_seqs or num_kv_heads != heads:
            raise ValueError(
                f"splits are for up to {max_seqs} sequences of {heads} kv heads, the step has {num_seqs} of "
                f"{num_kv_heads}"
            )


def split_contexts(
    seq_lens: torch.Tensor, num_kv_heads: int, splits: DecodeSplits, window: int | None = None
) -> DecodeSplits:
    """Cut the contexts of a step's sequences, once a step, before the first layer's `paged_decode`. Returns `splits`.

    At least one launch must lie between the two: `paged_decode` reads the table before it waits (`early_launch.py`).

    Fills the first `S + target_splits` entries of the table and zeroes the arrivals. All splits have the same number of
    tokens, a multiple of SPLIT_MULTIPLE, except the last of each sequence: the total spread over `target_splits`, but
    at least `min_split`. They always fit, since sum(ceil(len / size)) <= S + total / size.

    With a window a sequence's first split begins at the last multiple of SPLIT_MULTIPLE that leaves out no token which
    the newest one sees, `max(len - window, 0)` and up; lengths count from there. `paged_decode` masks what is too old.

    Args:
        seq_lens: `[S]` int32; 0 for padding, which gets one empty split.
        window: of the layers that will read these splits; None: they see all tokens.

    Raises:
        ValueError: `splits` were allocated for fewer sequences or for other heads.
    """
    splits.require(seq_lens.shape[0], num_kv_heads)
    cut = split_contexts_triton if seq_lens.is_cuda else split_contexts_reference
    return cut(seq_lens, num_kv_heads, splits, window)


def split_contexts_reference(
    seq_lens: torch.Tensor, num_kv_heads: int, splits: DecodeSplits, window: int | None = None
) -> DecodeSplits:
    """`split_contexts` in PyTorch."""
    splits.window = window
    num_seqs, device = seq_lens.shape[0], seq_lens.device
    skipped = torch.zeros_like(seq_lens, dtype=torch.long)
    if window is not None:
        skipped = (seq_lens.long() - window).clamp(min=0) // SPLIT_MULTIPLE * SPLIT_MULTIPLE
    lens = seq_lens.long() - skipped
    share = -(-lens.sum() // splits.target_splits)
    size = (-(-share // SPLIT_MULTIPLE) * SPLIT_MULTIPLE).clamp(min=_min_split(splits, num_seqs))
    counts = (-(-lens // size)).clamp(min=1)
    firsts = counts.cumsum(0) - counts
    seq = torch.repeat_interleave(torch.arange(num_seqs, device=device), counts)
    partial = torch.arange(seq.shape[0], device=device)
    begin = (partial - firsts[seq]) * size
    end = torch.minimum(begin + size, lens[seq])
    is_last = partial == (firsts + counts - 1)[seq]
    # Whole splits first, then the ends of the sequences.
    order = torch.argsort(torch.where(is_last, end - begin, size + 1), descending=True, stable=True)
    begin, end = begin + skipped[seq], end + skipped[seq]
    used = torch.stack([seq, begin, end, partial, firsts[seq], counts[seq]], dim=1)[order]
    splits.table[: num_seqs + splits.target_splits] = -1
    splits.table[: used.shape[0]] = used.int()
    splits.arrivals[:num_seqs] = 0
    return splits


def _min_split(splits: DecodeSplits, num_seqs: int) -> int:
    """The least tokens of a split: `splits.min_split`, halved while the multiprocessors outnumber the programs."""
    programs, split = num_seqs * splits.arrivals.shape[1], splits.min_split
    while 0 < programs <= splits.multiprocessors and split > SPLIT_MULTIPLE:
        programs, split = 2 * programs, split // 2
    return split


def split_contexts_triton(
    seq_lens: torch.Tensor, num_kv_heads: int, splits: DecodeSplits, window: int | None = None
) -> DecodeSplits:
    """`split_contexts` in one launch: a program for each sequence, and one that fills the idle entries."""
    splits.window = window
    num_seqs = seq_lens.shape[0]
    _split_kernel[(num_seqs + 1,)](
        seq_lens,
        splits.table,
        splits.arrivals,
        num_seqs,
        num_seqs + splits.target_splits,
        splits.target_splits,
        _min_split(splits, num_seqs),
        num_kv_heads,
        window,
        SPLIT_MULTIPLE=SPLIT_MULTIPLE,
        SPLIT_FIELDS=SPLIT_FIELDS,
        CHUNK=1024,
        num_warps=4,
        **early_launch(seq_lens),
    )
    return splits


@triton.jit
def _skipped(lens, window, SPLIT_MULTIPLE: tl.constexpr):
    """The tokens before the first split."""
    if window is None:
        return 0
    else:
        return tl.maximum(lens - window, 0) // SPLIT_MULTIPLE * SPLIT_MULTIPLE


@triton.jit(do_not_specialize=["num_seqs", "num_entries", "target_splits", "min_split", "num_kv_heads", "window"])
def _split_kernel(
    seq_lens_ptr,
    splits_ptr,
    arrivals_ptr,
    num_seqs,
    num_entries,
    target_splits,
    min_split,
    num_kv_heads,
    window,
    SPLIT_MULTIPLE: tl.constexpr,
    SPLIT_FIELDS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    # Every program sums over all sequences itself (4 KB from L2), so that none waits for another.
    seq = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    total = 0
    for base in range(0, num_seqs, CHUNK):
        lens = tl.load(seq_lens_ptr + base + lanes, mask=base + lanes < num_seqs, other=0)
        total += tl.sum(lens - _skipped(lens, window, SPLIT_MULTIPLE))
    size = tl.maximum(min_split, tl.cdiv(tl.cdiv(total, target_splits), SPLIT_MULTIPLE) * SPLIT_MULTIPLE)

    length = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    skipped = _skipped(length, window, SPLIT_MULTIPLE)
    length -= skipped
    count = tl.maximum(tl.cdiv(length, size), 1)
    end_length = length - (count - 1) * size
    first = 0  # index of this sequence's first partial result
    num_splits = 0  # of all sequences
    num_ends = 0  # ends of other sequences that come before this one's
    for base in range(0, num_seqs, CHUNK):
        other = base + lanes
        lens = tl.load(seq_lens_ptr + other, mask=other < num_seqs, other=0)
        lens -= _skipped(lens, window, SPLIT_MULTIPLE)
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
            entry = tl.where(is_last, num_splits - num_seqs + num_ends, first - seq + index)
            place = splits_ptr + entry * SPLIT_FIELDS
            inside = index < count
            tl.store(place, tl.zeros_like(index) + seq, mask=inside)
            tl.store(place + 1, skipped + index * size, mask=inside)
            tl.store(place + 2, skipped + tl.minimum(index * size + size, length), mask=inside)
            tl.store(place + 3, first + index, mask=inside)
            tl.store(place + 4, tl.zeros_like(index) + first, mask=inside)
            tl.store(place + 5, tl.zeros_like(index) + count, mask=inside)
        for head in range(0, num_kv_heads, CHUNK):
            tl.store(arrivals_ptr + seq * num_kv_heads + head + lanes, 0, mask=head + lanes < num_kv_heads)
    else:
        for base in range(num_splits * SPLIT_FIELDS, num_entries * SPLIT_FIELDS, CHUNK):
            tl.store(splits_ptr + base + lanes, -1, mask=base + lanes < num_entries * SPLIT_FIELDS)
