"""Calls NCCL directly: one communicator, whose collectives run on the caller's stream.

We do not use torch.distributed's NCCL group, because its threads can end the process. Its watchdog, when it sees a
collective fail, sleeps a minute and then throws in its thread, which ends rank 0, hence the user's process; we promise
a RankError there. A second thread asks the rendezvous file for signals long after rank 0 has removed it, and delays
the group's end by the store's timeout. Neither watches the collectives that a CUDA graph replays. Here rank 0 notices
errors (`distributed/rank_processes.py`), and a collective is one kernel on the current stream, also in a graph, where
torch's group forks to a stream of its own and back.

PyTorch has already loaded the library. Names and numbers are those of nccl.h.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from nanovllm.distributed.tensor_parallel import PeerLostError

DTYPES = {torch.uint8: 1, torch.int64: 4, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
SUM, MIN = 0, 3
CALL_SECONDS = 2.0  # a call that only queues takes less
# Defaults: the user's own settings win. NCCL reads them once a process, when it makes its first communicator.
ENVIRONMENT = {
    "NCCL_SOCKET_IFNAME": "lo",  # the ranks find each other over the loopback interface
    # NCCL's monitor ("RAS", since 2.24) would listen on port 28028, talk to the monitors of other jobs, and stay until
    # the process ends (`rasTerminate` in NCCL's ras.cc). We need none: rank 0 watches the ranks.
    "NCCL_RAS_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",  # NVLink multicast
}


class UniqueId(ctypes.Structure):
    """Names a communicator: all its ranks must give the same id."""

    _fields_ = [("internal", ctypes.c_byte * 128)]


@lru_cache
def _library() -> ctypes.CDLL:
    """Raises OSError if NCCL is not installed."""
    library = ctypes.CDLL("libnccl.so.2")
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    signatures = {
        "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
        "ncclCommInitRank": [ctypes.POINTER(pointer), number, UniqueId, number],
        "ncclCommAbort": [pointer],
        "ncclAllReduce": [pointer, pointer, size, number, number, pointer, pointer],
        "ncclAllGather": [pointer, pointer, size, number, pointer, pointer],
        "ncclBroadcast": [pointer, pointer, size, number, number, pointer, pointer],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, number
    library.ncclGetErrorString.argtypes, library.ncclGetErrorString.restype = [number], ctypes.c_char_p
    return library


def _check(result: int) -> None:
    if result:
        raise PeerLostError(f"NCCL: {_library().ncclGetErrorString(result).decode()}")


@contextmanager
def _environment() -> Iterator[None]:
    """Set the defaults for the body. All ranks agree, since they inherit the user's settings."""
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def make_unique_id() -> bytes:
    """A new communicator's id. Only rank 0 makes it: the ranks find each other through the process that did."""
    unique_id = UniqueId()
    with _environment():
        _check(_library().ncclGetUniqueId(ctypes.byref(unique_id)))
    return bytes(unique_id)


class NcclGroup:
    """A rank's end of a communicator. A collective only queues its kernel on the current stream.

    Raises PeerLostError if NCCL reports an error.
    """

    def __init__(self, unique_id: bytes, rank: int, size: int) -> None:
        self._comm: ctypes.c_void_p | None = ctypes.c_void_p()
        self._calls = threading.Lock()  # an abort frees the communicator, so no other call may be using it
        with _environment():
            unique = UniqueId.from_buffer_copy(unique_id)
            _check(_library().ncclCommInitRank(ctypes.byref(self._comm), size, unique, rank))
        self._is_aborted = threading.Event()
        # Started now, because the interpreter's end aborts too, and Python 3.12 starts no threads then.
        threading.Thread(target=self._wait_to_abort, name="nanovllm-abort", daemon=True).start()

    def all_reduce(self, x: torch.Tensor, is_minimum: bool = False) -> None:
        """Replace `x` by the sum over all ranks, or by the minimum; the same bits on every rank."""
        operation = MIN if is_minimum else SUM
        self._queue("ncclAllReduce", x.data_ptr(), x.data_ptr(), x.numel(), DTYPES[x.dtype], operation)

    def all_gather(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Write every rank's `part` into `out`, one after the other."""
        self._queue("ncclAllGather", part.data_ptr(), out.data_ptr(), part.numel(), DTYPES[part.dtype])

    def broadcast(self, x: torch.Tensor) -> None:
        """Replace `x` by rank 0's."""
        self._queue("ncclBroadcast", x.data_ptr(), x.data_ptr(), x.numel(), DTYPES[x.dtype], 0)

    def abort(self) -> None:
        """Unblock kernels that wait for other ranks. Any thread may call it, and again."""
        self._is_aborted.set()

    def _wait_to_abort(self) -> None:
        self._is_aborted.wait()
        # A call that holds the lock for longer waits for the device itself: only the abort ends it.
        has_lock = self._calls.acquire(timeout=CALL_SECONDS)
        comm, self._comm = self._comm, None
        if has_lock:
            self._calls.release()
        if comm is not None:
            # NCCL first sets the flag that its kernels poll. But then the call waits until every captured graph with
            # such a kernel is gone, which is after the engine's end: hence a thread that no other thread joins.
            _library().ncclCommAbort(comm)

    def _queue(self, function: str, *args: int) -> None:
        with self._calls:
            if self._comm is None:
                raise PeerLostError("the communicator was aborted")
            _check(getattr(_library(), function)(*args, self._comm, torch.cuda.current_stream().cuda_stream))
