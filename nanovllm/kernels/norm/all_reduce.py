"""A small sum over the devices of one host as one kernel: everyone writes into everyone's memory, then adds up.

A decode step's message is some KB, whose time is that of the way there and not of its bytes. So each rank stores its
partial sum straight into an *inbox* in every other rank's memory, one for each sender, waits until its own inboxes are
full, and adds them up itself: one trip over NVLink where a ring takes 2 · (ranks - 1). Each rank sends
(ranks - 1) · bytes, where a ring sends 2 · (ranks - 1) / ranks · bytes: large messages are left to NCCL.

There is no flag beside the data, hence no fence between the two: an empty word of an inbox holds -0.0, which no
sender sends (it becomes +0.0), and the reader polls until no word is empty (as "LL" of NCCL and the "Lamport" kernels
of TensorRT-LLM do, Lamport 1977). What has been read is emptied again. There are two sets of inboxes, used in turn:

    A rank sends for call n + 1 after its kernel n has ended, all inboxes of that set read and emptied. A peer writes
    into the same set again in call n + 2, for which it needs what this rank sends in n + 1: so never too early.

All ranks add the same numbers in the same order, in float32, and round once: the same bits everywhere. Which set is
the next is counted on the device, by each program for itself, so a captured graph can be replayed in any order.

A rank that has died leaves its peers polling, so a host can have them give up: they look at a word in its memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.norm.rms_norm import add_to_residual, count_slices, load_sum, normed
from nanovllm.kernels.triton_shim import tl, triton

# Messages of which a rank sends up to so many bytes, a copy to each other, are summed this way, on all devices of a
# group or on none; 0: never. Up to here, 256 x 5120 in bfloat16 between two H200s, it is the fastest of all
# (docs/tensor_parallelism.md).
ONE_SHOT_BYTES = 2_621_440

PROGRAMS = 128  # fewer than there are processors: all of them run at once, so that none waits for one that cannot
# Between two looks at the host's word: some 10 ms. Looks are made one after the other on all of a device, a microsecond
# for each warp that waits, so they must be far rarer than the waits of ranks that are merely not in step.
POLLS = tl.constexpr(16384)
WORDS = {2: torch.int16, 4: torch.int32}  # by the size of an element

NewEmpty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def one_shot_limit(size: int) -> int:
    """Bytes of the largest message that is summed this way over `size` ranks."""
    return ONE_SHOT_BYTES // (size - 1)


@dataclass(eq=False)
class PeerBuffers:
    """A rank's inboxes, `[2, ranks, max_rows, columns]` words, and where everybody's are.

    Attributes:
        addresses: `[ranks + 1]` int64, of each rank's inboxes as seen from here, and of `stop`.
        turns: `[programs]` int32, the set of inboxes that each program uses next.
        stop: `[1]` int32 in the host's memory, which the device can read: not 0 means that nobody shall wait.
    """

    rank: int
    size: int
    max_rows: int
    columns: int
    dtype: torch.dtype
    inboxes: torch.Tensor
    addresses: torch.Tensor
    turns: torch.Tensor
    stop: torch.Tensor

    def fit(self, rows: int, columns: int, dtype: torch.dtype) -> bool:
        """Whether a message may be summed this way. It depends on its shape alone, so all ranks agree."""
        return rows <= self.max_rows and columns == self.columns and dtype == self.dtype

    def give_up(self) -> None:
        """Have kernels that wait for a peer go on with what they have. From any thread; there is no way back."""
        self.stop.fill_(1)


def make_inboxes(size: int, max_rows: int, columns: int, dtype: torch.dtype, new_empty: NewEmpty) -> torch.Tensor:
    """Empty inboxes in the memory that `new_empty(shape, dtype)` gives."""
    words = WORDS[dtype.itemsize]
    return new_empty((2, size, max_rows, columns), words).fill_(torch.iinfo(words).min)  # the bits of -0.0


def one_shot_all_reduce(x: torch.Tensor, peers: PeerBuffers) -> torch.Tensor:
    """The sum of every rank's `x [tokens, columns]`, which must `fit`, over `x`; the same bits on every rank."""
    _launch(x, x, x, x, 0.0, peers, has_norm=False)
    return x


