"""Ministral 3 (Mistral AI, 2025): Mistral's layer, whose queries grow with their positions; RoPE of type yarn."""

from typing import Any

from nanovllm.layers.rotary_embedding import rope_parameters
from nanovllm.models.blocks import LayerSpec
from nanovllm.models.mistral import MistralForCausalLM

ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


class Ministral3ForCausalLM(MistralForCausalLM):
    model_type = "ministral3"
    known_as = "Ministral 3 3B to 14B (bf16)"
    features = "queries that grow with the position, RoPE of type yarn"
    default_config = {
        **MistralForCausalLM.default_config,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }

    @classmethod
    def complete(cls, config: Any) -> None:
        super().complete(config)
        if config.rope_parameters is None and not config.rope_scaling:
            config.rope_parameters = dict(ROPE)
        params = rope_parameters(config)
        beta = params.get("llama_4_scaling_beta")
        if beta is None:
            config.query_growth = None
            return
        if not isinstance(beta, int | float) or isinstance(beta, bool):
            raise ValueError(f"llama_4_scaling_beta={beta!r:.80} must be null or a number")
        if params["rope_type"] != "yarn":
            raise ValueError(f"llama_4_scaling_beta={beta} needs rope_type='yarn', not {params['rope_type']!r}")
        config.query_growth = beta, params["original_max_position_embeddings"]

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        return LayerSpec(activation=config.hidden_act, query_growth=config.query_growth)
