"""Measures the device's limits, the roofline's ceilings: bytes read per second and matmul FLOPs per second.

A roofline is only as honest as its ceilings, so they come from this device and not from a data sheet. Each is the best
of several runs, the read bandwidth also the best of several kernels. A run counts only the bytes that it must move, so
the true limit is at or above the figure.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from time import perf_counter

import torch

from nanovllm.kernels.triton_shim import tl, triton

READ_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}  # far more than any cache has
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
NUM_TRIALS = 8
WHOLE = 1 << 15  # elements; makes both halves whole tiles: masks of a partial tile would prevent wide loads
# Launches of the read kernel: (programs or None: one a tile, elements that each loads at a time, warps)
_READERS = ((16384, 4096, 4), (None, 4096, 4), (None, 8192, 8), (None, 16384, 8))


@dataclass(slots=True, frozen=True)
class Ceilings:
    """Bytes per second of reading memory and of copying (read + write), and FLOPs per second of a square matmul."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    matmul_flops_per_s: float

    def times(self, num_devices: int) -> "Ceilings":
        """The ceilings of `num_devices` such devices together."""
        return Ceilings(*(num_devices * rate for rate in astuple(self)))


def measure_ceilings(device: str, dtype: torch.dtype, shrink: int = 1) -> Ceilings:
    """Measure `device` ("cuda", or "cpu" with torch's threads), with a matmul of `dtype`. Takes a second or two.

    `shrink` divides the operands' bytes. The call is then quick, but its figures are no longer ceilings.
    """
    num_bytes = READ_BYTES[device] // shrink
    if device == "cuda":  # an engine may already hold most of the memory
        num_bytes = min(num_bytes, torch.cuda.mem_get_info()[0] // 4)
    x = torch.ones(num_bytes // 4 // WHOLE * WHOLE, dtype=torch.float32, device=device)
    source, target = x.chunk(2)
    n = int(MATMUL_SIZE[device] / shrink**0.5)
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=device)

    reads = [partial(torch.sum, x), partial(torch.amax, x)]
    if device == "cuda":
        reads += [partial(_read_all, x, *reader) for reader in _READERS]
    x_bytes = x.numel() * x.itemsize
    return Ceilings(
        read_bytes_per_s=x_bytes / min(best_seconds(read, device) for read in reads),
        copy_bytes_per_s=x_bytes / best_seconds(lambda: target.copy_(source), device),
        matmul_flops_per_s=2 * n**3 / best_seconds(lambda: torch.matmul(a, b.T, out=out), device),
    )


def best_seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of the shortest of `NUM_TRIALS` runs."""
    return min(run_seconds(run, device, NUM_TRIALS))


def run_seconds(run: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs, by the device's own clock, after one that does not count."""
    run()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def _read_all(x: torch.Tensor, num_programs: int | None, tile: int, num_warps: int) -> torch.Tensor:
    num_programs = num_programs or triton.cdiv(x.numel(), tile)
    sums = torch.empty(num_programs, dtype=torch.float32, device=x.device)
    _read_kernel[(num_programs,)](x, sums, x.numel(), num_programs, TILE=tile, num_warps=num_warps)
    return sums


@triton.jit
def _read_kernel(x_ptr, sums_ptr, n, num_readers, TILE: tl.constexpr):
    """Sum `x [n]` into `sums [num_readers]`: reads and does little else, with many loads in flight."""
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], dtype=tl.float32)
    stride = num_readers * TILE
    for start in range(0, n, stride):
        index = start + offsets
        total += tl.load(x_ptr + index, mask=index < n, other=0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))
