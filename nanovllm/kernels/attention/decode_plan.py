"""Where to cut the sequences of a decode step, so that programs of equal work fill the device.

Lengths differ by orders of magnitude and are known on the device only. Once a step `plan_decode` cuts every sequence
into pieces of one size there, and writes them into a fixed number of slots. `paged_decode` launches a program per (kv
head, slot) in every layer: its grid depends on shapes alone, and one captured CUDA graph serves every mix of lengths.
The device takes slots in order, so long pieces come before short ones, which fill up the end (Graham, 1969, "Bounds on
multiprocessing timing anomalies": longest processing time first).

Bytes: 4 per sequence read by each program, 24 per slot written; a few microseconds a step.
"""

from dataclasses import dataclass

import torch

from nanovllm.kernels.device import multiprocessors
from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import tl, triton

# Measured on an H100: docs/performance.md; benchmarks/paged_attention.py measures alternatives.
PROGRAMS_PER_SM = 3  # pieces * kv_heads a multiprocessor to aim for: as many as run at a time, to merge few
MIN_PIECE = 512  # tokens; smaller pieces give few streams more programs, at more fixed costs and merging
PIECE_MULTIPLE = 64  # tokens; a multiple of every tile, so that only the end of a sequence is a partial tile

# Sequence (-1: idle), begin, end; where its partial result goes, where the sequence's first one is, how many it has.
PIECE_FIELDS = 6


