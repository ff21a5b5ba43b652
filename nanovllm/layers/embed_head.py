"""The two ends of the model: token ids to vectors, and vectors to logits. Both are cut over the vocabulary."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.linear import Linear, TensorParallel, copy_exactly, slice_for_rank


class VocabParallelEmbedding(nn.Module):
    """Each rank keeps the vectors of a slice of the vocabulary, and contributes zeros for other tokens."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(tp.split(vocab_size, "vocab_size"), hidden_size), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids [tokens]` int32 -> `[tokens, hidden_size]`."""
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.tp.rank * self.weight.shape[0]
        is_mine = (local >= 0) & (local < self.weight.shape[0])
        embedded = F.embedding(torch.where(is_mine, local, 0), self.weight)
        return self.tp.all_reduce(embedded.masked_fill_(~is_mine.unsqueeze(1), 0))

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        """Copy this rank's rows. Raises ValueError on a wrong shape."""
        copy_exactly(param, slice_for_rank(loaded, 0, self.tp.rank, self.tp.size))


class ParallelLMHead(Linear):
    """The output projection. When tied, it has no weight of its own but uses the embedding's."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__(hidden_size, tp.split(vocab_size, "vocab_size"))
        self.tp = tp
        self._tied_to: list[VocabParallelEmbedding] = []  # in a list, for a submodule would own its weight

    @property
    def is_tied(self) -> bool:
        return bool(self._tied_to)

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        self.weight = None
        self._tied_to = [embedding]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [n, hidden_size]` -> `[n, vocab_size / ranks]`."""
        return F.linear(x, self._tied_to[0].weight) if self._tied_to else self.matmul(x, None)

    def pack(self) -> None:
        if not self.is_tied:  # a tied weight is also read row by row, and that needs the plain layout
            super().pack()

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        """Copy this rank's rows. Raises ValueError on a wrong shape."""
        copy_exactly(param, slice_for_rank(loaded, 0, self.tp.rank, self.tp.size))
