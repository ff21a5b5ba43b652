"""The device's limits, measured and not read off a data sheet: bytes read per second and matmul FLOPs per second.

A roofline is only as honest as its ceilings. Each is therefore the best of several ways to reach it, every one
counting only the bytes it must move: the truth is at or above the figure, so no engine looks better than it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from nanovllm.kernels.triton_shim import tl, triton

READ_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}  # far beyond any cache
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
NUM_TRIALS = 8
_NUM_READERS, _READ_TILE = 16384, 4096  # programs of the read kernel, and elements each takes at a time


@dataclass(slots=True, frozen=True)
class Ceilings:
    """Bytes per second of reading memory and of copying (read + write), and FLOPs per second of a square matmul."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    matmul_flops_per_s: float


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measure `device` ("cuda" or "cpu", with the threads torch uses); the matmul is of `dtype`. About a second."""
    num_bytes = READ_BYTES[device]
    if device == "cuda":  # an engine may hold most of the memory
        num_bytes = min(num_bytes, torch.cuda.mem_get_info()[0] // 4)
    x = torch.ones(num_bytes // 8 * 2, dtype=torch.float32, device=device)
    source, target = x.chunk(2)
    n = MATMUL_SIZE[device]
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=device)

    reads = [partial(torch.sum, x), partial(torch.amax, x)]
    if device == "cuda":
        reads.append(partial(_read_all, x))
    x_bytes = x.numel() * x.itemsize
    return Ceilings(
        read_bytes_per_s=x_bytes / min(best_seconds(read, device) for read in reads),
        copy_bytes_per_s=x_bytes / best_seconds(lambda: target.copy_(source), device),
        matmul_flops_per_s=2 * n**3 / best_seconds(lambda: torch.matmul(a, b.T, out=out), device),
    )


def best_seconds(run: Callable[[], object], device: str) -> float:
    """The shortest of several runs after a first one that does not count, on the device's own clock."""
    run()
    if device == "cpu":
        times = []
        for _ in range(NUM_TRIALS):
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        return min(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(NUM_TRIALS + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return min(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3


def _read_all(x: torch.Tensor) -> torch.Tensor:
    sums = torch.empty(_NUM_READERS, dtype=torch.float32, device=x.device)
    _read_kernel[(_NUM_READERS,)](x, sums, x.numel(), _NUM_READERS, TILE=_READ_TILE)
    return sums


@triton.jit
def _read_kernel(x_ptr, sums_ptr, n, num_readers, TILE: tl.constexpr):
    """Sum `x [n]` into `sums [num_readers]`: nothing but reading, with many loads in flight."""
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], dtype=tl.float32)
    stride = num_readers * TILE
    for start in range(0, n, stride):
        index = start + offsets
        total += tl.load(x_ptr + index, mask=index < n, other=0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))
