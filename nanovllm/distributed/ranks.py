"""Tensor parallelism's other processes: how they start, hear of each step, and end, whatever happens.

Rank 0 is the caller's process: it plans and runs its own share of the model. Every other rank is a process that
follows: it receives each `StepPlan` over an anonymous socket pair, into which nobody else can write, and launches it.
All ranks compute the same tokens, so none are sent, and rank 0 waits for nobody but in the layers' collectives.

A rank is started as a program of its own, which gets all it needs over its socket: it does not run the user's script
again, as multiprocessing's "spawn" would have it do, so the script needs no `if __name__ == "__main__":`, and may come
from a pipe. A rank owns nothing that outlives it, no file, no port beyond loopback's, so it is ended by killing it. A
thread in rank 0 watches them: one that dies or raises ends them all, and rank 0, if it waits for that one in a
collective, gets an error from the closed connection. Ranks end with rank 0, however that ends: their socket is at its
end, and on Linux the kernel signals them besides.
"""

import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import Pipe, connection, spawn
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.distributed.groups import Meeting, join_group
from nanovllm.distributed.tensor_parallel import PeerLostError, TensorParallel
from nanovllm.errors import RankError
from nanovllm.kernels.norm import all_reduce
from nanovllm.worker.resolve import require_cut, resolve_device, resolve_dtype

GRACE = 2.0  # seconds in which the reason of a lost connection, seen by another rank, arrives here
TICK = 0.5  # seconds between two looks at whether rank 0 has waited too long
PACKAGES = str(Path(__file__).parents[2])  # the folder that has this package

