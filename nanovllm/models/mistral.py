"""Mistral (Jiang et al., 2023, arXiv:2310.06825): Llama's layer, where a sliding window may cover every layer."""

from typing import Any

from nanovllm.models.blocks import CausalLM, LayerSpec
from nanovllm.models.layer_types import same_everywhere


class MistralForCausalLM(CausalLM):
    model_type = "mistral"
    known_as = "Mistral 7B, Nemo, Small 24B"
    features = "sliding window"
    default_config = {
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    }

    @classmethod
    def complete(cls, config: Any) -> None:
        config.layer_types = same_everywhere(config)  # transformers passes the key over

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        return LayerSpec(activation=config.hidden_act)


class MinistralForCausalLM(MistralForCausalLM):
    """Windows in some layers, full attention in others."""

    model_type = "ministral"
    known_as = "Ministral 8B"
    features = "sliding windows in some layers"
    default_config = {**MistralForCausalLM.default_config, "layer_types": None}

    @classmethod
    def complete(cls, config: Any) -> None:
        config.layer_types = config.layer_types or same_everywhere(config)
