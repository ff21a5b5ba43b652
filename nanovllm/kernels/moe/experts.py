"""The whole of the experts' work on a GPU: sort the pairs if there are many, two products, and a sum.

Few pairs take two launches, gated and weighted product: the products find their rows themselves, and the result are
slices, which the next norm adds up. Many pairs take two more to sort, and one for the sum.
"""

from dataclasses import dataclass

import torch

from nanovllm.kernels.device import shared_memory_bytes
from nanovllm.kernels.moe.activation import Activation
from nanovllm.kernels.moe.expert_product import gated_product, weighted_product
from nanovllm.kernels.moe.sort_by_expert import sort_by_expert_triton
from nanovllm.kernels.moe.sum_choices import sum_choices_triton
from nanovllm.kernels.moe.tilings import Tiling, choose_tilings

UNSORTED_PAIRS = 256  # at most; more are sorted first
SLICED_TOKENS = 128  # at most; for more a sum of their own is cheaper (`sum_choices.py`)


@dataclass(slots=True, frozen=True)
class ExpertWeights:
    """The experts of this rank, `first` to `first + len(gate_up) - 1` of `total`.

    Attributes:
        gate_up: `[experts, 2 * size, hidden_size]`, a gate's rows and then its up's; with a bias `[experts, 2 * size]`.
        down: `[experts, hidden_size, size]`, with a bias `[experts, hidden_size]`.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activation: Activation
    first: int
    total: int


def sum_experts_triton(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    experts: ExpertWeights,
    in_slices: bool = False,
    tilings: tuple[Tiling, Tiling] | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts that are here: `[tokens, hidden_size]` in the dtype of x.

    Args:
        x: `[tokens, hidden_size]`.
        weights, ids: `[tokens, k]` in float32 and int32, from `route`.
        in_slices: the result may be `[k, tokens, hidden_size]` in float32 instead, which are to be added up.
        tilings: of both products, in place of the table's.
    """
    num_local, first = len(experts.gate_up), experts.first
    if not ids.numel() or not num_local:
        return torch.zeros_like(x)
    if tilings is None:
        memory = shared_memory_bytes(x.device)
        tilings = choose_tilings(ids.numel(), experts.total, x.element_size(), memory)
    is_unsorted = ids.numel() <= UNSORTED_PAIRS
    order = None if is_unsorted else sort_by_expert_triton(ids, first, num_local, tilings[0].rows)
    hidden = gated_product(x, experts.gate_up, experts.gate_up_bias, ids, first, order, experts.activation, tilings[0])
    # A slice of an expert elsewhere would have to be filled with zeros.
    in_slices = in_slices and num_local == experts.total and len(x) <= SLICED_TOKENS
    out = weighted_product(hidden, experts.down, experts.down_bias, weights, ids, first, order, in_slices, tilings[1])
    return out if in_slices else sum_choices_triton(out, ids, first, num_local)