@dataclass(slots=True)
class DecodePlan:
    """How a decode step's KV is cut, and the workspace of its partial results. Allocated once, refilled every step.

    A step of S sequences uses the first `S + target_pieces` piece slots; all layers share the workspace, since each
    layer's launch leaves `arrivals` at zero and reads no partial result that it has not written.
    """

    target_pieces: int  # piece slots beyond one a sequence
    min_piece: int  # tokens
    multiprocessors: int  # which steps of few sequences would leave idle, so that their pieces may be smaller; 0: no
    pieces: torch.Tensor  # [slots, PIECE_FIELDS] int32
    partial_out: torch.Tensor  # [slots, heads, head_dim] float32, each piece normalised by itself
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
        target_pieces: int | None = None,
        min_piece: int | None = None,
    ) -> "DecodePlan":
        """Workspace for steps of up to `max_seqs` sequences.

        `target_pieces` defaults to what gives every multiprocessor PROGRAMS_PER_SM programs, `min_piece` to
        MIN_PIECE, or less in steps whose sequences are too few to give every one a program.
        Raises ValueError when `min_piece` is not a positive multiple of PIECE_MULTIPLE or `target_pieces` < 1.
        """
        device = torch.device(device)
        if target_pieces is None:
            target_pieces = -(-PROGRAMS_PER_SM * multiprocessors(device) // num_kv_heads)
        num_multiprocessors = 0
        if min_piece is None:
            min_piece, num_multiprocessors = MIN_PIECE, multiprocessors(device)
        if target_pieces < 1:
            raise ValueError(f"target_pieces={target_pieces}: must be at least 1")
        if min_piece <= 0 or min_piece % PIECE_MULTIPLE:
            raise ValueError(f"min_piece={min_piece}: must be a positive multiple of {PIECE_MULTIPLE} tokens")
        slots = max_seqs + target_pieces
        return cls(
            target_pieces=target_pieces,
            min_piece=min_piece,
            multiprocessors=num_multiprocessors,
            pieces=torch.full((slots, PIECE_FIELDS), -1, dtype=torch.int32, device=device),
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


def plan_decode(seq_lens: torch.Tensor, num_kv_heads: int, plan: DecodePlan) -> DecodePlan:
    """Cut the KV of a step's sequences into pieces; once a step, before any layer's `paged_decode`.

    At least one launch must lie between the two: `paged_decode` reads the plan before it waits (`early_launch.py`).
    seq_lens `[S] int32` (0 for a padding entry, which gets one empty piece). Fills the first `S + target_pieces` slots
    of `plan`, zeroes the arrivals and returns `plan`. All pieces have the same multiple of PIECE_MULTIPLE tokens, the
    end of a sequence excepted: the total spread over `target_pieces`, but at least `min_piece`. They always fit, since
    sum(ceil(len / size)) <= S + total / size.
    Raises ValueError when `plan` was allocated for fewer sequences or other heads.
    """
    plan.require(seq_lens.shape[0], num_kv_heads)
    return (plan_decode_triton if seq_lens.is_cuda else plan_decode_reference)(seq_lens, num_kv_heads, plan)


def plan_decode_reference(seq_lens: torch.Tensor, num_kv_heads: int, plan: DecodePlan) -> DecodePlan:
    """`plan_decode` in PyTorch."""
    num_seqs, device = seq_lens.shape[0], seq_lens.device
    lens = seq_lens.long()
    share = -(-lens.sum() // plan.target_pieces)
    size = (-(-share // PIECE_MULTIPLE) * PIECE_MULTIPLE).clamp(min=_min_piece(plan, num_seqs))
    counts = (-(-lens // size)).clamp(min=1)
    firsts = counts.cumsum(0) - counts
    seq = torch.repeat_interleave(torch.arange(num_seqs, device=device), counts)
    partial = torch.arange(seq.shape[0], device=device)
    begin = (partial - firsts[seq]) * size
    end = torch.minimum(begin + size, lens[seq])
    is_last = partial == (firsts + counts - 1)[seq]
    # Whole pieces first, then the ends of the sequences.
    order = torch.argsort(torch.where(is_last, end - begin, size + 1), descending=True, stable=True)
    used = torch.stack([seq, begin, end, partial, firsts[seq], counts[seq]], dim=1)[order]
    plan.pieces[: num_seqs + plan.target_pieces] = -1
    plan.pieces[: used.shape[0]] = used.int()
    plan.arrivals[:num_seqs] = 0
    return plan


def _min_piece(plan: DecodePlan, num_seqs: int) -> int:
    """Half of `plan.min_piece` where there are no more heads of sequences than multiprocessors, and so on."""
    programs, piece = num_seqs * plan.arrivals.shape[1], plan.min_piece
    while 0 < programs <= plan.multiprocessors and piece > PIECE_MULTIPLE:
        programs, piece = 2 * programs, piece // 2
    return piece


def plan_decode_triton(seq_lens: torch.Tensor, num_kv_heads: int, plan: DecodePlan) -> DecodePlan:
    """`plan_decode` in one launch: a program per sequence and one for the idle slots."""
    num_seqs = seq_lens.shape[0]
    _plan_kernel[(num_seqs + 1,)](
        seq_lens,
        plan.pieces,
        plan.arrivals,
        num_seqs,
        num_seqs + plan.target_pieces,
        plan.target_pieces,
        _min_piece(plan, num_seqs),
        num_kv_heads,
        PIECE_MULTIPLE=PIECE_MULTIPLE,
        PIECE_FIELDS=PIECE_FIELDS,
        CHUNK=1024,
        num_warps=4,
        **early_launch(seq_lens),
    )
    return plan


@triton.jit(do_not_specialize=["num_seqs", "num_slots", "target_pieces", "min_piece", "num_kv_heads"])
def _plan_kernel(
    seq_lens_ptr,
    pieces_ptr,
    arrivals_ptr,
    num_seqs,
    num_slots,
    target_pieces,
    min_piece,
    num_kv_heads,
    PIECE_MULTIPLE: tl.constexpr,
    PIECE_FIELDS: tl.constexpr,
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
    size = tl.maximum(min_piece, tl.cdiv(tl.cdiv(total, target_pieces), PIECE_MULTIPLE) * PIECE_MULTIPLE)

    length = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    count = tl.maximum(tl.cdiv(length, size), 1)
    end_length = length - (count - 1) * size
    first = 0  # of this sequence's partial results
    num_pieces = 0  # of all sequences
    num_ends = 0  # that come before this sequence's
    for base in range(0, num_seqs, CHUNK):
        other = base + lanes
        lens = tl.load(seq_lens_ptr + other, mask=other < num_seqs, other=0)
        counts = tl.where(other < num_seqs, tl.maximum(tl.cdiv(lens, size), 1), 0)
        end_lengths = lens - (counts - 1) * size
        is_before = (end_lengths > end_length) | ((end_lengths == end_length) & (other < seq))
        num_ends += tl.sum(tl.where(is_before & (other < num_seqs), 1, 0))
        first += tl.sum(tl.where(other < seq, counts, 0))
        num_pieces += tl.sum(counts)

    if seq < num_seqs:
        for base in range(0, count, CHUNK):
            index = base + lanes
            is_last = index == count - 1
            slot = tl.where(is_last, num_pieces - num_seqs + num_ends, first - seq + index)
            piece = pieces_ptr + slot * PIECE_FIELDS
            inside = index < count
            tl.store(piece, tl.zeros_like(index) + seq, mask=inside)
            tl.store(piece + 1, index * size, mask=inside)
            tl.store(piece + 2, tl.minimum(index * size + size, length), mask=inside)
            tl.store(piece + 3, first + index, mask=inside)
            tl.store(piece + 4, tl.zeros_like(index) + first, mask=inside)
            tl.store(piece + 5, tl.zeros_like(index) + count, mask=inside)
        for head in range(0, num_kv_heads, CHUNK):
            tl.store(arrivals_ptr + seq * num_kv_heads + head + lanes, 0, mask=head + lanes < num_kv_heads)
    else:
        for base in range(num_pieces * PIECE_FIELDS, num_slots * PIECE_FIELDS, CHUNK):
            tl.store(pieces_ptr + base + lanes, -1, mask=base + lanes < num_slots * PIECE_FIELDS)
