"""Microseconds of an all-reduce, by message and by method: `python -m benchmarks.all_reduce`, on the GPUs of one host.

Each rank is a process. A method is first held against the sum that a rank can work out alone, then timed as the engine
runs it: in a captured graph, one call after the other, here of messages that are all zeros. `+ norm` is with the
addition and RMSNorm that follow in the model. torch's own methods find their message in symmetric memory already, ours
and NCCL's find it where a matrix product has left it.

Before the first replay the device sleeps, so that all are queued when it begins: what the hosts do in the meantime,
and which of them is late, is not measured. The first replay brings the ranks into step. Of the others, each timed, the
median is shown, and the worst in brackets where it is half as much again; the JSON has all of them.

The last column is the message's bytes over what the link to the next device carries, by its copy engine or by a kernel
that stores, whichever is faster: what no method can beat. What fails is left out, what hangs ends the run at
`--seconds` with what there is until then. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.machine import describe_machine, describe_versions
from benchmarks.report import table_lines
from nanovllm.distributed.peer_memory import connect_peers
from nanovllm.kernels.device import multiprocessors
from nanovllm.kernels.norm.all_reduce import (
    PeerBuffers,
    one_shot_add_rms_norm,
    one_shot_all_reduce,
    one_shot_all_reduce_reference,
)
from nanovllm.kernels.norm.rms_norm import add_rms_norm
from nanovllm.kernels.triton_shim import tl, triton

ROWS = (1, 8, 32, 128, 256)
HIDDEN_SIZES = (1024, 4096, 5120)
DTYPE = torch.bfloat16
EPS = 1e-6
CALLS, REPLAYS = 50, 20  # in a graph; of it, each of which is timed
SLEEP_CYCLES = 20_000_000  # 10 ms, in which the host queues all replays
LARGE_BYTES, LARGE_COPIES = 256 << 20, 10
KERNEL_SECONDS = 20  # after which our kernels stop waiting for each other

Run = Callable[[torch.Tensor], torch.Tensor]  # from a rank's partial sum to the result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--seconds", type=float, default=58, help="when whatever runs is ended")
    args = parser.parse_args()
    if not 2 <= args.ranks <= torch.cuda.device_count():
        parser.error(f"--ranks {args.ranks} must be in [2, {torch.cuda.device_count()}], the number of CUDA devices")
    report = collect(args.ranks, args.seconds)
    print(*report_lines(report), sep="\n")
    print(json.dumps(report | {"machine": describe_machine("cuda"), "versions": describe_versions()}))


def collect(
    size: int,
    seconds: float,
    rows: tuple[int, ...] = ROWS,
    hidden_sizes: tuple[int, ...] = HIDDEN_SIZES,
    with_torch: bool = True,
) -> dict[str, Any]:
    """What rank 0 reports of messages `[rows, hidden_size]` until all ranks have ended, or the time is up."""
    deadline = time.monotonic() + seconds
    folder = Path(tempfile.mkdtemp(prefix="nanovllm-"))
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    messages = (rows, hidden_sizes, with_torch)
    processes = [context.Process(target=measure, args=(rank, size, folder, theirs, *messages)) for rank in range(size)]
    report: dict[str, Any] = {"benchmark": "all-reduce", "ranks": size, "times": [], "errors": [], "bandwidth": {}}
    try:
        for process in processes:
            process.start()
        theirs.close()
        while ours.poll(max(0.0, deadline - time.monotonic())):
            kind, value = ours.recv()
            if kind != "times":
                print(kind, value, flush=True)
            if kind == "bandwidth":
                report[kind] |= value
            else:
                report[kind].append(value)
    except EOFError:
        pass  # all have ended
    else:
        report["errors"].append(f"ended after {seconds:g} s")
    finally:
        for process in processes:
            process.kill()
            process.join()
        shutil.rmtree(folder, ignore_errors=True)
    return report


def measure(
    rank: int,
    size: int,
    folder: Path,
    link: Connection,
    all_rows: tuple[int, ...],
    hidden_sizes: tuple[int, ...],
    with_torch: bool,
) -> None:
    """One rank's process. Rank 0 sends what it has measured; each sends its errors."""
    torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / "store"), size)
    store.set_timeout(timedelta(seconds=30))
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", store=dist.PrefixStore("torch", store), rank=rank, world_size=size, device_id=device
    )

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # the rest is to be measured all the same
            link.send(("errors", f"rank {rank}, {name}: {error!r}"[:2000]))

    nccl = attempt("NCCL", partial(join_nccl, store, rank, size))

    def measure_rate(name: str, action: Callable[[], float]) -> None:
        rate = attempt(name, action)
        if rank == 0 and rate:
            link.send(("bandwidth", {name: rate}))

    def measure_all(hidden: int, methods: dict[str, Callable[[torch.Tensor], Run]], peers: Any = None) -> None:
        for rows in all_rows:
            for method, make in methods.items():
                shape = (rows, hidden)
                with limited(peers):
                    took = attempt(f"{method} {list(shape)}", partial(check_and_time, make, shape, rank, size))
                if rank == 0 and took:
                    link.send(("times", {"method": method, "rows": rows, "hidden": hidden, **took}))

    if nccl is not None:
        measure_rate("all_reduce", partial(large_all_reduce, nccl, size))
    for hidden in hidden_sizes:
        message = (message_bytes(max(all_rows), hidden), hidden, DTYPE)
        peers = attempt(f"peers {hidden}", partial(connect_peers, nccl, rank, size, *message))
        dist.barrier()
        measure_all(hidden, own_methods(nccl, peers), peers)
    if rank == 0:  # only now, for from then on this process has a context on another rank's device
        measure_rate("copy engine", copy_by_engine)
        measure_rate("storing kernel", copy_by_kernel)
    dist.barrier()
    for hidden in hidden_sizes if with_torch else ():  # last, for nothing would end their waiting
        measure_all(hidden, torch_methods())
    link.close()
    os._exit(0)  # without tearing down what is left: communicators wait for graphs, and those for their collection


