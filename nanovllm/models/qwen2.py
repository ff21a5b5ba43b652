"""Qwen2 and Qwen2.5 (Qwen Team, 2024, arXiv:2407.10671, arXiv:2412.15115): Llama's layer, with a bias on q, k and v."""

from typing import Any

from nanovllm.models.blocks import CausalLM, LayerSpec
from nanovllm.models.layer_types import use_window_if_asked


class Qwen2ForCausalLM(CausalLM):
    model_type = "qwen2"
    known_as = "Qwen2 and 2.5, QwQ, DeepSeek-R1-Distill-Qwen"
    features = "bias on q, k, v; sliding windows from a layer on"
    default_config = {
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
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
        return LayerSpec(qkv_bias=True, activation=config.hidden_act)
