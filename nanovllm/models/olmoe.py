"""OLMoE (Muennighoff et al., 2024, arXiv:2409.02060): 64 experts, and norms on all query and all key heads."""

from typing import Any

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.moe import SparseMoE
from nanovllm.models.blocks import CausalLM, LayerSpec


class OlmoeForCausalLM(CausalLM):
    model_type = "olmoe"
    known_as = "OLMoE 1B-7B"
    features = "routed experts, norm over all query and all key heads"
    activations = ("silu",)
    also_called = {"num_experts": "num_local_experts"}
    default_config = {
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    }

    @classmethod
    def complete(cls, config: Any) -> None:
        super().complete(config)
        if getattr(config, "clip_qkv", None) is not None:
            raise ValueError(f"clip_qkv={config.clip_qkv!r:.80} is not supported: must be null")

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        bias = config.attention_bias
        return LayerSpec(head_norm="all", qkv_bias=bias, o_bias=bias, mlp=_experts)


def _experts(config: Any, tp: TensorParallel) -> SparseMoE:
    sizes = (config.hidden_size, config.intermediate_size, config.num_experts, config.num_experts_per_tok)
    return SparseMoE(*sizes, tp, renormalize=config.norm_topk_prob)
