"""Starts the processes of the ranks other than 0, watches them, and ends them all as soon as one fails.

Rank 0 starts each rank as a program of its own, which gets everything it needs over its socket. The program does not
run the user's script again, as multiprocessing's "spawn" would: so the script needs no `if __name__ == "__main__":`,
and may come from a pipe. A rank owns nothing that outlives it (no file, no port beyond loopback's), so rank 0 ends it
by killing it.

A thread in rank 0 watches the ranks. When one dies or raises, the thread kills all others; if rank 0 is then waiting
for that rank in a collective, the closed connection gives it an error. However rank 0 ends, the ranks end with it:
they see their socket close, and on Linux the kernel signals them besides.
"""

import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe, connection
from multiprocessing.connection import Connection
from typing import Any

from nanovllm.distributed.interpreter import start_interpreter
from nanovllm.distributed.tensor_parallel import PeerLostError
from nanovllm.errors import RankError

GRACE = 2.0  # seconds in which the cause of a lost connection, which another rank has seen, arrives here
TICK = 0.5  # seconds between two checks of whether rank 0 has waited too long for its device

# What a rank's interpreter runs. Only rank 0 answers Ctrl-C, also during the imports, which take seconds.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = {path!r}
from nanovllm.distributed.follower import follow
follow({rank}, {parent}, {fd})
"""


class RankProcesses:
    """The processes of ranks 1 to size - 1, and the thread that starts and watches them.

    A rank reports None when it has done a command that asked for it (an ack), and (traceback, whether it only lost
    another rank) when it fails.

    Attributes:
        links: rank r's socket is at r - 1.
        failure: why the ranks were killed; empty while they run, and after `close`.
        abort: unblocks kernels of rank 0's device that wait for killed ranks; set once the ranks are connected.
        device_wait_since: `time.monotonic()` when rank 0 began to wait for its device, None if it does not.
    """

    def __init__(self, size: int, timeout_s: float) -> None:
        self.links: list[Connection] = []
        self.abort: Callable[[], None] = lambda: None
        self.device_wait_since: float | None = None
        self._size = size
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._watcher: threading.Thread | None = None
        self._changed = threading.Condition()  # guards what the watcher changes:
        self._processes: list[subprocess.Popen[bytes]] = []  # those started so far, by rank
        self.failure = ""
        self._is_closed = False
        self._failures: dict[int, tuple[str, bool]] = {}  # by rank, as reported
        self._num_acks = [0] * (size - 1)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def error(self) -> RankError | None:
        """The reason why the ranks serve no more; None while they do. Any thread may ask."""
        reason = self.failure or ("the engine is closed, and with it its ranks" if self._is_closed else "")
        return RankError(reason) if reason else None

    def raise_error(self) -> None:
        error = self.error
        if error is not None:
            raise error

    def start(self, first_message: bytes) -> None:
        """Have the watcher start the ranks and send each `first_message`. Does not wait for them."""
        pipes = [Pipe() for _ in range(1, self._size)]
        self.links = [ours for ours, _ in pipes]
        for link in self.links:
            _limit_sending(link, self._timeout_s)
        their_ends = [theirs for _, theirs in pipes]
        self._watcher = threading.Thread(
            target=self._start_and_watch, args=(their_ends, first_message), name="nanovllm-ranks", daemon=True
        )
        self._watcher.start()

    def send(self, message: bytes) -> None:
        """Send a message to every rank. Raises OSError if a rank has ended, or does not read."""
        for link in self.links:
            link.send_bytes(message)

    def wait_for_acks(self, num_acks: int) -> None:
        """Wait until every rank has sent so many acks since its start. Raises RankError if one fails first."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure or self._is_closed or min(self._num_acks) >= num_acks)
        self.raise_error()

    def wait_for_failure(self) -> str:
        """The failure, which may arrive a little after its effects on rank 0; empty if none comes."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure, timeout=GRACE)
            return self.failure

    def run_until_failure(self, function: Callable[[], Any]) -> Any:
        """Call `function` in a thread and return its result; raise PeerLostError as soon as a rank fails.

        The thread is then left behind.
        """
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
            self._changed.wait_for(lambda: outcome or self.failure or self._is_closed)
        if not outcome:
            raise PeerLostError("a rank has failed")
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    def fail(self, reason: str) -> None:
        """Record the failure and kill the ranks, unless an earlier failure or `close` has done so."""
        with self._changed:
            if self.failure or self._is_closed:
                return
            self.failure = f"{reason}\nThe engine is closed, and its ranks have been ended: make a new LLM"
            self._changed.notify_all()
        self._kill()

    def silence(self, details: str) -> str:
        """A failure's reason: the ranks that have reported nothing do not answer."""
        silent = [rank for rank in range(1, self._size) if rank not in self._failures]
        ranks = f"rank {' or '.join(map(str, silent))}" if silent else "a rank"
        return f"{ranks} has not answered for {self._timeout_s:g} s: {details}"

    def close(self) -> None:
        """Kill all ranks and wait until they have ended. Any thread may call it, and again.

        In a child that was forked off rank 0 it does nothing: the ranks are the parent's.
        """
        if self._watcher is None or os.getpid() != self._pid:
            return
        self._is_closed = True  # if an interrupt comes after this line, the watcher kills them
        self._kill()
        if threading.current_thread() is not self._watcher and self._watcher.ident:  # any thread may collect garbage
            self._watcher.join()

    def leave_to_parent(self) -> None:
        """In a child that was just forked: close its copies of the sockets, so that the ranks notice rank 0's end."""
        for link in self.links:
            link.close()

    def _kill(self) -> None:
        if os.getpid() != self._pid:
            return
        for process in list(self._processes):
            process.kill()
        self.abort()

    def _start_and_watch(self, their_ends: list[Connection], first_message: bytes) -> None:
        """The watcher. It starts the ranks itself and lives as long as they: Linux ends them with this thread."""
        try:
            for rank, theirs in enumerate(their_ends, start=1):
                self._processes.append(_start_rank(rank, theirs))
                self.links[rank - 1].send_bytes(first_message)
        except BaseException as error:
            self.fail(f"a rank could not be started: {error!r}")
        for theirs in their_ends:
            theirs.close()
        alive = set(range(1, len(self._processes) + 1))
        listening = set(alive)
        while alive:
            if self._is_closed or self.failure:  # again: a rank started since, or an interrupt stopped the killer
                self._kill()
            connection.wait([self.links[rank - 1] for rank in listening], TICK)
            self._limit_device_wait()
            for rank in sorted(alive):
                process = self._processes[rank - 1]
                if rank in listening and not self._read_reports(rank):
                    listening.remove(rank)  # its socket is at its end: the process is ending
                if rank not in listening:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(TICK)
                if process.poll() is not None:
                    self._read_reports(rank)  # its last ones
                    alive.remove(rank)
                    self._record_exit(rank, process, not alive)
        with self._changed:
            self._changed.notify_all()  # a signal handler may call close() while its thread waits for acks
        for link in self.links:
            link.close()

    def _limit_device_wait(self) -> None:
        since = self.device_wait_since
        if since is not None and time.monotonic() - since > self._timeout_s:
            self.fail(self.silence("its device waits for a collective"))

    def _read_reports(self, rank: int) -> bool:
        """Take what a rank has reported. False: it will report no more."""
        link = self.links[rank - 1]
        try:
            while link.poll():
                report = link.recv()
                with self._changed:
                    if report is None:
                        self._num_acks[rank - 1] += 1
                    else:
                        self._failures[rank] = report
                    self._changed.notify_all()
                if report is not None and not report[1]:
                    self.fail(f"rank {rank} failed:\n{report[0]}")
        except (EOFError, OSError):
            return False
        return True

    def _record_exit(self, rank: int, process: subprocess.Popen[bytes], was_last: bool) -> None:
        if rank not in self._failures:
            code = process.returncode
            how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            self.fail(f"rank {rank} (process {process.pid}) {how}")
        elif was_last:  # each has lost another rank, and none has failed
            self.fail(f"rank 0 kept the others waiting for more than {self._timeout_s:g} s")


def _start_rank(rank: int, link: Connection) -> "subprocess.Popen[bytes]":
    """Start `nanovllm.distributed.follower.follow` with its end of the socket."""
    return start_interpreter(PROGRAM, link.fileno(), rank=rank)


def _limit_sending(link: Connection, seconds: float) -> None:
    """Let a send fail after `seconds`: a stopped rank does not read, and once its buffer is full rank 0 would hang."""
    if os.name == "posix":
        with socket.socket(fileno=os.dup(link.fileno())) as end:
            limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
