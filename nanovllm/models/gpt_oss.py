"""gpt-oss (OpenAI, 2025, arXiv:2508.10925), in 16 bits: experts with biases, attention sinks, windows."""

from typing import Any

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.moe import MERGED, SparseMoE
from nanovllm.models.blocks import CausalLM, LayerSpec
from nanovllm.models.layer_types import every

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOssForCausalLM(CausalLM):
    model_type = "gpt_oss"
    known_as = "gpt-oss 20B and 120B (bf16)"
    features = "routed experts with biases, attention sinks, sliding windows"
    also_called = {"num_local_experts": "num_experts"}
    default_config = {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    }

    @classmethod
    def complete(cls, config: Any) -> None:
        config.layer_types = config.layer_types or every(2, config.num_hidden_layers)
        if config.rope_parameters is None and not config.rope_scaling:
            config.rope_parameters = dict(ROPE)

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        bias = config.attention_bias
        return LayerSpec(has_sinks=True, qkv_bias=bias, o_bias=bias, mlp=_experts)


def _experts(config: Any, tp: TensorParallel) -> SparseMoE:
    sizes = (config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok)
    return SparseMoE(*sizes, tp, router_name="router", names=MERGED, activation="clamped", bias=True)
