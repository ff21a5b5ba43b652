"""The all-reduces that benchmarks/all_reduce.py compares, and how it measures one: its error, its time in a graph.

A method is a function from an example message to a `Run`; it may make its buffers from the message. The `+ norm`
methods add the residual and do the RMSNorm that follow in the model. torch's own methods take their message from
symmetric memory, where the benchmark has put it; ours and NCCL's take it from where a matrix product leaves it.

The device sleeps before the first replay, so that all replays are queued when it begins: the time leaves out the hosts'
work and any host that is late. The first replay, which is not timed, brings the ranks into step.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.kernels.device import multiprocessors
from nanovllm.kernels.norm.all_reduce import (
    PeerBuffers,
    one_shot_add_rms_norm,
    one_shot_all_reduce,
    one_shot_all_reduce_reference,
)
from nanovllm.kernels.norm.rms_norm import add_rms_norm
from nanovllm.kernels.triton_shim import tl, triton

DTYPE = torch.bfloat16
EPS = 1e-6
CALLS, REPLAYS = 50, 20  # calls in a graph; timed replays of the graph
SLEEP_CYCLES = 20_000_000  # 10 ms, in which the host queues all replays
LARGE_BYTES, LARGE_COPIES = 256 << 20, 10

Run = Callable[[torch.Tensor], torch.Tensor]  # from a rank's partial sum to the result


def own_methods(nccl: Any, peers: PeerBuffers | None) -> dict[str, Callable[[torch.Tensor], Run]]:
    """The engine's methods, NCCL's and ours, by name; those whose communication failed to start are missing."""
    made: dict[str, Callable[[torch.Tensor], Run]] = {}
    if nccl is not None:
        made["NCCL"] = lambda x: partial(in_place, nccl.all_reduce)
        made["NCCL + norm"] = lambda x: with_norm(partial(in_place, nccl.all_reduce), x)
    if peers is not None:
        made["ours"] = lambda x: partial(one_shot_all_reduce, peers=peers)
        made["ours + norm"] = lambda x: with_norm(partial(one_shot_all_reduce, peers=peers), x)
        made["ours, fused + norm"] = lambda x: fused_norm(peers, x)
    return made


def torch_methods() -> dict[str, Callable[[torch.Tensor], Run]]:
    return {
        "torch one-shot": lambda x: symmetric("one_shot_all_reduce", x),
        "torch two-shot": lambda x: symmetric("two_shot_all_reduce_", x),
    }


def in_place(all_reduce: Callable[[torch.Tensor], None], x: torch.Tensor) -> torch.Tensor:
    all_reduce(x)
    return x


def with_norm(run: Run, x: torch.Tensor) -> Run:
    residual, weight = torch.zeros_like(x), torch.ones_like(x[0])
    return lambda x: (add_rms_norm(run(x), residual, weight, EPS), residual)[1]


def fused_norm(peers: PeerBuffers, x: torch.Tensor) -> Run:
    residual, weight = torch.zeros_like(x), torch.ones_like(x[0])
    return lambda x: one_shot_add_rms_norm(x, residual, weight, EPS, peers)[1]


def symmetric(operation: str, x: torch.Tensor) -> Run:
    """One of torch's methods, on a message in symmetric memory."""
    import torch.distributed._symmetric_memory as symm_mem

    group = dist.group.WORLD.group_name
    message = symm_mem.empty(*x.shape, dtype=x.dtype, device=x.device)
    symm_mem.rendezvous(message, group)
    message.copy_(x)  # the check needs these values; the timed calls may sum any
    return lambda x: getattr(torch.ops.symm_mem, operation)(message, "sum", group)


def check_and_time(
    make: Callable[[torch.Tensor], Run], shape: tuple[int, int], rank: int, size: int
) -> dict[str, float]:
    """Check a method's sum, then time it: "error_ulp" is the greatest error in units of the greatest value's last bit,
    "replays" the microseconds of a call in each replay, "microseconds" and "worst" their median and maximum.

    Raises RuntimeError if the error is more than one unit.
    """
    partials = []
    for other in range(size):
        generator = torch.Generator(device="cuda").manual_seed(other)
        partials.append(torch.randn(shape, generator=generator, device="cuda").to(DTYPE))
    expected = one_shot_all_reduce_reference(partials).float()
    run = make(partials[rank])
    got = run(partials[rank].clone()).float()  # with a norm: the residual, which began as zeros
    ulp = torch.finfo(DTYPE).eps * float(expected.abs().max())
    error = float((got - expected).abs().max()) / ulp
    if not error <= 1:
        raise RuntimeError(f"the sum is wrong by {error:.3g} units of the last bit")
    replays = time_in_graph(run, torch.zeros(shape, dtype=DTYPE, device="cuda"))
    return {"microseconds": median(replays), "worst": max(replays), "replays": replays, "error_ulp": error}


def time_in_graph(run: Run, x: torch.Tensor) -> list[float]:
    """Microseconds of a call, for each timed replay of a graph of `CALLS` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(CALLS):
                run(x)
        finally:
            graph.capture_end()
        torch.cuda._sleep(SLEEP_CYCLES)
        graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        stream.synchronize()
    return [1e3 * begin.elapsed_time(end) / CALLS for begin, end in pairwise(marks)]


def large_all_reduce(nccl: Any, size: int) -> float:
    """Bytes per second that a link carries one way while NCCL all-reduces a large message."""
    x = torch.zeros(LARGE_BYTES, dtype=torch.uint8, device="cuda").view(DTYPE)
    return 2 * (size - 1) / size * LARGE_BYTES / (1e-6 * median(time_in_graph(partial(in_place, nccl.all_reduce), x)))


def copy_by_engine() -> float:
    """Bytes per second at which the hardware for copies copies from device 0 to device 1."""
    return time_copies(lambda here, there: there.copy_(here, non_blocking=True))


def copy_by_kernel() -> float:
    """Bytes per second at which a kernel on device 0 stores into device 1's memory."""
    programs = 8 * multiprocessors(torch.device("cuda", 0))
    return time_copies(lambda here, there: _copy_kernel[(programs,)](here, there, here.numel(), BLOCK=2048))


def time_copies(copy: Callable[[torch.Tensor, torch.Tensor], Any]) -> float:
    here = torch.arange(LARGE_BYTES // 4, dtype=torch.int32, device="cuda:0")
    there = torch.empty_like(here, device="cuda:1")
    there[:1].copy_(here[:1])  # gives device 0 access to device 1's memory
    copy(here, there)
    torch.cuda.synchronize(1)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    for _ in range(LARGE_COPIES):
        copy(here, there)
    end.record()
    torch.cuda.synchronize()
    if not torch.equal(here, there.to(here.device)):
        raise RuntimeError("device 1 did not receive the bytes that device 0 sent")
    return LARGE_COPIES * LARGE_BYTES / (begin.elapsed_time(end) / 1e3)


@triton.jit
def _copy_kernel(from_ptr, to_ptr, size, BLOCK: tl.constexpr):
    for block in range(tl.program_id(0), size // BLOCK, tl.num_programs(0)):
        places = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(to_ptr + places, tl.load(from_ptr + places))
