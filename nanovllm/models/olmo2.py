"""OLMo 2 (Team OLMo, 2025, arXiv:2501.00656): norms after attention and MLP, and on all query and all key heads."""

from typing import Any

from nanovllm.models.blocks import CausalLM, LayerSpec
from nanovllm.models.layer_types import every, rope_by_layer_type
from nanovllm.models.norm_placements import PostNormLayer


class Olmo2ForCausalLM(CausalLM):
    model_type = "olmo2"
    known_as = "OLMo 2 1B to 32B"
    features = "norms after attention and MLP, and over all query and all key heads"
    default_config = {
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        bias = config.attention_bias
        return LayerSpec(layer=PostNormLayer, head_norm="all", qkv_bias=bias, o_bias=bias, activation=config.hidden_act)


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    """Sliding windows in three layers of four, which have RoPE settings of their own."""

    model_type = "olmo3"
    known_as = "OLMo 3 7B and 32B"
    features = "as OLMo 2, with sliding windows in three layers of four"
    has_rope_by_layer_type = True
    default_config = {
        **Olmo2ForCausalLM.default_config,
        "sliding_window": 4096,
        "layer_types": None,
        "rope_theta": 500000.0,
    }

    @classmethod
    def complete(cls, config: Any) -> None:
        config.layer_types = config.layer_types or every(4, config.num_hidden_layers)
        rope_by_layer_type(config, None, 500000.0)
