"""Gemma 3, text (Gemma Team, 2025, arXiv:2503.19786): Gemma 2's layer, with a norm on each head."""

from dataclasses import replace
from typing import Any

from nanovllm.models.blocks import LayerSpec
from nanovllm.models.gemma2 import Gemma2ForCausalLM
from nanovllm.models.layer_types import every, rope_by_layer_type


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    model_type = "gemma3_text"
    known_as = "Gemma 3 270M to 27B"
    features = "as Gemma 2 without caps, norm on each head, two RoPE bases"
    required_config = ()  # all have defaults, and the text part of a larger model's config relies on them
    has_rope_by_layer_type = True
    default_config = {
        **Gemma2ForCausalLM.default_config,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    }

    @classmethod
    def complete(cls, config: Any) -> None:
        config.layer_types = config.layer_types or every(config.sliding_window_pattern, config.num_hidden_layers)
        super().complete(config)
        rope_by_layer_type(config, "rope_local_base_freq", 10000.0)

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        return replace(super().layer_spec(config, index), head_norm="each", soft_cap=None)
