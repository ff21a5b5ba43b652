"""Llama (Touvron et al., 2023, arXiv:2302.13971; Grattafiori et al., 2024, arXiv:2407.21783)."""

from typing import Any

from nanovllm.models.blocks import CausalLM, LayerSpec


class LlamaForCausalLM(CausalLM):
    model_type = "llama"
    known_as = "Llama 2 and 3, SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama"
    features = "RoPE of type llama3, biases"
    default_config = {
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        bias = config.attention_bias
        return LayerSpec(qkv_bias=bias, o_bias=bias, mlp_bias=config.mlp_bias, activation=config.hidden_act)