@contextmanager
def limited(peers: PeerBuffers | None) -> Iterator[None]:
    """What fails in one rank leaves the others waiting; from then on their sums are wrong, which is noticed."""
    limit = threading.Timer(KERNEL_SECONDS, peers.give_up if peers is not None else int)
    limit.daemon = True
    limit.start()
    yield
    limit.cancel()


def own_methods(nccl: Any, peers: PeerBuffers | None) -> dict[str, Callable[[torch.Tensor], Run]]:
    """By name: from a message of the shape to what is run on each, which may make its buffers from it."""
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
    """One of torch's, on a message that lies in symmetric memory."""
    import torch.distributed._symmetric_memory as symm_mem

    group = dist.group.WORLD.group_name
    message = symm_mem.empty(*x.shape, dtype=x.dtype, device=x.device)
    symm_mem.rendezvous(message, group)
    message.copy_(x)  # so that it holds what is checked; later all are zeros
    return lambda x: getattr(torch.ops.symm_mem, operation)(message, "sum", group)


def check_and_time(
    make: Callable[[torch.Tensor], Run], shape: tuple[int, int], rank: int, size: int
) -> dict[str, float]:
    """The greatest error of one call, in units of the greatest value's last bit, and microseconds of a call."""
    partials = []
    for other in range(size):
        generator = torch.Generator(device="cuda").manual_seed(other)
        partials.append(torch.randn(shape, generator=generator, device="cuda").to(DTYPE))
    expected = one_shot_all_reduce_reference(partials).float()
    run = make(partials[rank])
    got = run(partials[rank].clone()).float()  # with a norm it is the residual, which began as zeros
    ulp = torch.finfo(DTYPE).eps * float(expected.abs().max())
    error = float((got - expected).abs().max()) / ulp
    if not error <= 1:
        raise RuntimeError(f"the sum is wrong by {error:.3g} units of the last bit")
    replays = time_in_graph(run, torch.zeros(shape, dtype=DTYPE, device="cuda"))
    return {"microseconds": median(replays), "worst": max(replays), "replays": replays, "error_ulp": error}


