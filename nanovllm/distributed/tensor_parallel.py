"""What a layer needs of tensor parallelism: its part of each size, and collectives with the other ranks.

Each rank holds a part of every layer's weights and computes with it; collectives join the partial results. Layers call
them in `layers/linear.py` and `layers/embed_head.py`; `groups.py` makes the groups that carry them out.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from nanovllm.kernels.norm.all_reduce import PeerBuffers, one_shot_all_reduce


class PeerLostError(RuntimeError):
    """A collective failed: another rank's process has ended, or did not answer within the timeout."""


class Group(Protocol):
    """This rank's connection to the others: `NcclGroup` between GPUs, `GlooGroup` between CPUs.

    The collectives work in place on contiguous tensors and raise PeerLostError.
    """

    def all_reduce(self, x: torch.Tensor, is_minimum: bool = False) -> None:
        """Replace `x` by the sum over all ranks, or by the minimum."""

    def all_gather(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Write every rank's `part` into `out`, one after the other."""

    def broadcast(self, x: torch.Tensor) -> None:
        """Replace `x` by rank 0's."""

    def abort(self) -> None:
        """Unblock kernels that wait for other ranks. Any thread may call it, and again."""


@dataclass(slots=True, frozen=True)
class TensorParallel:
    """One rank's number among `size` ranks, and its connections to the others.

    With the defaults (one rank) the model is whole, and every collective returns its argument.

    Attributes:
        group: carries the collectives; None without other ranks, and in outlines that only need the sizes.
        peers: carries small sums faster, on devices that reach each other's memory; None elsewhere.
        whole_experts: each rank has some of a layer's experts, whole, instead of a share of each (expert parallelism).
    """

    rank: int = 0
    size: int = 1
    group: Group | None = None
    peers: PeerBuffers | None = None
    whole_experts: bool = False

    def split(self, total: int, what: str) -> int:
        """One rank's part of `total`, named `what`. Raises ValueError if `size` does not divide it."""
        if total % self.size:
            raise ValueError(f"{what}={total} cannot be cut into tensor_parallel_size={self.size} equal parts")
        return total // self.size

    def padded_share(self, total: int) -> int:
        """One rank's part of `total`, rounded up: the last ranks are padded."""
        return -(-total // self.size)

    def is_one_shot(self, num_tokens: int, size: int, dtype: torch.dtype) -> bool:
        """Whether a sum of `[num_tokens, size]` is small enough to go over each other's memory."""
        return self.peers is not None and self.peers.fit(num_tokens, size, dtype)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `partial [tokens, n]`, the same bits on every rank. May overwrite `partial`.

        All collectives raise PeerLostError.
        """
        if self.size == 1:
            return partial
        if self.is_one_shot(*partial.shape, partial.dtype):
            return one_shot_all_reduce(partial, self.peers)
        if self.group is not None:
            self.group.all_reduce(partial)
        return partial

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' `part [n, share]` side by side: `[n, size * share]`."""
        if self.group is None:
            return part
        parts = part.new_empty(self.size * part.shape[0], part.shape[1])
        self.group.all_gather(parts, part.contiguous())
        return parts.view(self.size, *part.shape).transpose(0, 1).flatten(1)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite every rank's contiguous `tensor` with rank 0's. Sends plain bytes, so any dtype will do."""
        if self.group is not None:
            self.group.broadcast(tensor.view(-1).view(torch.uint8))
        return tensor

    def abort(self) -> None:
        """Unblock kernels that wait for other ranks; their results are garbage. Any thread may call it."""
        if self.peers is not None:
            self.peers.give_up()
        if self.group is not None:
            self.group.abort()

    def minimum(self, value: int, device: str) -> int:
        """The minimum of all ranks' `value`. Not for steps: it may wait as long as a rank takes to load the model."""
        if self.group is None:
            return value
        least = torch.tensor([value], device=device)
        self.group.all_reduce(least, is_minimum=True)
        return int(least)
