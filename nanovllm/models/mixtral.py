"""Mixtral (Jiang et al., 2024, arXiv:2401.04088): Mistral's attention, and 8 experts of which a token takes 2."""

from typing import Any

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.moe import MIXTRAL_NAMES, SparseMoE
from nanovllm.models.blocks import LayerSpec
from nanovllm.models.mistral import MistralForCausalLM


class MixtralForCausalLM(MistralForCausalLM):
    model_type = "mixtral"
    known_as = "Mixtral 8x7B and 8x22B"
    features = "routed experts, sliding window"
    renamed = {"mlp": "block_sparse_moe"}
    activations = ("silu",)
    also_called = {"num_local_experts": "num_experts"}
    default_config = {
        **MistralForCausalLM.default_config,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        return LayerSpec(mlp=_experts)


def _experts(config: Any, tp: TensorParallel) -> SparseMoE:
    sizes = (config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok)
    return SparseMoE(*sizes, tp, names=MIXTRAL_NAMES)
