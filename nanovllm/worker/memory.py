"""How many bytes the device has left for the KV cache: measured by running, not estimated.

    cache = memory this engine may use - weights - peak of the largest step - what graphs and libraries keep

Blocks = cache bytes / bytes of one block.
"""

import math
import mmap
from dataclasses import dataclass

import torch

HEADROOM = 0.98  # of what is free: the allocator cannot place every last byte


@dataclass(slots=True)
class DeviceMemory:
    """The device's memory in bytes at one moment, taken before an engine loads anything."""

    free: int
    total: int
    allocated: int  # by this process through PyTorch: other engines'
    reserved: int

    @classmethod
    def now(cls) -> "DeviceMemory":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        free, total = torch.cuda.mem_get_info()
        return cls(free, total, torch.cuda.memory_allocated(), torch.cuda.memory_reserved())


def cache_bytes_left(before: DeviceMemory, utilization: float, graph_bytes: int) -> int:
    """Bytes for the cache, after the weights are loaded and the largest step has run.

    Args:
        before: taken before the weights.
        utilization: the share of the whole device that this engine may fill. What others hold stays theirs.
        graph_bytes: what the captured graphs will keep.
    """
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before.allocated
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    by_libraries = (before.free - free) - (torch.cuda.memory_reserved() - before.reserved)
    budget = min(before.total * utilization, before.free * HEADROOM)
    return int(budget) - peak - max(by_libraries, 0) - graph_bytes


def cache_bytes_per_block(
    num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of one block: keys and values, all layers."""
    return num_layers * 2 * num_kv_heads * block_size * head_dim * dtype.itemsize


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros. On a CPU a page of them costs neither memory nor time before it is first written."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
