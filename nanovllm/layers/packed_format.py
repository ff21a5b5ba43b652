"""Weights in a CPU library's own layout, in place of the plain ones, where that is faster (`packed_linear.py`)."""

import torch
from torch import nn

from nanovllm.kernels.linear.gate_mul import Gate, gate_mul
from nanovllm.kernels.linear.packed_linear import PackedWeight, pack_weight, packed_linear, packed_rows, unpack_weight
from nanovllm.layers.weight_format import PlainFormat


class PackedFormat(PlainFormat):
    """Plain while it is loaded, then packed; plain for good where this machine gains nothing from packing.

    Args:
        has_lookups: rows are read too, as of an embedding that is also the head. Then the weight is packed only if its
            rows can be read from the packed one: there is never a second copy.
    """

    def __init__(self, has_lookups: bool = False) -> None:
        self.packed: PackedWeight | None = None
        self.has_lookups = has_lookups

    @property
    def is_laid_out(self) -> bool:
        return self.packed is not None

    def matmul(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        gate: Gate | None = None,
        in_slices: bool = False,
    ) -> torch.Tensor:
        if self.packed is None:
            return super().matmul(layer, x, bias, gate, in_slices)
        out = packed_linear(x, self.packed, bias)
        return gate_mul(out, gate) if gate else out

    def rows(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return super().rows(layer, ids) if self.packed is None else packed_rows(self.packed, ids)

    def lay_out(self, layer: nn.Module) -> None:
        if self.packed is not None:
            return
        packed = pack_weight(layer.weight)
        if packed is not None and (packed.rows is not None or not self.has_lookups):
            self.packed, layer.weight = packed, None

    def undo_layout(self, layer: nn.Module) -> None:
        if self.packed is not None:
            layer.weight = nn.Parameter(unpack_weight(self.packed), requires_grad=False)
            self.packed = None

    def drop(self, layer: nn.Module) -> None:
        if self.packed is not None:
            weight = torch.empty(self.packed.shape, dtype=self.packed.dtype, device="meta")
            layer.weight, self.packed = nn.Parameter(weight, requires_grad=False), None

    def hidden_tensors(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        return {} if self.packed is None else {"weight": unpack_weight(self.packed)}
