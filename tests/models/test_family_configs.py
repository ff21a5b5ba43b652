"""A config.json that leaves keys out means what transformers' config class makes of it, for every family."""

import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, model_config
from transformers import AutoConfig

from nanovllm.layers.rotary_embedding import build_cos_sin, rope_parameters
from nanovllm.models import ARCHITECTURES, model_class
from nanovllm.models.checkpoint_config import ACTIVATIONS, load_hf_config
from nanovllm.models.layer_types import FULL, SLIDING

ALWAYS = {"architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
ALWAYS |= {"num_attention_heads", "num_key_value_heads", "head_dim"}  # else heads and hidden size may not fit


def both_configs(path: Path, content: dict[str, Any]) -> tuple[Any, Any]:
    (path / "config.json").write_text(json.dumps(content))
    return load_hf_config(path)[0], AutoConfig.from_pretrained(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_left_out_have_transformers_defaults(name: str, tmp_path: Path) -> None:
    architecture, _ = CONFIGS[name]
    content = {**model_config(name).to_dict(), "architectures": [f"{architecture}ForCausalLM"]}
    cls = model_class(content["architectures"])
    for seed in range(25):
        draw = random.Random(seed)
        kept = {key: value for key, value in content.items() if key in ALWAYS or draw.random() < 0.5}
        if SLIDING in (kept.get("layer_types") or []):
            kept["sliding_window"] = content["sliding_window"]
            kept["use_sliding_window"] = content.get("use_sliding_window", True)
        if len(kept.get("no_rope_layers") or []) or "no_rope_layers" in kept:
            kept["layer_types"] = content["layer_types"]
            kept["sliding_window"] = content["sliding_window"]
        kept.pop("original_max_position_embeddings", None)
        if "original_max_position_embeddings" in content:
            kept["original_max_position_embeddings"] = content["original_max_position_embeddings"]
        ours, theirs = both_configs(tmp_path, kept)
        for key in cls.default_config:
            if key in ("rope_theta", "hidden_activation", "layer_types", "sliding_window_pattern", "head_dim"):
                continue  # normalized below
            if hasattr(theirs, key) and key not in ("partial_rotary_factor", "mlp_only_layers", "hidden_act"):
                assert getattr(ours, key) == getattr(theirs, key), (key, kept)
        act = getattr(theirs, "hidden_activation", None) or theirs.hidden_act
        assert ours.hidden_act == ACTIVATIONS[act]
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
        if getattr(theirs, "layer_types", None) is not None:
            assert ours.layer_types == theirs.layer_types, kept
        else:
            window = getattr(theirs, "sliding_window", None) if "sliding_window" in cls.default_config else None
            assert ours.layer_types == [FULL if window is None else SLIDING] * theirs.num_hidden_layers
        check_rotations(ours, theirs)


def check_rotations(ours: Any, theirs: Any) -> None:
    """The tables of rotations are those of transformers' rotary embedding."""
    family = theirs.model_type.removesuffix("_text")
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    (name,) = (name for name in vars(module) if name.endswith("RotaryEmbedding"))
    embedding = getattr(module, name)(theirs)
    for layer_type in set(ours.layer_types):
        params = rope_parameters(ours, layer_type)
        longest = theirs.max_position_embeddings if params["rope_type"] == "longrope" else 64
        table = build_cos_sin(ours.rotary_dim, longest, params)
        args = (layer_type,) if ours.has_rope_by_layer_type else ()
        cos, sin = embedding(torch.zeros(1), torch.arange(longest)[None], *args)
        half = ours.rotary_dim // 2
        torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=1e-5, atol=5e-5)
        torch.testing.assert_close(table[:, half:], sin[0, :, :half], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_says_what_it_is(architecture: str) -> None:
    cls = model_class([architecture])
    assert cls.known_as and cls.features and cls.model_type
