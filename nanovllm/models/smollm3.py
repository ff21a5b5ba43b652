"""SmolLM3 (Hugging Face, 2025): Llama's layer, often without positions (Yang et al., arXiv:2501.18795)."""

from typing import Any

from nanovllm.models.blocks import CausalLM, LayerSpec
from nanovllm.models.layer_types import FULL, SLIDING


class SmolLM3ForCausalLM(CausalLM):
    model_type = "smollm3"
    known_as = "SmolLM3 3B"
    features = "layers without positions"
    default_config = {
        "num_key_value_heads": 4,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    }

    @classmethod
    def complete(cls, config: Any) -> None:
        num_layers = config.num_hidden_layers
        if config.no_rope_layers is None:
            interval = config.no_rope_layer_interval
            config.no_rope_layers = [int((index + 1) % interval != 0) for index in range(num_layers)]
        if len(config.no_rope_layers) < num_layers:
            raise ValueError(f"no_rope_layers={config.no_rope_layers} must have num_hidden_layers={num_layers} entries")
        if config.layer_types is None:
            has_window = config.use_sliding_window and config.sliding_window is not None
            has_rope = config.no_rope_layers[:num_layers]
            config.layer_types = [SLIDING if has_window and not rope else FULL for rope in has_rope]

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        return LayerSpec(
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            has_rope=bool(config.no_rope_layers[index]),
            activation=config.hidden_act,
        )
