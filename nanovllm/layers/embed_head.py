"""The two ends of the model: token ids to vectors, and vectors to logits. Both are cut over the vocabulary.

Each talks once: the embedding sums vectors of which all but one are zero, the head gathers the logits, so that every
rank has them all and draws the same tokens. A vocabulary that does not come out even is padded (`layers/linear.py`).
"""

import torch
import torch.nn.functional as F

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.linear.packed_linear import pack_weight, packed_rows
from nanovllm.layers.linear import ColumnParallelLinear


class VocabParallelEmbedding(ColumnParallelLinear):
    """Each rank keeps the vectors of a slice of the vocabulary, and contributes zeros for other tokens.

    The weight is also a matrix: that of a tied output projection, `[vocab_share, hidden_size]`.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__(hidden_size, vocab_size, tp)
        self.vocab_share = tp.padded_share(vocab_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids [tokens]` int32 -> `[tokens, hidden_size]`."""
        if self.tp.size == 1:
            return self._look_up(input_ids)
        local = input_ids - self.tp.rank * self.vocab_share
        is_mine = (local >= 0) & (local < self.vocab_share)
        embedded = self._look_up(torch.where(is_mine, local, 0))
        return self.tp.all_reduce(embedded.masked_fill(~is_mine.unsqueeze(1), 0))

    def pack(self) -> None:
        """Nothing: rows are read from the plain weight, unless it is also the head's."""

    def pack_for_head(self) -> None:
        """Pack a tied weight if rows can still be read from the packed one: there is never a second copy."""
        packed = pack_weight(self.weight)
        if packed is not None and packed.rows is not None:
            self.packed, self.weight = packed, None

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight) if self.packed is None else packed_rows(self.packed, ids)


class ParallelLMHead(ColumnParallelLinear):
    """The output projection. When tied, it has no weight of its own but uses the embedding's."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__(hidden_size, vocab_size, tp)
        self._tied_to: list[VocabParallelEmbedding] = []  # in a list, for a submodule would own its weight

    @property
    def is_tied(self) -> bool:
        return bool(self._tied_to)

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        self.weight = None
        self._tied_to = [embedding]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [n, hidden_size]` -> `[n, vocab_size]`, whole on every rank."""
        logits = self.tp.all_gather((self._tied_to[0] if self._tied_to else self).matmul(x, None))
        # Without the padding, whose zeros may be the greatest
        return logits if logits.shape[1] <= self.total else logits[:, : self.total].contiguous()

    def pack(self) -> None:
        """Pack the weight, or the embedding's that stands for it."""
        if self._tied_to:
            self._tied_to[0].pack_for_head()
        else:
            super().pack()
