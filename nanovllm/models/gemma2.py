"""Gemma 2 (Gemma Team, 2024, arXiv:2408.00118): norms before and after, GeGLU, soft caps, windows."""

from math import sqrt
from typing import Any

from nanovllm.models.blocks import CausalLM, LayerSpec
from nanovllm.models.layer_types import every
from nanovllm.models.norm_placements import SandwichLayer


class Gemma2ForCausalLM(CausalLM):
    model_type = "gemma2"
    known_as = "Gemma 2 2B to 27B"
    features = "norms before and after, GeGLU, soft caps, sliding windows"
    default_config = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    }

    @classmethod
    def complete(cls, config: Any) -> None:
        config.hidden_act = config.hidden_activation
        config.layer_types = config.layer_types or every(2, config.num_hidden_layers)
        if getattr(config, "use_bidirectional_attention", None):
            raise ValueError("use_bidirectional_attention=true is not supported: attention here is causal")

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        return LayerSpec(
            layer=SandwichLayer,
            one_plus=True,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5,
            soft_cap=config.attn_logit_softcapping,
            activation=config.hidden_act,
        )

    @classmethod
    def soft_cap_of_logits(cls, config: Any) -> float | None:
        return config.final_logit_softcapping

    @classmethod
    def embedding_scale(cls, config: Any) -> float:
        return sqrt(config.hidden_size)
