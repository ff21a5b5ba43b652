"""Tensor parallelism's other processes: how they start, hear of each step, and end, whatever happens.

Rank 0 is the caller's process: it plans and runs its own share of the model. Every other rank is a process that
follows: it receives each `StepPlan` over an anonymous socket pair, into which nobody else can write, and launches it.
All ranks compute the same tokens, so none are sent, and rank 0 waits for nobody but in the layers' collectives.

A rank owns nothing that outlives it, no file, no port beyond loopback's, so it is ended by killing it. A thread in rank
0 watches them: one that dies or raises ends them all, and rank 0, if it waits for that one in a collective, gets an
error from the closed connection. Ranks end with rank 0, however that ends: their socket is at its end, and on Linux
the kernel signals them besides (a child that somebody forked off rank 0 may hold the socket open).
"""

import os
import pickle
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.errors import RankError
from nanovllm.kernels import all_reduce
from nanovllm.layers.linear import PeerLostError, TensorParallel
from nanovllm.worker.follower import follow
from nanovllm.worker.groups import Meeting, join_group
from nanovllm.worker.resolve import require_cut, resolve_device, resolve_dtype

GRACE = 2.0  # seconds in which the reason of a lost connection, seen by another rank, arrives here
TICK = 0.5  # seconds between two looks at whether rank 0 has waited too long


class Followers:
    """The ranks other than 0; none, and nothing to be done, if `tensor_parallel_size` is 1.

    Attributes:
        tp: rank 0's place among all.
        bytes_sent: over all pipes since the start.

    Raises:
        ValueError: the model cannot be cut so, or there are too few devices; RankError: a rank could not start.
    """

    def __init__(self, config: Config, hf_config: Any = None, model_cls: Any = None, path: Path | None = None) -> None:
        self.size = config.tensor_parallel_size
        self.tp = TensorParallel()
        self.bytes_sent = 0
        self._processes: list[Any] = []  # rank r's at r - 1, as in the other lists
        if self.size == 1:
            return
        require_cut(config, hf_config, model_cls)
        self._timeout = config.tensor_parallel_timeout
        self._waits_since: float | None = None  # rank 0, for its device
        self._changed = threading.Condition()  # guards what the watching thread changes:
        self._error = ""
        self._is_closed = False
        self._reports: dict[int, tuple[str, bool]] = {}
        self._num_acks = [0] * (self.size - 1)
        self._num_expected = 1
        context = get_context("spawn")
        pipes = [context.Pipe() for _ in range(1, self.size)]
        self._links = [ours for ours, _ in pipes]
        for rank, (ours, theirs) in enumerate(pipes, start=1):
            _limit_sending(ours, config.tensor_parallel_timeout)
            args = (rank, os.getpid(), theirs, torch.get_num_threads(), config, hf_config, model_cls, path)
            self._processes.append(context.Process(target=follow, args=args, name=f"nanovllm-rank-{rank}", daemon=True))
        self._watcher = threading.Thread(
            target=self._start_and_watch, args=([theirs for _, theirs in pipes],), name="nanovllm-ranks", daemon=True
        )
        self._watcher.start()
        try:
            self._await_acks()
            self._join(resolve_device(config.device), hf_config.hidden_size, resolve_dtype(config.dtype, hf_config))
        except BaseException:
            self.close()
            raise

    @contextmanager
    def doing(self, command: str, *args: Any, wait: bool = False) -> Iterator[None]:
        """The followers do the same as the body of the `with`, which is rank 0's part.

        They are told first, and not waited for unless `wait`. If the body fails, nobody knows how far each rank has
        come, so all are ended: a body must not fail for what could have been checked before.

        Raises: RankError; and whatever the body raises, unless a lost rank is its cause.
        """
        if not self._processes:
            yield
            return
        self.check()
        try:
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

    def tell(self, command: str, *args: Any) -> None:
        """Within `doing`: a part of what the followers are doing. Raises PeerLostError."""
        if self._processes:
            self._send(command, args, must_ack=False)

    def share(self, name: str, tensor: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
        """Within `doing("load_weights")`: give all ranks a tensor. It may be freed when this returns.

        What a rank needs of memory for it is the whole tensor, one at a time.
        """
        if not self._processes:
            return tensor
        tensor = tensor.detach().to(device, dtype).contiguous()
        self.tell("tensor", name, tuple(tensor.shape))
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
        if not self._processes:
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
        """Raises RankError if a rank has failed, or all were ended by `close`."""
        if self._processes and (self._error or self._is_closed):
            raise RankError(self._error or "the engine is closed, and with it its ranks")

    def close(self) -> None:
        """End all ranks, and wait for their ends. May be called again, from any thread."""
        if not self._processes:
            return
        with self._changed:
            self._is_closed = True
        self._kill()
        if threading.current_thread() is not self._watcher:  # where garbage may be collected
            self._watcher.join()

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
            self._changed.wait_for(lambda: self._error or min(self._num_acks) >= self._num_expected)
        self.check()

    def _join(self, device: str, hidden_size: int, dtype: torch.dtype) -> None:
        """Connect the ranks. They meet at a file, which exists for as long as that takes."""
        folder = Path(tempfile.mkdtemp(prefix="nanovllm-"))  # of mode 0700
        nccl_id = b""
        try:
            if device == "cuda":
                from nanovllm.worker.nccl import make_unique_id

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
            self._changed.wait_for(lambda: outcome or self._error)
        if not outcome:
            raise PeerLostError("a rank has failed")
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    def _start_and_watch(self, their_ends: list[Connection]) -> None:
        """A thread of its own, for as long as there are ranks: Linux takes its end for that of their parent."""
        try:
            for process, theirs in zip(self._processes, their_ends, strict=True):
                process.start()
                theirs.close()
        except BaseException as error:
            self._fail(f"a rank could not be started: {error!r}")
        alive = {rank for rank, process in enumerate(self._processes, start=1) if process.pid is not None}
        listening = set(alive)
        if self._is_closed:  # before the first of them was there to be killed
            self._kill()
        while alive:
            sentinels = [self._processes[rank - 1].sentinel for rank in alive]
            ready = connection.wait([*sentinels, *(self._links[rank - 1] for rank in listening)], TICK)
            self._limit_wait()
            for rank in sorted(alive):
                process = self._processes[rank - 1]
                has_ended = process.sentinel in ready
                if rank in listening and not self._listen(rank):
                    listening.remove(rank)
                if has_ended:
                    process.join()
                    alive.remove(rank)
                    self._note_end(rank, process, not alive)
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

    def _note_end(self, rank: int, process: Any, was_last: bool) -> None:
        if rank not in self._reports:
            code = process.exitcode
            how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            hint = ""
            if code > 0 and not self._num_acks[rank - 1]:
                hint = "; a script that makes an LLM must do so under `if __name__ == '__main__':`"
            self._fail(f"rank {rank} (process {process.pid}) {how}{hint}")
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
        for process in self._processes:
            if process.pid is not None:
                process.kill()
        self.tp.abort()  # frees a device that waits for them


def _limit_sending(link: Connection, seconds: float) -> None:
    """A rank that is stopped reads nothing: do not wait for it forever when its buffer is full."""
    if os.name == "posix":
        with socket.socket(fileno=os.dup(link.fileno())) as end:
            limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
