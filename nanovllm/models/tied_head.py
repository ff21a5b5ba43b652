"""A tied model has one matrix for the embedding and the head: decides what to do with weights that have two.

When the engine starts, it does as transformers does: if the two differ, the model takes both and is not tied. A running
model cannot add a second matrix, so `load_weights` refuses a head that differs.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm.models.gguf_file import is_gguf
from nanovllm.models.weight_files import read_tensors

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROWS = 4096  # compared at once: 64 MB in float32 for a hidden size of 4096

logger = logging.getLogger(__name__)


def untie_if_heads_differ(hf_config: Any, path: Path, dtype: torch.dtype) -> None:
    """Set `hf_config.tie_word_embeddings` to False if the weights' head, in `dtype`, differs from their embedding.

    Raises as `read_tensors`.
    """
    if not hf_config.tie_word_embeddings or is_gguf(path):  # a GGUF file says so where it has no head
        return
    tensors = dict(read_tensors(path, only=frozenset((HEAD, EMBEDDING))))
    if len(tensors) == 2 and not _are_equal(tensors[HEAD], tensors[EMBEDDING], dtype):
        logger.warning(
            "%s says tie_word_embeddings=true, but %s differs from %s: the model takes both", path, HEAD, EMBEDDING
        )
        hf_config.tie_word_embeddings = False


@dataclass(slots=True)
class TiedHead:
    """Watches the weights that a running model receives for a head that differs from the embedding.

    A trainer may send them over several calls and write its next tensor to the same memory, so this keeps fingerprints.
    At the end of a call that brought a head, it compares the head with the model's embedding at that time.
    """

    dtype: torch.dtype
    path: Path | None  # the first embedding's checkpoint; None for dummy weights, and once the weights are dropped
    embedding: int | None = None  # fingerprint of the model's embedding, once known
    head: int | None = None  # fingerprint of this call's head; kept after the call only if there is no embedding yet

    def begin(self) -> None:
        if self.embedding is not None:
            self.head = None

    def see(self, name: str, tensor: torch.Tensor) -> None:
        if name == HEAD:
            self.head = fingerprint(tensor, self.dtype)
        elif name == EMBEDDING:
            self.embedding = fingerprint(tensor, self.dtype)

    def end(self) -> None:
        """Raises ValueError if the head differs from the embedding."""
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
        """Call when the engine drops the weights."""
        self.path = self.embedding = self.head = None


@torch.no_grad()
def fingerprint(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """A 64-bit hash of a matrix `[rows, columns]` cast to `dtype`: the randomly weighted sum of its elements' bits."""
    generator = torch.Generator().manual_seed(0)
    by_row, by_column = (
        torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator).to(tensor.device) for n in tensor.shape
    )
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for rows, weights in zip(tensor.split(ROWS), by_row.split(ROWS), strict=True):
        rows = (rows.to(dtype) + 0.0).view(bits).long()  # adding 0.0 turns -0.0 into the equal 0.0
        total += ((rows * by_column).sum(1) * weights).sum()
    return int(total)


def _are_equal(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]] = zip(a.split(ROWS), b.split(ROWS), strict=False)
    return a.shape == b.shape and all(torch.equal(x.to(dtype), y.to(dtype)) for x, y in pairs)
