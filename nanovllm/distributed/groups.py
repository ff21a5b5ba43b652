"""How ranks are connected: gloo between CPUs, NCCL and each other's memory between devices.

A group is the engine's own and not torch.distributed's default one: engines side by side, and a trainer in the same
process, do not meet. Nothing listens but on the loopback interface. CPUs find each other at a file in a private
directory, which is needed only until all are connected and then removed; devices by what rank 0 tells them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.distributed.tensor_parallel import PeerLostError, TensorParallel

START_TIMEOUT = timedelta(minutes=30)


@dataclass(slots=True, frozen=True)
class Rendezvous:
    """What rank 0 tells the others so that they find each other."""

    folder: Path  # of the store
    nccl_id: bytes  # empty on CPUs
    peer_bytes: int  # the greatest message that is summed over each other's memory: the same on every rank
    hidden_size: int
    dtype: torch.dtype


def join_group(rendezvous: Rendezvous, rank: int, size: int, timeout: timedelta) -> TensorParallel:
    """This rank among all, connected when it returns. Raises PeerLostError, or what the store raises."""
    if not rendezvous.nccl_id:
        store = dist.FileStore(str(rendezvous.folder / "store"), size)
        store.set_timeout(timeout)
        tp = TensorParallel(rank, size, GlooGroup(store, rank, size, timeout))
        tp.minimum(0, "cpu")
        return tp
    from nanovllm.distributed.nccl import NcclGroup
    from nanovllm.distributed.peer_memory import connect_peers

    tp = TensorParallel(rank, size, NcclGroup(rendezvous.nccl_id, rank, size))
    peers = connect_peers(tp.group, rank, size, rendezvous.peer_bytes, rendezvous.hidden_size, rendezvous.dtype)
    # All ranks or none: one that summed its own way would wait for the others forever.
    if tp.minimum(int(peers is not None), "cuda"):
        tp = TensorParallel(rank, size, tp.group, peers)
    return tp


class GlooGroup:
    """A rank's end of a gloo group over the loopback interface. A collective is done when it returns.

    Raises PeerLostError where another rank has ended, or has not come within `timeout`.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
        options._timeout = timeout
        self._group = dist.ProcessGroupGloo(store, rank, size, options)

    def all_reduce(self, x: torch.Tensor, is_minimum: bool = False) -> None:
        """The sum over all ranks, or the least, over `x`. The latter has time: it may be a model's to load."""
        options = dist.AllreduceOptions()
        if is_minimum:
            options.reduceOp, options.timeout = dist.ReduceOp.MIN, START_TIMEOUT
        _finish(lambda: self._group.allreduce([x], options))

    def all_gather(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Every rank's `part`, one after the other, in `out`."""
        _finish(lambda: self._group._allgather_base(out, part))

    def broadcast(self, x: torch.Tensor) -> None:
        """Rank 0's `x` on every rank."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        _finish(lambda: self._group.broadcast([x], options))

    def abort(self) -> None:
        """Nothing: whoever waits for a process that has ended sees its connection close."""


def _finish(start: Callable[[], Any]) -> None:
    try:
        start().wait()
    except RuntimeError as error:
        raise PeerLostError(str(error)) from error
