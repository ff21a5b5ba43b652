"""The two ends of the model: token ids to vectors, and vectors to logits. Both are cut over the vocabulary.

Each talks once: the embedding sums vectors of which all but one are zero, and the head gathers the logits, so that
every rank has them all and draws the same tokens. A vocabulary that does not come out even is padded
(`layers/linear.py`).
"""

import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.linear import ColumnParallelLinear, PartialSum
from nanovllm.layers.packed_format import PackedFormat


class VocabParallelEmbedding(ColumnParallelLinear):
    """Each rank keeps the vectors of its share of the vocabulary, and adds zeros for other tokens.

    The weight `[vocab_share, hidden_size]` may also be the output projection's: a tied head.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__(hidden_size, vocab_size, tp)
        self.vocab_share = tp.padded_share(vocab_size)
        self.is_head = False

    @property
    def has_product(self) -> bool:
        return self.is_head  # without a tied head the layer only reads rows

    def use_packed_format(self, dtype: torch.dtype) -> None:
        if self.has_product:
            self.use_format(PackedFormat(has_lookups=True), dtype)

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
        self._tied_to: list[VocabParallelEmbedding] = []  # in a list: as a submodule it would own the weight twice

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
        # Drop the padding: its zeros may exceed every logit.
        return logits if logits.shape[1] <= self.total else logits[:, : self.total].contiguous()
