"""The group of ranks that share a model's layers, as a layer sees it: how to cut a size, and how to talk.

What connects the ranks is in `groups.py`; where a layer talks, in `layers/linear.py` and `layers/embed_head.py`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from nanovllm.kernels.norm.all_reduce import PeerBuffers, one_shot_all_reduce


class PeerLostError(RuntimeError):
    """Another rank did not answer: its process has ended, or the group's time ran out."""


class Group(Protocol):
    """What connects this rank with the others: NCCL's or gloo's, `distributed/groups.py`. All raise PeerLostError."""

    def all_reduce(self, x: torch.Tensor, is_minimum: bool = False) -> None: ...
    def all_gather(self, out: torch.Tensor, part: torch.Tensor) -> None: ...
    def broadcast(self, x: torch.Tensor) -> None: ...
    def abort(self) -> None: ...


@dataclass(slots=True, frozen=True)
class TensorParallel:
    """This rank's place among those that share the model's layers, and the means by which they talk."""

    rank: int = 0
    size: int = 1
    group: Group | None = None  # None where nobody is to be talked to
    peers: PeerBuffers | None = None  # a faster way for small sums, on devices that reach each other's memory

    def split(self, total: int, what: str) -> int:
        """A rank's share of `total`. Raises ValueError if it does not come out even."""
        if total % self.size:
            raise ValueError(f"{what}={total} cannot be cut into tensor_parallel_size={self.size} equal parts")
        return total // self.size

    def padded_share(self, total: int) -> int:
        """A rank's share of `total`, rounded up: the last ranks have padding."""
        return -(-total // self.size)

    def is_one_shot(self, num_tokens: int, size: int, dtype: torch.dtype) -> bool:
        """Whether a sum of `[num_tokens, size]` is small enough to go over each other's memory."""
        return self.peers is not None and self.peers.fit(num_tokens, size, dtype)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `partial [tokens, n]`; the same bits on every rank. `partial` may be written over.

        Raises PeerLostError, as do the others here.
        """
        if self.size == 1:
            return partial
        if self.is_one_shot(*partial.shape, partial.dtype):
            return one_shot_all_reduce(partial, self.peers)
        if self.group is not None:
            self.group.all_reduce(partial)
        return partial

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        """Every rank's `part [n, share]` side by side: `[n, size * share]`."""
        if self.group is None:
            return part
        parts = part.new_empty(self.size * part.shape[0], part.shape[1])
        self.group.all_gather(parts, part.contiguous())
        return parts.view(self.size, *part.shape).transpose(0, 1).flatten(1)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's `tensor`, contiguous, written over the others'. Its bytes travel as they are, whatever the dtype."""
        if self.group is not None:
            self.group.broadcast(tensor.view(-1).view(torch.uint8))
        return tensor

    def abort(self) -> None:
        """Have all that waits for other ranks on the device go on, with whatever there is. From any thread."""
        if self.peers is not None:
            self.peers.give_up()
        if self.group is not None:
            self.group.abort()

    def minimum(self, value: int, device: str) -> int:
        """The least of every rank's `value`. Not for a step: it may wait as long as a rank takes to load the model."""
        if self.group is None:
            return value
        least = torch.tensor([value], device=device)
        self.group.all_reduce(least, is_minimum=True)
        return int(least)
