"""Tensor parallelism from rank 0's side: it sends each command to the other ranks, then does its own part.

Rank 0 is the caller's process: it plans the steps, and computes its share of the model. Every other rank is a process
that follows it (`follower.py`): it receives each `StepPlan` over an anonymous socket pair, which no other process can
write to, and launches it. All ranks compute the same tokens, so no rank sends any, and during steps rank 0 waits for
the others only in the layers' collectives. `rank_processes.py` starts, watches and ends the processes.
"""

import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.distributed.groups import Rendezvous, join_group
from nanovllm.distributed.rank_processes import RankProcesses
from nanovllm.distributed.tensor_parallel import PeerLostError, TensorParallel
from nanovllm.errors import RankError
from nanovllm.kernels.norm import all_reduce
from nanovllm.worker.resolve import require_cut, resolve_device, resolve_dtype


class Followers:
    """The ranks other than 0. With `tensor_parallel_size=1` there are none, and every method does nothing.

    Attributes:
        tp: rank 0's end of the group.
        processes: the followers' processes.
        bytes_sent: bytes of all commands to all followers since the start.
        num_threads: CPU threads on which each rank computes. All ranks must draw the same tokens, and the order in
            which a sum is added up depends on the number of threads.
    """

    def __init__(self, config: Config) -> None:
        self.size = config.tensor_parallel_size
        self.tp = TensorParallel()
        self.processes = RankProcesses(self.size, config.tensor_parallel_timeout)
        self.bytes_sent = 0
        self.num_threads = threads_per_rank(self.size)
        self._config = config
        self._current_command = ""  # the one that `also_run` is running; not empty between calls: interrupted in it
        self._num_acks = 1  # how many each rank must have sent by now: one for its start, then one a command

    def start(self, hf_config: Any, model_cls: Any, path: Path) -> None:
        """Start the ranks and connect them.

        Raises:
            ValueError: `tensor_parallel_size` does not divide the model's sizes, or exceeds the number of devices.
            RankError: a rank could not start.
        """
        if self.size == 1:
            return
        config = self._config
        require_cut(config, hf_config, model_cls)
        first_message = (self.num_threads, config, hf_config, model_cls, path)
        try:
            self.processes.start(pickle.dumps(first_message, pickle.HIGHEST_PROTOCOL))
            self.processes.wait_for_acks(self._num_acks)
            self._join(resolve_device(config.device), hf_config.hidden_size, resolve_dtype(config.dtype, hf_config))
        except BaseException:
            self.close()
            raise

    @property
    def error(self) -> RankError | None:
        """The reason why the ranks serve no more; None while they do. Any thread may ask."""
        return self.processes.error

    @contextmanager
    def also_run(self, command: str, *args: Any, wait: bool = False) -> Iterator[None]:
        """Have the followers run `command`, while the body of the `with` does rank 0's part of it.

        The followers get the command first; with `wait`, this returns only when all have done it. If the body fails,
        the ranks may have got differently far, so all are ended: check whatever can be checked before the `with`.

        Raises: RankError; or whatever the body raises, unless a lost rank is its cause.
        """
        if self.size == 1:
            yield
            return
        self.check()
        self._current_command = command
        try:
            with self._rank_threads():
                self._send(command, args, wait)
                yield
                if wait:
                    self.processes.wait_for_acks(self._num_acks)
        except BaseException as error:
            # A device reports errors of its own after a rank was lost: the loss is their cause.
            is_lost = isinstance(error, (PeerLostError, RankError))
            is_lost |= isinstance(error, RuntimeError) and bool(self.processes.failure)
            if is_lost:
                reason = self.processes.wait_for_failure() or self.processes.silence(str(error))
            else:
                reason = f"rank 0 failed in {command}: {error!r}"
            self.processes.fail(reason)
            self.close()
            if is_lost:
                raise RankError(self.processes.failure) from error
            raise
        self._current_command = ""

    def send(self, command: str, *args: Any) -> None:
        """Within `also_run`: send the followers a part of that command. Raises PeerLostError."""
        if self.size > 1:
            self._send(command, args, must_ack=False)

    def broadcast(self, name: str, tensor: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
        """Within `also_run("load_weights")`: send all ranks a tensor. The caller may free it when this returns.

        Each rank holds the whole tensor in memory, one tensor at a time.
        """
        if self.size == 1:
            return tensor
        tensor = tensor.detach().to(device, dtype).contiguous()
        self.send("tensor", name, tuple(tensor.shape), tensor.dtype)
        with self.time_limit():
            self.tp.broadcast(tensor)
            if tensor.is_cuda:
                torch.cuda.current_stream().synchronize()
        return tensor

    @contextmanager
    def time_limit(self) -> Iterator[None]:
        """Limit to the timeout how long the body may wait for rank 0's device, which waits for the other ranks.

        Nothing else notices a rank that stalls while the device replays a graph. After the timeout the watcher ends all
        ranks and unblocks the device, so that the wait returns.

        Raises: RankError, in place of the device's error that a lost rank has caused.
        """
        if self.size == 1:
            yield
            return
        self.processes.device_wait_since = time.monotonic()
        try:
            yield
        except PeerLostError:
            raise
        except RuntimeError as error:
            if failure := self.processes.wait_for_failure():  # the device's error may show before the lost rank does
                raise RankError(failure) from error
            raise
        finally:
            self.processes.device_wait_since = None

    def check(self) -> None:
        """Raises RankError if a rank has failed, `close` has ended the ranks, or an interrupt has stopped a command."""
        if self._current_command:  # a second interrupt came before the first had ended the ranks
            self.processes.fail(f"rank 0 was interrupted in {self._current_command}")
        self.processes.raise_error()

    def close(self) -> None:
        """End all ranks. Any thread may call it, and again; in a child that was forked off rank 0 it does nothing."""
        self.processes.close()

    def leave_to_parent(self) -> None:
        """In a child that was just forked: close its copies of the sockets, so that the ranks notice rank 0's end."""
        self.processes.leave_to_parent()

    def _send(self, command: str, args: tuple, must_ack: bool) -> None:
        self._num_acks += must_ack
        message = pickle.dumps((command, args, must_ack), pickle.HIGHEST_PROTOCOL)
        try:
            self.processes.send(message)
        except OSError as error:
            raise PeerLostError(f"a rank cannot be told to {command}: {error}") from error
        self.bytes_sent += len(message) * (self.size - 1)

    def _join(self, device: str, hidden_size: int, dtype: torch.dtype) -> None:
        """Connect the ranks. CPUs meet at a file in a private folder, which is removed once they are connected."""
        folder = Path(tempfile.mkdtemp(prefix="nanovllm-"))  # of mode 0700
        nccl_id = b""
        timeout = timedelta(seconds=self._config.tensor_parallel_timeout)
        try:
            if device == "cuda":
                from nanovllm.distributed.nccl import make_unique_id

                nccl_id = make_unique_id()
            peer_bytes, whole_experts = all_reduce.one_shot_limit(self.size), self._config.enable_expert_parallel
            rendezvous = Rendezvous(folder, nccl_id, peer_bytes, hidden_size, dtype, whole_experts)
            with self.also_run("join", rendezvous, wait=True):
                # NCCL waits without end for a rank that dies before NCCL knows it: hence a thread.
                self.tp = self.processes.run_until_failure(lambda: join_group(rendezvous, 0, self.size, timeout))
                self.processes.abort = self.tp.abort
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _rank_threads(self) -> Iterator[None]:
        """Let rank 0 compute on as many threads as each follower; afterwards the caller has its own number back."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def threads_per_rank(size: int) -> int:
    """The CPU threads of each of `size` ranks: an equal part of those that this process would use alone.

    If the number comes from OMP_NUM_THREADS, it is meant for each process, as everywhere, so each rank gets all of it.
    """
    num_threads = torch.get_num_threads()
    of_each = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return num_threads if of_each == str(num_threads) else max(1, num_threads // size)
