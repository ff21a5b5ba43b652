"""The two ends of the model: token ids to vectors, and vectors to logits. Both are cut over the vocabulary.

Each talks once: the embedding sums vectors of which all but one are zero, and the head gathers the logits, so that
every rank has them all and draws the same tokens. A vocabulary that does not come out even is padded
(`layers/linear.py`).
"""

import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.linear import ColumnParallelLinear, PartialSum


class VocabParallelEmbedding(ColumnParallelLinear):
    """Each rank keeps the vectors of a slice of the vocabulary, and contributes zeros for other tokens.

    The weight is also a matrix: that of a tied output projection, `[vocab_share, hidden_size]`.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__(hidden_size, vocab_size, tp)
        self.vocab_share = tp.padded_share(vocab_size)
        self.is_head = False

    @property
    def has_product(self) -> bool:
        return self.is_head  # otherwise rows are read, and no more

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids [tokens]` int32 -> `[tokens, hidden_size]`."""
        if self.tp.size == 1:
            return self.format.rows(self, input_ids)
        local = input_ids - self.tp.rank * self.vocab_share
        is_mine = (local >= 0) & (local < self.vocab_share)
        embedded = self.format.rows(self, torch.where(is_mine, local, 0)).masked_fill(~is_mine.unsqueeze(1), 0)
        return PartialSum(embedded, embedded.dtype, self.tp).total()


class ParallelLMHead(ColumnParallelLinear):
    """The output projection. When tied, it has no weight of its own but uses the embedding's."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__(hidden_size, vocab_size, tp)
        self._tied_to: list[VocabParallelEmbedding] = []  # in a list, for a submodule would own its weight

    @property
    def is_tied(self) -> bool:
        return bool(self._tied_to)

    @property
    def has_product(self) -> bool:
        return not self.is_tied

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        """Use the embedding's weight from now on, and have none."""
        self.weight = None
        self._tied_to = [embedding]
        embedding.is_head = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [n, hidden_size]` -> `[n, vocab_size]`, whole on every rank."""
        owner = self._tied_to[0] if self._tied_to else self
        logits = self.tp.all_gather(owner.format.matmul(owner, x, None))
        # Without the padding, whose zeros may be the greatest
        return logits if logits.shape[1] <= self.total else logits[:, : self.total].contiguous()
