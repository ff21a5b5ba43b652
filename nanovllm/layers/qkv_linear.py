"""The query, key and value projections, cut over the ranks by heads."""

from math import gcd

import torch
from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.linear import Linear
from nanovllm.layers.shards import copy_share, split_exactly


class QKVParallelLinear(Linear):
    """The query, key and value projections as one matrix, cut by heads. Shards are "q", "k" and "v".

    A rank keeps the key/value heads that its query heads read; neighbouring ranks may keep the same one. Every kept
    head serves equally many query heads: where the cut would make groups uneven, a rank keeps a head more than once.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        tp: TensorParallel,
        bias: bool = False,
    ) -> None:
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads={num_heads} must be a multiple of num_key_value_heads={num_kv_heads}"
            )
        self.tp = tp
        self.num_heads = tp.split(num_heads, "num_attention_heads")
        group = num_heads // num_kv_heads
        served = gcd(group, self.num_heads)  # query heads for each key/value head that a rank keeps
        kept = [head // group for head in range(0, num_heads, served)]  # by all ranks, one after the other
        share = self.num_heads // served
        self.kv_heads = kept[tp.rank * share : (tp.rank + 1) * share]
        self.kv_copies = [kept.count(head) for head in self.kv_heads]
        self.num_kv_heads, self.total_kv_heads = len(self.kv_heads), num_kv_heads
        self.shard_sizes = {
            "q": self.num_heads * head_dim,
            "k": self.num_kv_heads * head_dim,
            "v": self.num_kv_heads * head_dim,
        }
        super().__init__(hidden_size, sum(self.shard_sizes.values()), bias)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        order = list(self.shard_sizes)
        if shard is None:  # the checkpoint has the three as one tensor too
            kv_size = self.shard_sizes["k"] // self.num_kv_heads * self.total_kv_heads
            sizes = [self.shard_sizes["q"] * self.tp.size, kv_size, kv_size]
            for each, part in zip(order, split_exactly(loaded, sizes), strict=True):
                self.load_shard(param, part, each)
            return
        start = sum(self.shard_sizes[s] for s in order[: order.index(shard)])
        self.copy_heads(param.narrow(0, start, self.shard_sizes[shard]), loaded, shard)

    def copy_heads(self, own: torch.Tensor, loaded: torch.Tensor, shard: str) -> None:
        """Copy this rank's heads of `loaded`, which has all of them along dimension 0. Raises as `copy_share`."""
        if shard == "q":
            copy_share(own, loaded, 0, len(own) * self.tp.size, self.tp.rank)
            return
        for part, head in zip(own.chunk(self.num_kv_heads), self.kv_heads, strict=True):
            copy_share(part, loaded, 0, self.total_kv_heads * len(part), head)
