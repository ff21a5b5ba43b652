"""A mixture of experts: a router chooses k of many small MLPs for each token (Shazeer et al., 2017, arXiv:1701.06538).

Ranks share the experts in one of two ways. By default each rank has its share of every expert's intermediate features,
as of a dense MLP. With `tp.whole_experts` (expert parallelism) each rank has some of the experts, whole. Both give a
*partial sum*, so the block costs one all-reduce, in `PartialSum`, either way. Every rank computes the whole routing,
from the same numbers in the same way. The weights that it gives the experts stay in float32; transformers rounds them
to the model's dtype, except in Mixtral.
"""

from collections.abc import Sequence

import torch
from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe.activation import Activation
from nanovllm.kernels.moe.experts import ExpertWeights
from nanovllm.kernels.moe.route import route
from nanovllm.layers.expert_formats import PackedExperts, PlainExperts
from nanovllm.layers.linear import Linear, PartialSum
from nanovllm.layers.shards import copy_share

QWEN_NAMES = ("gate_proj", "up_proj", "down_proj")  # OLMoE's too
MIXTRAL_NAMES = ("w1", "w3", "w2")
MERGED = ()  # gpt-oss: a tensor has all experts, transposed, with gates and ups in turn


class SparseMoE(nn.Module):
    """Router and experts, in place of a decoder layer's MLP.

    Args:
        k: experts of a token.
        renormalize: a token's weights sum to 1: always of Mixtral and gpt-oss; elsewhere `norm_topk_prob`.
        router_name: the checkpoint's name of the router, and here an attribute: "gate", or "router" of gpt-oss.
        names, activation, bias: see `Experts`; the router has a bias where they have.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        k: int,
        tp: TensorParallel,
        *,
        renormalize: bool = True,
        router_name: str = "gate",
        names: Sequence[str] = QWEN_NAMES,
        activation: Activation = "silu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < k <= num_experts:
            raise ValueError(f"num_experts_per_tok={k} must be in [1, {num_experts}], the number of experts")
        self.k, self.renormalize, self.router_name = k, renormalize, router_name
        setattr(self, router_name, Linear(hidden_size, num_experts, bias))
        self.experts = Experts(
            hidden_size, intermediate_size, num_experts, tp, names=names, activation=activation, bias=bias
        )

    def forward(self, x: torch.Tensor) -> PartialSum:
        """`x [tokens, hidden_size]` -> a partial sum of `[tokens, hidden_size]`."""
        scores = getattr(self, self.router_name)(x)  # [tokens, experts], in the model's dtype
        return self.experts(x, *route(scores, self.k, self.renormalize))


class Experts(nn.Module):
    """Equal MLPs, of which each token takes a few. `format` has the weights, plain or packed.

    Args:
        intermediate_size: of one expert.
        names: the checkpoint's names of an expert's gate, up and down; or `MERGED`.
        bias: both products add one.

    Attributes:
        gate_up: `[experts here, 2 * share, hidden_size]`, a gate's rows and then its up's.
        down: `[experts here, hidden_size, share]`.
        gate_up_bias, down_bias: `[experts here, 2 * share]` and `[experts here, hidden_size]`, or None.
        checkpoint_names: name within this module -> (parameter, (expert or None for all, part)).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        tp: TensorParallel,
        *,
        names: Sequence[str] = QWEN_NAMES,
        activation: Activation = "silu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.tp, self.num_experts, self.activation = tp, num_experts, activation
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        if tp.whole_experts:  # the first ranks have one more if they do not come out even
            each, more = divmod(num_experts, tp.size)
            self.num_local = each + (tp.rank < more)
            self.first_expert = tp.rank * each + min(tp.rank, more)
            self.share, self.cut_rank = intermediate_size, 0
        else:
            self.num_local, self.first_expert = num_experts, 0
            self.share, self.cut_rank = tp.padded_share(intermediate_size), tp.rank
        self.gate_up = _parameter(self.num_local, 2 * self.share, hidden_size)
        self.down = _parameter(self.num_local, hidden_size, self.share)
        self.gate_up_bias = _parameter(self.num_local, 2 * self.share) if bias else None
        self.down_bias = _parameter(self.num_local, hidden_size) if bias else None
        self.checkpoint_names = _checkpoint_names(names, num_experts, bias)
        self.format = PlainExperts()

    @property
    def own_down_bias(self) -> torch.Tensor | None:
        """The bias that this rank adds: one of the ranks that share an expert does."""
        return self.down_bias if self.tp.whole_experts or self.tp.rank == 0 else None

    @property
    def expert_weights(self) -> ExpertWeights:
        """All that a GPU's kernels need of this rank's experts."""
        biases = self.gate_up_bias, self.own_down_bias
        return ExpertWeights(self.gate_up, self.down, *biases, self.activation, self.first_expert, self.num_experts)

    def use_packed_format(self, dtype: torch.dtype) -> None:
        """Keep the weights as a CPU's product reads them fastest."""
        self.format = PackedExperts()

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> PartialSum:
        """The sum of each token's experts, weighted.

        Args:
            x: `[tokens, hidden_size]`.
            weights, ids: `[tokens, k]`, from `route`.
        """
        # Slices need a kernel that adds them up: NCCL and gloo have none.
        in_slices = self.tp.size == 1 or self.tp.is_one_shot(len(x), self.hidden_size, x.dtype)
        return PartialSum(self.format.compute(self, x, weights, ids, in_slices), x.dtype, self.tp)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: tuple[int | None, str]) -> None:
        """Copy this rank's share of the checkpoint's tensor into `param`; of another rank's expert, nothing.

        Raises ValueError on a wrong shape.
        """
        expert, part = shard
        if expert is None:
            self._load_merged(param, loaded, part)
            return
        whole = [self.hidden_size, self.intermediate_size]
        if list(loaded.shape) != (whole if part == "down" else whole[::-1]):
            raise ValueError(
                f"shape {list(loaded.shape)} where the model has {whole if part == 'down' else whole[::-1]}"
            )
        local = expert - self.first_expert
        if 0 <= local < self.num_local:
            self._copy_part(param[local], loaded, part)

    def _copy_part(self, param: torch.Tensor, loaded: torch.Tensor, part: str) -> None:
        """Copy one expert's gate or up, whose features are dimension 0 as of a bias, or its down, of dimension 1."""
        if part == "down":
            copy_share(param, loaded, 1, self.intermediate_size, self.cut_rank)
        else:
            own = param.narrow(0, self.share if part == "up" else 0, self.share)
            copy_share(own, loaded, 0, self.intermediate_size, self.cut_rank)

    def _load_merged(self, param: nn.Parameter, loaded: torch.Tensor, part: str) -> None:
        h, i = self.hidden_size, self.intermediate_size
        rest = {"gate_up": [h, 2 * i], "gate_up_bias": [2 * i], "down": [i, h], "down_bias": [h]}[part]
        whole = [self.num_experts, *rest]
        if list(loaded.shape) != whole:
            raise ValueError(f"shape {list(loaded.shape)} where the model has {whole}")
        for local in range(self.num_local):
            # One expert at a time, moved before it is transposed: a device does that faster.
            tensor, own = loaded[self.first_expert + local].to(param.device), param[local]
            if part == "down_bias":
                own.data.copy_(tensor)
            elif part == "down":
                self._copy_part(own, tensor.t(), part)
            else:  # the last dimension has gate 0, up 0, gate 1, up 1, …
                for offset, name in enumerate(("gate", "up")):
                    features = tensor[..., offset::2]
                    self._copy_part(own, features.t() if features.dim() == 2 else features, name)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def _checkpoint_names(
    names: Sequence[str], num_experts: int, bias: bool
) -> dict[str, tuple[str, tuple[int | None, str]]]:
    if not names:
        places = {"gate_up_proj": "gate_up", "down_proj": "down"}
        if bias:
            places |= {"gate_up_proj_bias": "gate_up_bias", "down_proj_bias": "down_bias"}
        return {name: (param, (None, param)) for name, param in places.items()}
    if bias:
        raise ValueError(f"{bias=} with names={tuple(names)}: only merged experts may have biases")
    gate, up, down = names
    places = {}
    for expert in range(num_experts):
        places[f"{expert}.{gate}.weight"] = ("gate_up", (expert, "gate"))
        places[f"{expert}.{up}.weight"] = ("gate_up", (expert, "up"))
        places[f"{expert}.{down}.weight"] = ("down", (expert, "down"))
    return places
