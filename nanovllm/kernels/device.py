"""Properties of a device that launch parameters depend on. A CPU, which interprets kernels, counts as an H100."""

from functools import lru_cache

import torch

H100_MULTIPROCESSORS = 132
H100_SHARED_MEMORY = 227 * 1024


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is a Hopper GPU or later: it can start kernels early, and an engine copies tiles (TMA)."""
    if device.type != "cuda":
        return True
    return bool(torch.version.cuda) and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """The number of the device's multiprocessors."""
    is_cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else H100_MULTIPROCESSORS


@lru_cache
def shared_memory_bytes(device: torch.device) -> int:
    """The shared memory that one program may use: 227 KiB on an H100, 99 KiB on consumer cards."""
    is_cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if is_cuda else H100_SHARED_MEMORY
