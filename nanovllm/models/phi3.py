"""Phi-3 and Phi-4 (Abdin et al., 2024, arXiv:2404.14219, arXiv:2412.08905): Llama's layer, fused on disk."""

from typing import Any

from nanovllm.models.blocks import CausalLM, LayerSpec
from nanovllm.models.layer_types import same_everywhere


class Phi3ForCausalLM(CausalLM):
    model_type = "phi3"
    known_as = "Phi-3, 3.5 and 4, mini to medium"
    features = "fused weights, partial rotation, longrope, sliding window"
    packed_modules = {}  # qkv_proj and gate_up_proj are the checkpoint's names too
    default_config = {
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "partial_rotary_factor": None,
    }

    @classmethod
    def complete(cls, config: Any) -> None:
        config.layer_types = same_everywhere(config)
        params = dict(config.rope_scaling or config.rope_parameters or {})
        config.rope_parameters, config.rope_scaling = params, None
        if params.get("rope_type", params.get("type")) in ("su", "yarn"):  # its names in older checkpoints
            params["rope_type"] = "longrope"
        factor = params.pop("partial_rotary_factor", config.partial_rotary_factor)
        factor = 1.0 if factor is None else factor
        if not isinstance(factor, int | float) or not 0 < factor <= 1:
            raise ValueError(f"partial_rotary_factor={factor!r:.80} must be a number > 0 and at most 1")
        config.rotary_dim = int(config.head_dim * factor)
        config.partial_rotary_factor = None
        rope_type = params.get("rope_type", params.get("type", "default"))
        if rope_type not in ("default", "longrope"):
            raise ValueError(f"rope_type={rope_type!r:.80} must be 'default' or 'longrope'")
        counts = [len(params.get(key) or ()) for key in ("short_factor", "long_factor")]
        if rope_type == "longrope" and counts != [config.rotary_dim // 2] * 2:
            raise ValueError(f"rope_type='longrope' has {counts} factors: must be {config.rotary_dim // 2} of each")

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        return LayerSpec(activation=config.hidden_act)
