"""The linear layers, cut over the ranks as in Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

A column-parallel layer cuts the weight by output features: each rank computes its part of the output and nobody
talks. A row-parallel layer cuts it by input features, takes such a part as its input, and has a *partial sum* of the
whole output: **the all-reduce is in `RowParallelLinear.forward`, and nowhere else in a transformer layer.** A block
pairs the two (QKV then output projection, gate/up then down), so it costs one all-reduce, not one per matrix.

Heads must come out even. Other features are padded with zeros on the last ranks, which adds nothing: silu(0) * 0 = 0.
"""

from math import gcd
from typing import Protocol

import torch
from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.linear.packed_linear import PackedWeight, pack_weight, packed_linear
from nanovllm.kernels.linear.silu_mul import silu_mul
from nanovllm.kernels.linear.skinny_linear import skinny_linear
from nanovllm.kernels.norm.all_reduce import one_shot_add_rms_norm


class AddNorm(Protocol):
    """`layers/layernorm.py`'s: adds to the residual in place, and norms the sum."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class Linear(nn.Module):
    """y = x Wᵀ + b with `weight [out_features, in_features]`, loaded whole."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.packed: PackedWeight | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [tokens, in_features]` -> `[tokens, out_features]`."""
        return self.matmul(x, self.bias)

    def matmul(
        self, x: torch.Tensor, bias: torch.Tensor | None, gated: bool = False, in_slices: bool = False
    ) -> torch.Tensor:
        if self.packed is None:
            return skinny_linear(x, self.weight, bias, gated, in_slices)
        out = packed_linear(x, self.packed, bias)
        return silu_mul(out) if gated else out

    def pack(self) -> None:
        """Lay the weight out anew for the CPU's matrix units, in place of the plain one, where that is faster."""
        self.packed = pack_weight(self.weight)
        if self.packed is not None:
            self.weight = None

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        """Copy this rank's part of the checkpoint's tensor into `param`. Raises ValueError on a wrong shape."""
        copy_exactly(param, loaded)


class ColumnParallelLinear(Linear):
    """Each rank keeps a slice of the output features, and computes that slice of the output. No communication."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, bias: bool = False) -> None:
        super().__init__(in_features, tp.padded_share(out_features), bias)
        self.tp = tp
        self.total = out_features

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        copy_share(param, loaded, 0, self.total, self.tp.rank)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers on the same input as one matrix: gate and up. Shards are numbered from 0."""

    def __init__(self, in_features: int, shard_sizes: list[int], tp: TensorParallel, bias: bool = False) -> None:
        self.totals, self.shard_sizes = shard_sizes, [tp.padded_share(size) for size in shard_sizes]
        super().__init__(in_features, sum(self.shard_sizes) * tp.size, tp, bias)

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        """SwiGLU of a gate and an up of equal sizes (Shazeer, 2020, arXiv:2002.05202): silu(gate) · up."""
        return self.matmul(x, self.bias, gated=True)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        own = param.narrow(0, sum(self.shard_sizes[:shard]), self.shard_sizes[shard])
        copy_share(own, loaded, 0, self.totals[shard], self.tp.rank)


class QKVParallelLinear(ColumnParallelLinear):
    """The query, key and value projections as one matrix, cut by heads. Shards are "q", "k" and "v".

    A rank keeps the key/value heads of its query heads; neighbouring ranks may keep the same one. On all ranks a kept
    head serves equally many query heads: where N cuts groups of them unevenly, a rank keeps a head more than once.
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
        nn.Module.__init__(self)
        self.tp = tp
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads={num_heads} must be a multiple of num_key_value_heads={num_kv_heads}"
            )
        self.num_heads = tp.split(num_heads, "num_attention_heads")
        group = num_heads // num_kv_heads
        served = gcd(group, self.num_heads)  # query heads by each key/value head that is kept
        first = tp.rank * self.num_heads
        self.kv_heads = [head // group for head in range(first, first + self.num_heads, served)]
        self.num_kv_heads, self.total_kv_heads = len(self.kv_heads), num_kv_heads
        self.shard_sizes = {
            "q": self.num_heads * head_dim,
            "k": self.num_kv_heads * head_dim,
            "v": self.num_kv_heads * head_dim,
        }
        Linear.__init__(self, hidden_size, sum(self.shard_sizes.values()), bias)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        order = list(self.shard_sizes)
        start = sum(self.shard_sizes[s] for s in order[: order.index(shard)])
        own = param.narrow(0, start, self.shard_sizes[shard])
        if shard == "q":
            copy_share(own, loaded, 0, self.shard_sizes["q"] * self.tp.size, self.tp.rank)
            return
        for part, head in zip(own.chunk(self.num_kv_heads), self.kv_heads, strict=True):
            copy_share(part, loaded, 0, self.total_kv_heads * len(part), head)


class RowParallelLinear(Linear):
    """Each rank keeps a slice of the input features, has a partial sum of the output, and **all-reduces** it."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, bias: bool = False) -> None:
        super().__init__(tp.padded_share(in_features), out_features, bias)
        self.tp = tp
        self.total = in_features

    def forward(self, x: torch.Tensor, residual: torch.Tensor, norm: AddNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """`x [tokens, this rank's in_features]` -> (normed, residual + output), `[tokens, out_features]`, on all ranks.

        `norm` is the one that follows in the model: a small sum is added to `residual` and normed in the same kernel.
        """
        is_one_shot = self.tp.peers is not None and self.tp.peers.fit(residual)
        # Only one rank adds the bias, or the sum would hold it once per rank.
        bias = self.bias if self.tp.rank == 0 else None
        partial = self.matmul(x, bias, in_slices=is_one_shot or self.tp.size == 1)  # what comes next adds the slices up
        if is_one_shot:
            return one_shot_add_rms_norm(partial, residual, norm.weight, norm.eps, self.tp.peers)
        return norm(self.tp.all_reduce(partial), residual)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        if param is self.bias:
            copy_exactly(param, loaded)
        else:
            copy_share(param, loaded, 1, self.total, self.tp.rank)


def copy_share(param: torch.Tensor, loaded: torch.Tensor, dim: int, total: int, rank: int) -> None:
    """Copy `rank`'s share of `loaded`, which has `total` features along `dim`, and zeros where it ends before `param`.

    What is mapped from a file is read only where it is copied. Raises ValueError on a wrong shape.
    """
    whole = [*param.shape[:dim], total, *param.shape[dim + 1 :]]
    if list(loaded.shape) != whole:
        raise ValueError(f"shape {list(loaded.shape)} where the model has {whole}")
    share = param.shape[dim]
    start = min(rank * share, total)
    length = min(share, total - start)
    param.data.narrow(dim, 0, length).copy_(loaded.narrow(dim, start, length))
    param.data.narrow(dim, length, share - length).zero_()


def copy_exactly(param: torch.Tensor, loaded: torch.Tensor) -> None:
    """Copy `loaded` into `param`, converting the dtype. Raises ValueError unless the shapes are equal."""
    if param.shape != loaded.shape:
        raise ValueError(f"shape {list(loaded.shape)} where the model has {list(param.shape)}")
    param.data.copy_(loaded)