# What a rank's interpreter runs. Ctrl-C is rank 0's to answer, also during the imports, which take seconds.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = {path!r}
from nanovllm.distributed.follower import follow
follow({rank}, {parent}, {fd})
"""


class Followers:
    """The ranks other than 0; none, and nothing to be done, if `tensor_parallel_size` is 1.

    Attributes:
        tp: rank 0's place among all.
        bytes_sent: over all pipes since the start.
        num_threads: of a CPU, on which each rank computes. The order of a sum depends on it, and all ranks must draw
            the same tokens.
    """

    def __init__(self, config: Config) -> None:
        self.size = config.tensor_parallel_size
        self.tp = TensorParallel()
        self.bytes_sent = 0
        self.num_threads = threads_of_a_rank(self.size)
        self._config = config
        self._pid = os.getpid()
        self._timeout = config.tensor_parallel_timeout
        self._waits_since: float | None = None  # rank 0, for its device
        self._under_way = ""  # the command that `doing` is doing, or in which it has been interrupted
        self._links: list[Connection] = []  # rank r's at r - 1
        self._watcher: threading.Thread | None = None
        self._changed = threading.Condition()  # guards what the watching thread changes:
        self._processes: list[subprocess.Popen[bytes]] = []  # as far as they have been started
        self._error = ""
        self._is_closed = False
        self._reports: dict[int, tuple[str, bool]] = {}
        self._num_acks = [0] * (self.size - 1)
        self._num_expected = 1

    def start(self, hf_config: Any, model_cls: Any, path: Path) -> None:
        """Start the ranks, and connect them.

        Raises:
            ValueError: the model cannot be cut so, or there are too few devices; RankError: a rank could not start.
        """
        if self.size == 1:
            return
        config = self._config
        require_cut(config, hf_config, model_cls)
        pipes = [Pipe() for _ in range(1, self.size)]
        self._links = [ours for ours, _ in pipes]
        for link in self._links:
            _limit_sending(link, self._timeout)
        orders = pickle.dumps((self.num_threads, config, hf_config, model_cls, path), pickle.HIGHEST_PROTOCOL)
        self._watcher = threading.Thread(
            target=self._start_and_watch, args=([theirs for _, theirs in pipes], orders), name="nanovllm-ranks"
        )
        self._watcher.daemon = True
        try:
            self._watcher.start()
            self._await_acks()
            self._join(resolve_device(config.device), hf_config.hidden_size, resolve_dtype(config.dtype, hf_config))
        except BaseException:
            self.close()
            raise

    @property
    def error(self) -> RankError | None:
        """Why the ranks do nothing any more, if so. May be asked in any thread."""
        reason = self._error or ("the engine is closed, and with it its ranks" if self._is_closed else "")
        return RankError(reason) if reason and self.size > 1 else None

    @contextmanager
    def doing(self, command: str, *args: Any, wait: bool = False) -> Iterator[None]:
        """The followers do the same as the body of the `with`, which is rank 0's part.

        They are told first, and not waited for unless `wait`. If the body fails, nobody knows how far each rank has
        come, so all are ended: a body must not fail for what could have been checked before.

        Raises: RankError; and whatever the body raises, unless a lost rank is its cause.
        """
        if self.size == 1:
            yield
            return
        self.check()
        self._under_way = command
        try:
            with self._few_threads():
                self._send(command, args, wait)
                yield
                if wait:
                    self._await_acks()
        except BaseException as error:
            # What the device reports after a rank was lost has its cause in that.
            is_lost = isinstance(error, (PeerLostError, RankError))
            is_lost |= isinstance(error, RuntimeError) and bool(self._error)
            self._fail(self._suspect(error) if is_lost else f"rank 0 failed in {command}: {error!r}")
            self.close()
            if is_lost:
                raise RankError(self._error) from error
            raise
        self._under_way = ""

    @contextmanager
    def _few_threads(self) -> Iterator[None]:
        """Rank 0 computes on as many threads as each of the others, and leaves its caller his number."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def tell(self, command: str, *args: Any) -> None:
        """Within `doing`: a part of what the followers are doing. Raises PeerLostError."""
        if self.size > 1:
            self._send(command, args, must_ack=False)

    def share(self, name: str, tensor: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
        """Within `doing("load_weights")`: give all ranks a tensor. It may be freed when this returns.

        What a rank needs of memory for it is the whole tensor, one at a time.
        """
        if self.size == 1:
            return tensor
        tensor = tensor.detach().to(device, dtype).contiguous()
        self.tell("tensor", name, tuple(tensor.shape), tensor.dtype)
        with self.awaited():
            self.tp.broadcast(tensor)
            if tensor.is_cuda:
                torch.cuda.current_stream().synchronize()
        return tensor

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within it rank 0 waits for its device, which waits for the other ranks: no longer than the timeout.

        Nothing else notices a rank that stalls while a captured graph runs. When the time is up all ranks are ended and
        the device let go, so that the wait returns.

        Raises: RankError, in place of what a lost rank has made of the wait.
        """
        if self.size == 1:
            yield
            return
        self._waits_since = time.monotonic()
        try:
            yield
        except PeerLostError:
            raise
        except RuntimeError as error:
            with self._changed:  # what is seen of a lost rank first may be the device's error
                if self._changed.wait_for(lambda: self._error, timeout=GRACE):
                    raise RankError(self._error) from error
            raise
        finally:
            self._waits_since = None

    def check(self) -> None:
        """Raises RankError if a rank has failed, or all were ended by `close`, or a command was broken off."""
        if self._under_way:  # a second interrupt came before the first had ended the ranks
            self._fail(f"rank 0 was interrupted in {self._under_way}")
        self._raise_error()

    def _raise_error(self) -> None:
        error = self.error
        if error is not None:
            raise error

    def close(self) -> None:
        """End all ranks, and wait for their ends. May be called again, from any thread.

        In a child that was forked off rank 0 nothing happens: the ranks are not the child's.
        """
        if self._watcher is None or os.getpid() != self._pid:
            return
        self._is_closed = True  # and if an interrupt comes here, the watching thread ends them
        self._kill()
        if threading.current_thread() is not self._watcher and self._watcher.ident:  # garbage may be collected anywhere
            self._watcher.join()

    def leave_to_parent(self) -> None:
        """In a child that was just forked: close its copies of the sockets, so that the ranks see rank 0's end."""
        for link in self._links:
            link.close()

    def _send(self, command: str, args: tuple, must_ack: bool) -> None:
        self._num_expected += must_ack
        message = pickle.dumps((command, args, must_ack), pickle.HIGHEST_PROTOCOL)
        try:
            for link in self._links:
                link.send_bytes(message)
        except OSError as error:  # its process has ended, or reads nothing any more
            raise PeerLostError(f"a rank cannot be told to {command}: {error}") from error
        self.bytes_sent += len(message) * len(self._links)

    def _await_acks(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._is_closed or min(self._num_acks) >= self._num_expected)
        self._raise_error()

    def _join(self, device: str, hidden_size: int, dtype: torch.dtype) -> None:
        """Connect the ranks. They meet at a file, which exists for as long as that takes."""
        folder = Path(tempfile.mkdtemp(prefix="nanovllm-"))  # of mode 0700
        nccl_id = b""
        try:
            if device == "cuda":
                from nanovllm.distributed.nccl import make_unique_id

                nccl_id = make_unique_id()
            meeting = Meeting(folder, nccl_id, all_reduce.one_shot_limit(self.size), hidden_size, dtype)
            with self.doing("join", meeting, wait=True):
                # A rank that dies before NCCL knows it is waited for without end: in a thread, which is left behind.
                self.tp = self._run_beside(lambda: join_group(meeting, 0, self.size, timedelta(seconds=self._timeout)))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _run_beside(self, function: Callable[[], Any]) -> Any:
        """What `function` returns or raises, unless a rank fails first: then a PeerLostError."""
        outcome: list[tuple[Any, BaseException | None]] = []

        def run() -> None:
            try:
                outcome.append((function(), None))
            except BaseException as error:
                outcome.append((None, error))
            with self._changed:
                self._changed.notify_all()

        threading.Thread(target=run, name="nanovllm-join", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: outcome or self._error or self._is_closed)
        if not outcome:
            raise PeerLostError("a rank has failed")
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    def _start_and_watch(self, their_ends: list[Connection], orders: bytes) -> None:
        """A thread of its own, for as long as there are ranks: Linux takes its end for that of their parent."""
        try:
            for rank, theirs in enumerate(their_ends, start=1):
                self._processes.append(_start_rank(rank, theirs))
                self._links[rank - 1].send_bytes(orders)
        except BaseException as error:
            self._fail(f"a rank could not be started: {error!r}")
        for theirs in their_ends:
            theirs.close()
        alive = set(range(1, len(self._processes) + 1))
        listening = set(alive)
        while alive:
            if self._is_closed or self._error:  # again, lest one was started since, or who would kill was interrupted
                self._kill()
            connection.wait([self._links[rank - 1] for rank in listening], TICK)
            self._limit_wait()
            for rank in sorted(alive):
                process = self._processes[rank - 1]
                if rank in listening and not self._listen(rank):
                    listening.remove(rank)  # its socket is at its end: it is ending
                if rank not in listening:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(TICK)
                if process.poll() is not None:
                    self._listen(rank)  # what it had to say
                    alive.remove(rank)
                    self._note_end(rank, process, not alive)
        with self._changed:
            self._changed.notify_all()  # a signal's handler may have closed under who waits for an answer
        for link in self._links:
            link.close()

    def _limit_wait(self) -> None:
        since = self._waits_since
        if since is not None and time.monotonic() - since > self._timeout:
            self._fail(self._silence("its device waits for a collective"))

    def _listen(self, rank: int) -> bool:
        """Take what a rank reports. False: no more comes."""
        link = self._links[rank - 1]
        try:
            while link.poll():
                report = link.recv()
                with self._changed:
                    if report is None:
                        self._num_acks[rank - 1] += 1
                    else:
                        self._reports[rank] = report
                    self._changed.notify_all()
                if report is not None and not report[1]:
                    self._fail(f"rank {rank} failed:\n{report[0]}")
        except (EOFError, OSError):
            return False
        return True

    def _note_end(self, rank: int, process: subprocess.Popen[bytes], was_last: bool) -> None:
        if rank not in self._reports:
            code = process.returncode
            how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            self._fail(f"rank {rank} (process {process.pid}) {how}")
        elif was_last:
            self._fail(f"rank 0 kept the others waiting for more than {self._timeout:g} s")

    def _suspect(self, lost: PeerLostError) -> str:
        """Why rank 0 has lost a connection: what the watching thread will soon know, or else a rank that is silent."""
        with self._changed:
            if self._changed.wait_for(lambda: self._error, timeout=GRACE):
                return self._error
        return self._silence(str(lost))

    def _silence(self, details: str) -> str:
        silent = [rank for rank in range(1, self.size) if rank not in self._reports]
        who = f"rank {' or '.join(map(str, silent))}" if silent else "a rank"
        return f"{who} has not answered for {self._timeout:g} s: {details}"

    def _fail(self, reason: str) -> None:
        """Remember the first reason, and end the others."""
        with self._changed:
            if self._error or self._is_closed:
                return
            self._error = f"{reason}\nThe engine is closed, and its ranks have been ended: make a new LLM"
            self._changed.notify_all()
        self._kill()

    def _kill(self) -> None:
        if os.getpid() != self._pid:
            return
        for process in list(self._processes):
            process.kill()
        self.tp.abort()  # frees a device that waits for them


def threads_of_a_rank(size: int) -> int:
    """How many of a CPU's threads each of `size` ranks gets: a share of those that this process would take alone.

    A number that comes from OMP_NUM_THREADS is meant for each process, as everywhere, and is not shared out.
    """
    num_threads = torch.get_num_threads()
    of_each = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return num_threads if of_each == str(num_threads) else max(1, num_threads // size)


def _start_rank(rank: int, link: Connection) -> "subprocess.Popen[bytes]":
    """Start `nanovllm.distributed.follower.follow` in an interpreter like this one, with its end of the socket."""
    path = [*map(str, sys.path), PACKAGES]
    program = PROGRAM.format(rank=rank, parent=os.getpid(), fd=link.fileno(), path=path)
    command = [os.fsdecode(spawn.get_executable()), "-c", program]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[link.fileno()])


def _limit_sending(link: Connection, seconds: float) -> None:
    """A rank that is stopped reads nothing: do not wait for it forever when its buffer is full."""
    if os.name == "posix":
        with socket.socket(fileno=os.dup(link.fileno())) as end:
            limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
