"""How a linear layer keeps its weight: which parameters a checkpoint fills, and the product with them.

A layer asks its format and a model never knows. Each layer has an instance of its own. This file has the interface and
the plain format; every other format is a file beside it.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.linear.gate_mul import Gate
from nanovllm.kernels.linear.skinny_linear import skinny_linear


class WeightFormat(Protocol):
    """One layer's weight. `layer` is the module that has the parameters."""

    def parameters(self, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        """What a checkpoint's tensors are copied into, by leaf name. `dtype` is the model's; a scale has its own.

        Dimension 0 goes over the outputs, dimension 1, where there is one, over the inputs: so they are cut over ranks.
        """

    def matmul(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        gate: Gate | None = None,
        in_slices: bool = False,
    ) -> torch.Tensor:
        """`x [tokens, in_features]` times the weight, plus `bias`: `[tokens, out_features]`.

        Args:
            gate: silu or gelu of the first half · second half of that: `[tokens, out_features / 2]`.
            in_slices: the result may be partial sums `[slices, tokens, out_features]` in float32 instead.
        """

    def rows(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids [tokens]` of the weight, `[tokens, in_features]`: an embedding's."""

    @property
    def is_laid_out(self) -> bool:
        """Whether the weight has the product's layout instead of the checkpoint's."""

    def lay_out(self, layer: nn.Module) -> None:
        """Turn loaded parameters into the form that the product reads. Does nothing if they have it already."""

    def undo_layout(self, layer: nn.Module) -> None:
        """The reverse, so that a tensor can be copied in. Does nothing if `is_laid_out` is False."""

    def drop(self, layer: nn.Module) -> None:
        """Forget what `lay_out` has made: the parameters are as before loading, but without memory."""

    def hidden_tensors(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        """Copies of the parameters that `lay_out` has replaced, as a checkpoint has them."""


class PlainFormat:
    """`weight [out_features, in_features]` as a checkpoint has it."""

    is_laid_out = False

    def parameters(self, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        return {"weight": nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)}

    def matmul(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        gate: Gate | None = None,
        in_slices: bool = False,
    ) -> torch.Tensor:
        return skinny_linear(x, layer.weight, bias, gate, in_slices)

    def rows(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, layer.weight)

    def lay_out(self, layer: nn.Module) -> None: ...

    def undo_layout(self, layer: nn.Module) -> None: ...

    def drop(self, layer: nn.Module) -> None: ...

    def hidden_tensors(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        return {}
