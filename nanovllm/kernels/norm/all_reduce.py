"""A small sum over the devices of one host in one kernel: each rank writes to all ranks' memory, then adds up its own.

A decode step's message is some KB, so latency, not bandwidth, sets its time. Each rank stores its partial sum straight
into an *inbox* in every rank's memory, which has one inbox for each sender. Then it waits until its own inboxes are
full, and adds them up itself: one trip over NVLink, where a ring takes 2 · (ranks - 1). Each rank sends
(ranks - 1) · bytes, where a ring sends 2 · (ranks - 1) / ranks · bytes: so NCCL keeps the large messages.

There is no flag beside the data, hence no fence between the two. An empty word of an inbox holds -0.0, which no rank
sends (it sends +0.0 instead), and the reader polls until no word is empty, as "LL" of NCCL and the "Lamport" kernels of
TensorRT-LLM do (Lamport 1977). The reader then empties what it has read. Calls alternate between two sets of inboxes,
so no peer writes too early:

    A rank sends for call n + 1 after its kernel n has ended, which has read and emptied its inboxes. A peer writes into
    the same set again in call n + 2, and it starts that only after it has received what this rank sends in n + 1.

All ranks add the same numbers in the same order, in float32, and round once: all get the same bits. Each program counts
on the device which set is next, so a captured graph can be replayed in any order.

When a rank has died, its peers would poll forever. So they also look at a word in the host's memory, with which the
host can tell them to give up.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.norm.rms_norm import add_to_residual, count_slices, load_sum, normed
from nanovllm.kernels.triton_shim import tl, triton

# A rank may send up to so many bytes, all copies together; larger messages go to NCCL; 0: all do. Every rank of a group
# must have the same limit. Up to here, 256 x 5120 in bfloat16 between two H200s, this kernel is the fastest of all
# (docs/tensor_parallelism.md).
ONE_SHOT_BYTES = 2_621_440

# Fewer than there are multiprocessors, so that all programs run at once: a waiting program may not keep the one that it
# waits for from starting.
PROGRAMS = 128
# Polls between two looks at the host's word, some 10 ms. A device makes its looks one after the other, a microsecond
# for each waiting warp, so they must be rare: ranks that are merely out of step should meet before the first.
POLLS = tl.constexpr(16384)
WORDS = {2: torch.int16, 4: torch.int32}  # the type of an inbox's word, by the size of an element

NewEmpty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def one_shot_limit(size: int) -> int:
    """Bytes of the largest message that this kernel sums over `size` ranks."""
    return ONE_SHOT_BYTES // (size - 1)


@dataclass(eq=False)
class PeerBuffers:
    """A rank's inboxes, and the addresses of all ranks' inboxes.

    Attributes:
        inboxes: `[2, ranks, max_rows, columns]` words.
        addresses: `[ranks + 1]` int64: each rank's inboxes, as this device addresses them, and then `stop`.
        turns: `[programs]` int32, the set of inboxes that each program uses next.
        stop: `[1]` int32 in the host's memory, which the device can read; not 0: kernels stop waiting.
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
        """Whether the inboxes hold such a message. This depends on its shape and dtype alone, so all ranks agree."""
        return rows <= self.max_rows and columns == self.columns and dtype == self.dtype

    def give_up(self) -> None:
        """Unblock kernels that wait for a peer; their results are garbage. From any thread; there is no way back."""
        self.stop.fill_(1)


def make_inboxes(size: int, max_rows: int, columns: int, dtype: torch.dtype, new_empty: NewEmpty) -> torch.Tensor:
    """Empty inboxes, in memory from `new_empty(shape, dtype)`."""
    words = WORDS[dtype.itemsize]
    return new_empty((2, size, max_rows, columns), words).fill_(torch.iinfo(words).min)  # the bits of -0.0


def one_shot_all_reduce(x: torch.Tensor, peers: PeerBuffers) -> torch.Tensor:
    """Replace `x [tokens, columns]`, which must `fit`, by its sum over the ranks: the same bits on every rank."""
    _launch(x, x, x, x, 0.0, peers, has_norm=False)
    return x


def one_shot_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, peers: PeerBuffers
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` of the sum of x over the ranks, in one launch; it rounds as the two calls in turn would.

    x may be partial sums `[slices, tokens, columns]` in float32: the rank adds them up and rounds before it sends.
    """
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    _launch(x, residual, weight, out, eps, peers, has_norm=True)
    return out, residual


def one_shot_all_reduce_reference(partials: list[torch.Tensor]) -> torch.Tensor:
    """`one_shot_all_reduce` in PyTorch and in one process, from the list of all ranks' x."""
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
        return  # a call without rows would wait for no peer, so a peer could get a turn too far ahead
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


@triton.jit(do_not_specialize=["num_rows"])  # it takes many values: compile one kernel for all
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
    program = tl.program_id(0)  # 32-bit offsets do: messages are small
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
            theirs = tl.multiple_of(theirs, 16)  # else Triton would store element by element
            # ".wt" makes it a strong store at system scope (STG.STRONG.SYS), as NCCL's are. PTX's memory model does not
            # promise that a peer sees a plain store before this kernel ends, and this kernel waits for the peer.
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
