"""The linear layers, cut over the ranks as in Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

A column-parallel layer cuts the weight by output features: each rank computes its share of the output, and no rank
talks. A row-parallel layer cuts it by input features: each rank takes such a share as its input and has a *partial sum*
of the whole output. **The all-reduce is in `PartialSum`, and nowhere else in a layer.** A block pairs the two (QKV then
output projection, gate/up then down), so it costs one all-reduce, not one per matrix.

Heads must come out even. Other features are padded with zeros on the last ranks, which adds nothing: silu(0) * 0 = 0.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.linear.gate_mul import Gate
from nanovllm.kernels.norm.all_reduce import one_shot_add_rms_norm
from nanovllm.kernels.norm.rms_norm import add_rms_norm
from nanovllm.layers.packed_format import PackedFormat
from nanovllm.layers.shards import copy_exactly, copy_share, split_exactly
from nanovllm.layers.weight_format import PlainFormat, WeightFormat


@dataclass(slots=True, frozen=True)
class PartialSum:
    """This rank's part of a sum over all ranks, not reduced yet: its consumer reduces it, in its own kernel.

    Attributes:
        partial: `[tokens, n]`, or `[slices, tokens, n]` in float32, which are to be added up too.
        dtype: of the sum.
    """

    partial: torch.Tensor
    dtype: torch.dtype
    tp: TensorParallel

    def total(self) -> torch.Tensor:
        """The sum `[tokens, n]`, on all ranks the same bits."""
        partial = self.partial.sum(dim=0).to(self.dtype) if self.partial.dim() == 3 else self.partial
        return self.tp.all_reduce(partial)

    def reduced(self) -> torch.Tensor:
        """The sum over ranks: `[tokens, n]`, or still in slices."""
        return self.partial if self.tp.size == 1 else self.total()

    def add_to(self, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the sum to `residual [tokens, n]` in place; returns (the RMSNorm of that, `residual`).

        A small sum over ranks is one kernel with the addition and the norm.
        """
        if self.tp.is_one_shot(*residual.shape, self.dtype):
            return one_shot_add_rms_norm(self.partial, residual, weight, eps, self.tp.peers)
        return add_rms_norm(self.tp.all_reduce(self.partial), residual, weight, eps)


class Linear(nn.Module):
    """y = x Wᵀ + b, loaded whole. `format` has the weight, which in the plain one is `[out_features, in_features]`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.use_format(PlainFormat(), torch.get_default_dtype())

    @property
    def has_product(self) -> bool:
        """Whether the layer multiplies by its weight."""
        return True

    def use_format(self, format: WeightFormat, dtype: torch.dtype) -> None:
        """Keep the weight in another format. Its parameters are new and not loaded."""
        for name, _ in list(self.named_parameters(recurse=False)):
            if name != "bias":
                delattr(self, name)
        self.format = format
        for name, param in format.parameters(self.out_features, self.in_features, dtype).items():
            setattr(self, name, param)

    def use_packed_format(self, dtype: torch.dtype) -> None:
        """Keep the weight as a CPU's product reads it fastest."""
        if self.has_product:
            self.use_format(PackedFormat(), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [tokens, in_features]` -> `[tokens, out_features]`."""
        return self.format.matmul(self, x, self.bias)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        """Copy this rank's share of the checkpoint's tensor into `param`. Raises ValueError on a wrong shape."""
        copy_exactly(param, loaded)


class ColumnParallelLinear(Linear):
    """Each rank keeps a share of the output features, and computes that share of the output. No communication."""

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

    def gate_mul(self, x: torch.Tensor, gate: Gate = "silu") -> torch.Tensor:
        """Of a gate and an up of equal sizes: silu(gate) · up, or gelu(gate) · up."""
        return self.format.matmul(self, x, self.bias, gate)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        if shard is None:  # the checkpoint has them as one tensor too
            for index, part in enumerate(split_exactly(loaded, self.totals)):
                self.load_shard(param, part, index)
            return
        own = param.narrow(0, sum(self.shard_sizes[:shard]), self.shard_sizes[shard])
        copy_share(own, loaded, 0, self.totals[shard], self.tp.rank)


class RowParallelLinear(Linear):
    """Each rank keeps a share of the input features, and has a partial sum of the output."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, bias: bool = False) -> None:
        super().__init__(tp.padded_share(in_features), out_features, bias)
        self.tp = tp
        self.total = in_features

    def forward(self, x: torch.Tensor) -> PartialSum:
        """`x [tokens, this rank's in_features]` -> a partial sum of `[tokens, out_features]`."""
        # One rank adds the bias, or the sum would hold it once per rank.
        bias = self.bias if self.tp.rank == 0 else None
        # Slices need a kernel that adds them up: NCCL and gloo have none.
        in_slices = self.tp.size == 1 or self.tp.is_one_shot(len(x), self.out_features, x.dtype)
        return PartialSum(self.format.matmul(self, x, bias, in_slices=in_slices), x.dtype, self.tp)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str | int | None) -> None:
        if param.dim() == 1:  # one number for each output, as a bias: whole on every rank
            copy_exactly(param, loaded)
        else:
            copy_share(param, loaded, 1, self.total, self.tp.rank)
