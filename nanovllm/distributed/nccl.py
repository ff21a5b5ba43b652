"""NCCL, called directly: one communicator, on the caller's stream, with no thread of its own.

torch.distributed's group for NCCL is not used, because its threads end the process in which they live. A watchdog that
sees a collective fail first sleeps a minute and then throws in its thread, which is the end of rank 0, hence of the
user's process, where a RankError is promised; a second thread asks the rendezvous file for signals long after it has
been removed, and delays the group's end by the store's timeout. Neither watches what a CUDA graph replays. Here errors
are rank 0's to notice (`distributed/ranks.py`), and a collective is one kernel on the current stream, also in a
graph, where that group forks to a stream of its own and back.

PyTorch has loaded the library already. Names and numbers are those of nccl.h.
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
CALL_SECONDS = 2.0  # more than any call takes that only queues
# Unless the user says otherwise. NCCL asks once a process, when it makes its first communicator.
ENVIRONMENT = {
    "NCCL_SOCKET_IFNAME": "lo",  # the ranks find each other over the loopback interface
    # Its monitor ("RAS", of 2.24 and later) would listen on port 28028, talk to other jobs', and stay until the
    # process ends (`rasTerminate` in NCCL's ras.cc): the ranks are watched already.
    "NCCL_RAS_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",  # NVLink multicast
}


class UniqueId(ctypes.Structure):
    """What the ranks of one communicator have in common."""

    _fields_ = [("internal", ctypes.c_byte * 128)]


@lru_cache
def _library() -> ctypes.CDLL:
    """Raises OSError where there is no NCCL."""
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
    """In the ranks alike, for they inherit what the user has set."""
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def make_unique_id() -> bytes:
    """For all ranks of a communicator; the process that makes it, rank 0's, is the one they find each other at."""
    unique_id = UniqueId()
    with _environment():
        _check(_library().ncclGetUniqueId(ctypes.byref(unique_id)))
    return bytes(unique_id)


class NcclGroup:
    """A rank's end of a communicator. Collectives are queued on the current stream and not waited for.

    Raises PeerLostError where NCCL reports an error.
    """

    def __init__(self, unique_id: bytes, rank: int, size: int) -> None:
        self._comm: ctypes.c_void_p | None = ctypes.c_void_p()
        self._calls = threading.Lock()  # NCCL frees what it aborts, so no call may be under way
        with _environment():
            unique = UniqueId.from_buffer_copy(unique_id)
            _check(_library().ncclCommInitRank(ctypes.byref(self._comm), size, unique, rank))
        self._is_aborted = threading.Event()
        # It waits from now on, for while the interpreter ends, which aborts too, Python 3.12 starts no thread.
        threading.Thread(target=self._wait_to_abort, name="nanovllm-abort", daemon=True).start()

    def all_reduce(self, x: torch.Tensor, is_minimum: bool = False) -> None:
        """The sum over all ranks, or the least, over `x`; the same bits on every rank."""
        operation = MIN if is_minimum else SUM
        self._queue("ncclAllReduce", x.data_ptr(), x.data_ptr(), x.numel(), DTYPES[x.dtype], operation)

    def all_gather(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Every rank's `part`, one after the other, in `out`."""
        self._queue("ncclAllGather", part.data_ptr(), out.data_ptr(), part.numel(), DTYPES[part.dtype])

    def broadcast(self, x: torch.Tensor) -> None:
        """Rank 0's `x` on every rank."""
        self._queue("ncclBroadcast", x.data_ptr(), x.data_ptr(), x.numel(), DTYPES[x.dtype], 0)

    def abort(self) -> None:
        """Have what waits for other ranks on the device return. May be called from any thread, and again."""
        self._is_aborted.set()

    def _wait_to_abort(self) -> None:
        self._is_aborted.wait()
        # A call that does not return waits for the device itself, and needs the abort.
        has_lock = self._calls.acquire(timeout=CALL_SECONDS)
        comm, self._comm = self._comm, None
        if has_lock:
            self._calls.release()
        if comm is not None:
            # The flag at which kernels look is set at once. But then this waits until every captured graph is gone
            # that has one of them, which is after the engine: hence a thread, for which nobody waits.
            _library().ncclCommAbort(comm)

    def _queue(self, function: str, *args: int) -> None:
        with self._calls:
            if self._comm is None:
                raise PeerLostError("the communicator was aborted")
            _check(getattr(_library(), function)(*args, self._comm, torch.cuda.current_stream().cuda_stream))
