"""Times all-reduces by message and by method, on the GPUs of one host: `python -m benchmarks.all_reduce`.

Each rank is a process. It first compares a method's result with the sum that it can compute alone, then times the
method as the engine runs it: in a captured graph, one call after the other, here on messages of zeros
(benchmarks/all_reduce_methods.py). The table shows the median of the timed replays, and the worst in brackets if it is
more than half as much again; the JSON has all of them.

The last column is the time that no method can beat: the message's bytes over the rate of the link to the next device,
by the copy engine or by a kernel that stores, whichever is faster. The table leaves out a method that fails. If a
method hangs, the benchmark ends at `--seconds` and reports what it has until then. The last line is JSON.
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
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.all_reduce_methods import (
    DTYPE,
    Run,
    check_and_time,
    copy_by_engine,
    copy_by_kernel,
    large_all_reduce,
    own_methods,
    torch_methods,
)
from benchmarks.machine import describe_machine, describe_versions
from benchmarks.report import table_lines
from nanovllm.distributed.peer_memory import connect_peers
from nanovllm.kernels.norm.all_reduce import PeerBuffers

ROWS = (1, 8, 32, 128, 256)
HIDDEN_SIZES = (1024, 4096, 5120)
KERNEL_SECONDS = 20  # after which our kernels stop waiting for other ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--seconds", type=float, default=58, help="end the benchmark after so many seconds")
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
    """Start the ranks, and collect what they report of messages `[rows, hidden_size]` until all end or time is up."""
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
        pass  # all ranks have ended
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
    """Run one rank's process. Rank 0 sends what it measures; every rank sends its errors."""
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
        except Exception as error:  # the other measurements go on
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
    if rank == 0:  # last of our own: it gives this process a context on another rank's device
        measure_rate("copy engine", copy_by_engine)
        measure_rate("storing kernel", copy_by_kernel)
    dist.barrier()
    for hidden in hidden_sizes if with_torch else ():  # last: if one fails, nothing ends the other ranks' waiting
        measure_all(hidden, torch_methods())
    link.close()
    os._exit(0)  # skips teardown: communicators would wait for graphs, and graphs for the garbage collector


@contextmanager
def limited(peers: PeerBuffers | None) -> Iterator[None]:
    """Unblock our kernels after `KERNEL_SECONDS`, since a failure in one rank leaves the others waiting for it.

    Their sums are wrong from then on, and the check reports that.
    """
    limit = threading.Timer(KERNEL_SECONDS, peers.give_up if peers is not None else int)
    limit.daemon = True
    limit.start()
    yield
    limit.cancel()


def join_nccl(store: dist.Store, rank: int, size: int) -> Any:
    from nanovllm.distributed.nccl import NcclGroup, make_unique_id

    if rank == 0:
        store.set("nccl-id", make_unique_id())
    return NcclGroup(bytes(store.get("nccl-id")), rank, size)


def report_lines(report: dict[str, Any]) -> list[str]:
    """The times as a table with a column for each method, the link's rates and the errors."""
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
    """The best measured rate of the link to the next device, in bytes per second one way; None if none is measured."""
    return max((rate for name, rate in report["bandwidth"].items() if name != "all_reduce"), default=None)


def cell(took: dict[str, Any] | None) -> str:
    if took is None:
        return "-"
    worst = f" ({took['worst']:.0f})" if took["worst"] > 1.5 * took["microseconds"] else ""
    return f"{took['microseconds']:.2f}{worst}"


if __name__ == "__main__":
    main()
