"""How a layer keeps its experts' weights: plain, or on a CPU packed for its matrix units, expert by expert.

The counterpart of `weight_format.py` for weights with a dimension more. A format has the products too; `Experts`, which
has the parameters, hands itself in as `layer`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.linear.packed_linear import PackedWeight, pack_weight, packed_linear, unpack_weight
from nanovllm.kernels.moe.activation import gate_reference
from nanovllm.kernels.moe.expert_loop import loop_over_experts
from nanovllm.kernels.moe.experts import sum_experts_triton

Product = Callable[[int, torch.Tensor, torch.Tensor | None], torch.Tensor]  # expert, rows, bias


class PlainExperts:
    """`gate_up [experts, 2 * size, hidden_size]` and `down [experts, hidden_size, size]`."""

    is_laid_out = False

    def compute(
        self, layer: nn.Module, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, in_slices: bool
    ) -> torch.Tensor:
        """The sum over this rank's experts: `[tokens, hidden_size]`.

        With `in_slices` it may be `[k, tokens, hidden_size]` in float32 instead, which are to be added up.
        """
        if x.is_cuda:
            return sum_experts_triton(x, weights, ids, layer.expert_weights, in_slices)
        return self._loop(layer, x, weights, ids, _plain_product(layer.gate_up), _plain_product(layer.down))

    def _loop(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        gate_up_product: Product,
        down_product: Product,
    ) -> torch.Tensor:
        gate_up_bias, down_bias = layer.gate_up_bias, layer.own_down_bias

        def hidden(expert: int, rows: torch.Tensor) -> torch.Tensor:
            bias = None if gate_up_bias is None else gate_up_bias[expert]
            return gate_reference(gate_up_product(expert, rows, bias), layer.activation)

        def down(expert: int, rows: torch.Tensor) -> torch.Tensor:
            return down_product(expert, rows, None if down_bias is None else down_bias[expert])

        return loop_over_experts(x, weights, ids, layer.num_local, layer.first_expert, hidden, down)

    def lay_out(self, layer: nn.Module) -> None: ...

    def undo_layout(self, layer: nn.Module) -> None: ...

    def drop(self, layer: nn.Module) -> None: ...

    def hidden_tensors(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        return {}


class PackedExperts(PlainExperts):
    """Plain while they are loaded, then packed; plain for good where this machine gains nothing from packing."""

    def __init__(self) -> None:
        self.packed: dict[str, list[PackedWeight]] | None = None
        self.shapes: dict[str, torch.Size] = {}

    @property
    def is_laid_out(self) -> bool:
        return self.packed is not None

    def compute(
        self, layer: nn.Module, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, in_slices: bool
    ) -> torch.Tensor:
        if self.packed is None:
            return super().compute(layer, x, weights, ids, in_slices)
        products = (_packed_product(self.packed[name]) for name in ("gate_up", "down"))
        return self._loop(layer, x, weights, ids, *products)

    def lay_out(self, layer: nn.Module) -> None:
        if self.packed is not None:
            return
        packed: dict[str, list[PackedWeight]] = {}
        for name in ("gate_up", "down"):
            packed[name] = [pack_weight(weight) for weight in getattr(layer, name)]
            if not packed[name] or None in packed[name]:
                return
            self.shapes[name] = getattr(layer, name).shape
        self.packed = packed
        layer.gate_up = layer.down = None

    def undo_layout(self, layer: nn.Module) -> None:
        if self.packed is not None:
            for name, tensor in self.hidden_tensors(layer).items():
                setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
            self.packed = None

    def drop(self, layer: nn.Module) -> None:
        if self.packed is not None:
            for name, packed in self.packed.items():
                weight = torch.empty(self.shapes[name], dtype=packed[0].dtype, device="meta")
                setattr(layer, name, nn.Parameter(weight, requires_grad=False))
            self.packed = None

    def hidden_tensors(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        if self.packed is None:
            return {}
        return {name: torch.stack([unpack_weight(part) for part in parts]) for name, parts in self.packed.items()}


def _plain_product(weight: torch.Tensor) -> Product:
    return lambda expert, rows, bias: F.linear(rows, weight[expert], bias)


def _packed_product(packed: list[PackedWeight]) -> Product:
    return lambda expert, rows, bias: packed_linear(rows, packed[expert], bias)
