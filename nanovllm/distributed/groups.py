"""Connects the ranks: CPUs over gloo, GPUs over NCCL and through each other's memory.

Each engine has a group of its own, not torch.distributed's default group: so engines side by side, and a trainer in the
same process, do not interfere. Ranks listen only on the loopback interface. CPU ranks find each other through a file
in a private folder, which rank 0 removes once all are connected; GPU ranks through an id that rank 0 sends them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.distributed.tensor_parallel import PeerLostError, TensorParallel

START_TIMEOUT = timedelta(minutes=30)


@dataclass(slots=True, frozen=True)
class Rendezvous:
    """What rank 0 sends the other ranks so that they find each other."""

    folder: Path  # holds the file through which CPU ranks meet
    nccl_id: bytes  # empty on CPUs
    peer_bytes: int  # ranks sum messages up to this size through each other's memory: the same on every rank
    hidden_size: int
    dtype: torch.dtype
    whole_experts: bool = False  # see `TensorParallel`


def join_group(rendezvous: Rendezvous, rank: int, size: int, timeout: timedelta) -> TensorParallel:
    """Connect this rank with all others; returns once all are. Raises PeerLostError, or the store's error."""
    if not rendezvous.nccl_id:
        store = dist.FileStore(str(rendezvous.folder / "store"), size)
        store.set_timeout(timeout)
        tp = TensorParallel(rank, size, GlooGroup(store, rank, size, timeout), whole_experts=rendezvous.whole_experts)
        tp.minimum(0, "cpu")
        return tp
    from nanovllm.distributed.nccl import NcclGroup
    from nanovllm.distributed.peer_memory import connect_peers

    tp = TensorParallel(rank, size, NcclGroup(rendezvous.nccl_id, rank, size), whole_experts=rendezvous.whole_experts)
    peers = connect_peers(tp.group, rank, size, rendezvous.peer_bytes, rendezvous.hidden_size, rendezvous.dtype)
    # All ranks use it or none: a rank that summed in another way than the rest would wait for them forever.
    if tp.minimum(int(peers is not None), "cuda"):
        tp = replace(tp, peers=peers)
    return tp


class GlooGroup:
    """A rank's end of a gloo group over the loopback interface. A collective returns when it is done.

    Raises PeerLostError if another rank has ended, or does not join a collective within `timeout`.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
        options._timeout = timeout
        self._group = dist.ProcessGroupGloo(store, rank, size, options)

    def all_reduce(self, x: torch.Tensor, is_minimum: bool = False) -> None:
        """Replace `x` by the sum over all ranks, or by the minimum, which may wait for a rank to load its model."""
        options = dist.AllreduceOptions()
        if is_minimum:
            options.reduceOp, options.timeout = dist.ReduceOp.MIN, START_TIMEOUT
        _finish(lambda: self._group.allreduce([x], options))

    def all_gather(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Write every rank's `part` into `out`, one after the other."""
        _finish(lambda: self._group._allgather_base(out, part))

    def broadcast(self, x: torch.Tensor) -> None:
        """Replace `x` by rank 0's."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        _finish(lambda: self._group.broadcast([x], options))

    def abort(self) -> None:
        """Does nothing: a rank that waits for a process that has ended sees its connection close."""


def _finish(start: Callable[[], Any]) -> None:
    try:
        start().wait()
    except RuntimeError as error:
        raise PeerLostError(str(error)) from error