def one_shot_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, peers: PeerBuffers
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` of the sum of every rank's `x`, with the same rounding as one after the other; one launch.

    A rank's x may be partial sums `[slices, tokens, columns]` in float32, whose sum is rounded before it is sent.
    """
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    _launch(x, residual, weight, out, eps, peers, has_norm=True)
    return out, residual


def one_shot_all_reduce_reference(partials: list[torch.Tensor]) -> torch.Tensor:
    """The sum in PyTorch, of all ranks' partial sums in one process."""
    total = torch.zeros_like(partials[0], dtype=torch.float32)
    for partial in partials:
        total += partial
    return total.to(partials[0].dtype)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    peers: PeerBuffers,
    has_norm: bool,
) -> None:
    if not residual.shape[0]:
        return  # such a call would wait for nobody, so that a peer might be a turn too far ahead
    tile = triton.next_power_of_2(peers.columns)
    _one_shot_kernel[(len(peers.turns),)](
        x,
        residual,
        weight,
        out,
        peers.inboxes,
        peers.addresses,
        peers.turns,
        residual.shape[0],
        peers.max_rows,
        x.stride(-2),
        x.stride(0),
        residual.stride(0),
        out.stride(0),
        eps,
        RANK=peers.rank,
        SIZE=peers.size,
        RANKS=triton.next_power_of_2(peers.size),
        COLUMNS=peers.columns,
        TILE=tile,
        NUM_SLICES=count_slices(x),
        EMPTY=torch.iinfo(peers.inboxes.dtype).min,
        HAS_NORM=has_norm,
        num_warps=min(max(tile // 256, 1), 16),  # 8 elements, 16 bytes of bf16, a thread and rank
        **early_launch(x),
    )


@triton.jit(do_not_specialize=["num_rows"])  # of which there are many: one is compiled for all
def _one_shot_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    inboxes_ptr,
    addresses_ptr,
    turns_ptr,
    num_rows,
    max_rows,
    x_stride,
    slice_stride,
    residual_stride,
    out_stride,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    EMPTY: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    program = tl.program_id(0)  # offsets are of small messages, so 32 bits do
    column = tl.arange(0, TILE)
    inside = column < COLUMNS
    word: tl.constexpr = inboxes_ptr.dtype.element_ty
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    stop_ptr = tl.load(addresses_ptr + SIZE).to(tl.pointer_type(tl.int32))
    wait_for_previous(EARLY)
    turn = tl.load(turns_ptr + program)

    for row in range(program, num_rows, tl.num_programs(0)):  # send all before waiting for any
        x = load_sum(x_ptr + row * x_stride + column, slice_stride, inside, NUM_SLICES, dtype)
        words = x.to(word, bitcast=True)
        words = tl.where(words == EMPTY, 0, words)
        inbox = ((turn * SIZE + RANK) * max_rows + row) * COLUMNS
        for peer in tl.static_range(SIZE):
            theirs = tl.load(addresses_ptr + peer).to(tl.pointer_type(word))
            theirs = tl.multiple_of(theirs, 16)  # or it would be stored element by element
            # ".wt" makes it a strong store at system scope (STG.STRONG.SYS), as NCCL's are: of a plain one PTX's memory
            # model does not say that anybody sees it before the kernel has ended, which waits for the answer.
            tl.store(theirs + inbox + column, words, mask=inside, cache_modifier=".wt")

    sender = tl.arange(0, RANKS)[:, None]
    is_sent = (sender < SIZE) & inside[None, :]
    for row in range(program, num_rows, tl.num_programs(0)):
        inbox = ((turn * SIZE + sender) * max_rows + row) * COLUMNS
        places = inboxes_ptr + inbox + column[None, :]
        words = tl.load(places, mask=is_sent, other=0, volatile=True)
        is_full = tl.min((words != EMPTY).to(tl.int32))
        polls = 0
        while is_full == 0:
            words = tl.load(places, mask=is_sent, other=0, volatile=True)
            is_full = tl.min((words != EMPTY).to(tl.int32))
            polls += 1
            if polls % POLLS == 0:
                is_full = tl.maximum(is_full, tl.load(stop_ptr, volatile=True))
        tl.store(places, tl.full([RANKS, TILE], EMPTY, word), mask=is_sent)
        x = tl.sum(words.to(dtype, bitcast=True).to(tl.float32), axis=0).to(dtype)
        if HAS_NORM:
            x = add_to_residual(x, residual_ptr + row * residual_stride + column, inside)
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
            x = normed(x, weight, eps, COLUMNS).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * out_stride + column, x, mask=inside)
    tl.store(turns_ptr + program, 1 - turn)