def time_in_graph(run: Run, x: torch.Tensor) -> list[float]:
    """Microseconds of a call in each replay."""
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


def join_nccl(store: dist.Store, rank: int, size: int) -> Any:
    from nanovllm.distributed.nccl import NcclGroup, make_unique_id

    if rank == 0:
        store.set("nccl-id", make_unique_id())
    return NcclGroup(bytes(store.get("nccl-id")), rank, size)


def large_all_reduce(nccl: Any, size: int) -> float:
    """Bytes per second that a link carries one way in NCCL's sum of a large message."""
    x = torch.zeros(LARGE_BYTES, dtype=torch.uint8, device="cuda").view(DTYPE)
    return 2 * (size - 1) / size * LARGE_BYTES / (1e-6 * median(time_in_graph(partial(in_place, nccl.all_reduce), x)))


def copy_by_engine() -> float:
    """Bytes per second of a copy from device 0 to device 1, by the hardware for copies."""
    return time_copies(lambda here, there: there.copy_(here, non_blocking=True))


def copy_by_kernel() -> float:
    """Bytes per second that a kernel on device 0 stores into device 1's memory."""
    programs = 8 * multiprocessors(torch.device("cuda", 0))
    return time_copies(lambda here, there: _copy_kernel[(programs,)](here, there, here.numel(), BLOCK=2048))


def time_copies(copy: Callable[[torch.Tensor, torch.Tensor], Any]) -> float:
    here = torch.arange(LARGE_BYTES // 4, dtype=torch.int32, device="cuda:0")
    there = torch.empty_like(here, device="cuda:1")
    there[:1].copy_(here[:1])  # lets the one reach the other's memory
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
        raise RuntimeError("what arrived is not what was sent")
    return LARGE_COPIES * LARGE_BYTES / (begin.elapsed_time(end) / 1e3)


@triton.jit
def _copy_kernel(from_ptr, to_ptr, size, BLOCK: tl.constexpr):
    for block in range(tl.program_id(0), size // BLOCK, tl.num_programs(0)):
        places = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(to_ptr + places, tl.load(from_ptr + places))


def report_lines(report: dict[str, Any]) -> list[str]:
    """The times as a table, a column for each method."""
    times = report["times"]
    names = list(dict.fromkeys(entry["method"] for entry in times))
    found = {(entry["rows"], entry["hidden"], entry["method"]): entry for entry in times}
    rate = link_rate(report)
    cells = []
    for hidden in HIDDEN_SIZES:
        for rows in ROWS:
            num_bytes = message_bytes(rows, hidden)
            took = [found.get((rows, hidden, name)) for name in names]
            floor = f"{1e6 * num_bytes / rate:.2f}" if rate else "-"
            cells.append([f"{rows} x {hidden}", f"{num_bytes:,}", *map(cell, took), floor])
    lines = table_lines(["message", "bytes", *names, "bytes / link"], cells)
    lines += [f"{name}: {rate / 1e9:,.1f} GB/s" for name, rate in report["bandwidth"].items()]
    return [*lines, *report["errors"]]


def message_bytes(rows: int, hidden: int) -> int:
    return rows * hidden * DTYPE.itemsize


def link_rate(report: dict[str, Any]) -> float | None:
    """Bytes per second that the link to the next device carries one way, of what was measured."""
    return max((rate for name, rate in report["bandwidth"].items() if name != "all_reduce"), default=None)


def cell(took: dict[str, Any] | None) -> str:
    if took is None:
        return "-"
    worst = f" ({took['worst']:.0f})" if took["worst"] > 1.5 * took["microseconds"] else ""
    return f"{took['microseconds']:.2f}{worst}"


if __name__ == "__main__":
    main()
