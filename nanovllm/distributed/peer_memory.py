"""Gives every rank memory on the other ranks' devices to write into, through CUDA's IPC handles.

We do not use torch.distributed's symmetric memory, which does the same: its rendezvous numbers its messages by process,
so a process that has met others before, say for an earlier engine, waits for an answer that never comes; and by default
it sets up NVLink multicast, which we do not need. We call the few functions of the CUDA runtime directly; PyTorch has
already loaded it.
"""

import ctypes
import logging
import weakref
from functools import lru_cache
from typing import Any

import torch

from nanovllm.distributed.tensor_parallel import Group
from nanovllm.kernels.norm.all_reduce import PROGRAMS, PeerBuffers, make_inboxes

logger = logging.getLogger(__name__)

HANDLE_BYTES = 64
LAZY_ENABLE_PEER_ACCESS = 1


class IpcHandle(ctypes.Structure):
    """Lets another process map an allocation."""

    _fields_ = [("reserved", ctypes.c_byte * HANDLE_BYTES)]


def connect_peers(
    group: Group, rank: int, size: int, max_bytes: int, columns: int, dtype: torch.dtype
) -> PeerBuffers | None:
    """Make inboxes for messages `[rows, columns]` of up to `max_bytes`, and map those of all other ranks.

    Every rank must call this, and no rank may send before all have returned. Returns None, and logs the reason, if this
    rank's device cannot reach the others' memory; None on every rank if not even one row fits in `max_bytes`.
    """
    max_rows = max_bytes // (columns * dtype.itemsize)
    if not max_rows:
        return None
    own, handle, opened, reason = 0, bytes(HANDLE_BYTES), [], ""
    try:
        own = _allocate(2 * size * max_rows * columns * dtype.itemsize)
        inboxes = make_inboxes(size, max_rows, columns, dtype, lambda shape, words: _tensor_at(own, shape, words))
        handle = _export(own)
    except (OSError, RuntimeError) as error:
        reason = str(error)
    part = torch.tensor(list(handle), dtype=torch.uint8, device="cuda")
    handles = torch.empty(size, HANDLE_BYTES, dtype=torch.uint8, device="cuda")
    group.all_gather(handles, part)  # even a rank without a handle: the others wait for it
    try:
        for other, theirs in enumerate(handles.tolist()):  # a handle's arrival says that its inboxes are cleared
            if other != rank and not reason:
                opened.append(_open(bytes(theirs)))
    except RuntimeError as error:
        reason = str(error)
    if reason:
        logger.warning("rank %d cannot reach the others' memory, all sums go over NCCL: %s", rank, reason)
        _release(own, opened)
        return None
    stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    bases = [*opened[:rank], own, *opened[rank:], stop.data_ptr()]
    addresses = torch.tensor(bases, dtype=torch.int64, device="cuda")
    turns = torch.zeros(PROGRAMS, dtype=torch.int32, device="cuda")
    peers = PeerBuffers(rank, size, max_rows, columns, dtype, inboxes, addresses, turns, stop)
    # Not at the process's end: CUDA frees the memory itself, and may be gone by then.
    weakref.finalize(peers, _release, own, opened).atexit = False
    return peers


@lru_cache
def _runtime() -> ctypes.CDLL:
    """Raises OSError if there is no CUDA runtime."""
    library = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}")
    pointer = ctypes.c_void_p
    signatures = {
        "cudaMalloc": [ctypes.POINTER(pointer), ctypes.c_size_t],
        "cudaFree": [pointer],
        "cudaIpcGetMemHandle": [ctypes.POINTER(IpcHandle), pointer],
        "cudaIpcOpenMemHandle": [ctypes.POINTER(pointer), IpcHandle, ctypes.c_uint],
        "cudaIpcCloseMemHandle": [pointer],
        "cudaGetLastError": [],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = [ctypes.c_int], ctypes.c_char_p
    return library


def _call(name: str, *args: Any) -> None:
    result = getattr(_runtime(), name)(*args)
    if result:
        _runtime().cudaGetLastError()  # clears it, or PyTorch would take it for its next call's error
        raise RuntimeError(f"{name}: {_runtime().cudaGetErrorString(result).decode()}")


def _allocate(num_bytes: int) -> int:
    """Allocate apart from PyTorch: a handle shares a whole allocation, and PyTorch's hold other tensors too."""
    address = ctypes.c_void_p()
    _call("cudaMalloc", ctypes.byref(address), num_bytes)
    return address.value or 0


def _export(address: int) -> bytes:
    handle = IpcHandle()
    _call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
    return bytes(handle)


def _open(handle: bytes) -> int:
    address = ctypes.c_void_p()
    _call("cudaIpcOpenMemHandle", ctypes.byref(address), IpcHandle.from_buffer_copy(handle), LAZY_ENABLE_PEER_ACCESS)
    return address.value or 0


def _release(own: int, opened: list[int]) -> None:
    try:
        for address in opened:
            _call("cudaIpcCloseMemHandle", address)
        if own:
            _call("cudaFree", own)
    except RuntimeError as error:  # after a fatal error the device frees everything itself
        logger.debug("inboxes could not be freed: %s", error)


def _tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor over memory that PyTorch did not allocate."""
    interface = {"shape": shape, "typestr": f"<i{dtype.itemsize}", "data": (address, False), "version": 3}
    holder = type("Memory", (), {"__cuda_array_interface__": interface})()
    return torch.as_tensor(holder, device="cuda")
