"""A model whose head is tied has one matrix for the embedding and the head. What if a checkpoint brings two?

Where it is loaded, as in transformers: two that differ are both taken, and nothing is tied. A model that runs cannot
grow a second matrix, so there a head that differs is refused.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm.models.weight_files import read_tensors

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROWS = 4096  # compared at once: of the widest models 64 MB in float32

logger = logging.getLogger(__name__)


def untie_if_heads_differ(hf_config: Any, path: Path, dtype: torch.dtype) -> None:
    """Set `hf_config.tie_word_embeddings` to False if the weights, in the model's `dtype`, have a head of their own.

    Raises as `read_tensors`.
    """
    if not hf_config.tie_word_embeddings:
        return
    tensors = dict(read_tensors(path, only=frozenset((HEAD, EMBEDDING))))
    if len(tensors) == 2 and not _are_equal(tensors[HEAD], tensors[EMBEDDING], dtype):
        logger.warning(
            "%s says tie_word_embeddings=true, but %s differs from %s: the model takes both", path, HEAD, EMBEDDING
        )
        hf_config.tie_word_embeddings = False


@dataclass(slots=True)
class TiedHead:
    """Watches the tensors that a running model gets, bucket by bucket, for a head unlike its embedding.

    Of each it keeps a fingerprint, for a trainer may write its next tensor to the same memory. The head is held
    against the embedding that is in force at the end of the call in which it comes.
    """

    dtype: torch.dtype
    path: Path | None  # where the first embedding came from; None when it has been dropped, or was a dummy
    embedding: int | None = None  # of the one in force, once it is known
    head: int | None = None  # of the call's; it outlives the call only if there is no embedding yet

    def begin(self) -> None:
        if self.embedding is not None:
            self.head = None

    def see(self, name: str, tensor: torch.Tensor) -> None:
        if name == HEAD:
            self.head = fingerprint(tensor, self.dtype)
        elif name == EMBEDDING:
            self.embedding = fingerprint(tensor, self.dtype)

    def end(self) -> None:
        """Raises ValueError if a head has come that differs."""
        if self.head is None:
            return
        if self.embedding is None and self.path is not None:
            for name, tensor in read_tensors(self.path, only=frozenset((EMBEDDING,))):
                self.see(name, tensor)
        if self.embedding is not None:
            head, self.head = self.head, None
            if head != self.embedding:
                raise ValueError(
                    f"tensor {HEAD!r} differs from {EMBEDDING!r}, which is this model's head too "
                    "(tie_word_embeddings): leave it out, or make an engine from a checkpoint in which they differ"
                )

    def forget(self) -> None:
        """The weights have been dropped."""
        self.path = self.embedding = self.head = None


@torch.no_grad()
def fingerprint(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """64 bits of a matrix `[rows, columns]` in `dtype`: a sum of its elements' bits with random weights."""
    generator = torch.Generator().manual_seed(0)
    by_row, by_column = (
        torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator).to(tensor.device) for n in tensor.shape
    )
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for rows, weights in zip(tensor.split(ROWS), by_row.split(ROWS), strict=True):
        rows = (rows.to(dtype) + 0.0).view(bits).long()  # adding makes a zero of -0.0, which is equal to it
        total += ((rows * by_column).sum(1) * weights).sum()
    return int(total)


def _are_equal(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]] = zip(a.split(ROWS), b.split(ROWS), strict=False)
    return a.shape == b.shape and all(torch.equal(x.to(dtype), y.to(dtype)) for x, y in pairs)
