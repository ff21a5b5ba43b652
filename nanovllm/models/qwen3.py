"""Qwen3, dense (Qwen Team, 2025, arXiv:2505.09388): Llama's layer, with an RMSNorm on each query and key head."""

from typing import Any

from nanovllm.models.blocks import CausalLM, LayerSpec
from nanovllm.models.layer_types import use_window_if_asked


class Qwen3ForCausalLM(CausalLM):
    model_type = "qwen3"
    known_as = "Qwen3 0.6B to 32B"
    features = "norm on each query and key head; sliding windows from a layer on"
    required_config = (*CausalLM.required_config, "num_key_value_heads")
    default_config = {
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    }

    @classmethod
    def complete(cls, config: Any) -> None:
        use_window_if_asked(config)

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        bias = config.attention_bias
        return LayerSpec(head_norm="each", qkv_bias=bias, o_bias=bias, activation=config.hidden_act)
