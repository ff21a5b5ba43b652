"""A config.json that leaves keys out means what transformers' config class makes of it, for every family."""

import json
import random
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, longrope, model_config
from transformers import AutoConfig

from nanovllm.config import Config
from nanovllm.layers.rotary_embedding import build_cos_sin, rope_parameters
from nanovllm.models import ARCHITECTURES, model_class
from nanovllm.models.checkpoint_config import ACTIVATIONS, load_hf_config
from nanovllm.models.layer_types import FULL, SLIDING
from nanovllm.text.tokenizer import load_tokenizer

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


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("phi3", {"rope_scaling": [1]}, "rope_scaling=[1] must be null or an object"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": -0.5}}, "partial_rotary_factor=-0.5"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0}}, "partial_rotary_factor=0"),
        ("phi3-long", {"original_max_position_embeddings": 1}, "original_max_position_embeddings of rope_type"),
        ("olmo3", {"rope_parameters": 5}, "rope_parameters=5 must be null or an object"),
        ("gemma3", {"rope_parameters": {FULL: 5}}, "rope_parameters has 'full_attention': 5"),
        ("gemma3", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_parameters has 'rope_type'"),
        ("gemma2", {"rope_parameters": {SLIDING: {"rope_theta": 7.0}}}, "as 'sliding_attention', are not supported"),
        ("gemma2", {"layer_types": []}, "layer_types=[] must be"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("mixtral", {"num_experts": None}, "num_local_experts=None must be an integer"),
        ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act='gelu_pytorch_tanh' must be one of silu, swish"),
        ("qwen3moe", {"num_local_experts": "7"}, "num_experts='7' must be an integer"),
        ("gptoss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config with quant_method='mxfp4'"),
        ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta=0.1 needs rope_type"),
        ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": "x"}}, "llama_4_scaling_beta='x' must be"),
    ],
    ids=str,
)
def test_what_a_family_does_not_allow_is_refused_by_key(
    name: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    content = {**model_config(name).to_dict(), "architectures": [f"{CONFIGS[name][0]}ForCausalLM"], **change}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(named)):
        load_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ministral3", {"rope_scaling": {}, "rope_parameters": None}),
        ("gptoss", {"rope_scaling": {}, "rope_parameters": None}),
        ("gemma3", {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_parameters": None}),
        ("gemma3", {"rope_scaling": {"factor": 8.0, "type": "linear"}, "rope_parameters": None}),  # passed over
        ("olmo3", {"rope_scaling": {"factor": 8.0, "rope_type": "yarn"}, "rope_parameters": None}),
        ("phi4-mini", {"rope_scaling": {**longrope(6), "type": "longrope"}, "partial_rotary_factor": 0.75}),
    ],
    ids=str,
)
def test_rotations_of_older_spellings_are_transformers(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    content = {**model_config(name).to_dict(), "architectures": [f"{CONFIGS[name][0]}ForCausalLM"], **change}
    check_rotations(*both_configs(tmp_path, {key: value for key, value in content.items() if value is not None}))


def test_queries_of_ministral_3_grow_as_its_rope_settings_say(tmp_path: Path) -> None:
    content = {**model_config("ministral3").to_dict(), "architectures": ["Ministral3ForCausalLM"]}
    ours, _ = both_configs(tmp_path, content)
    assert ours.query_growth == (0.8, 16)
    del content["rope_parameters"]
    ours, theirs = both_configs(tmp_path, content)
    settings = theirs.rope_parameters
    assert ours.query_growth == (settings["llama_4_scaling_beta"], settings["original_max_position_embeddings"])
    content["rope_parameters"] = {key: value for key, value in settings.items() if key != "llama_4_scaling_beta"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_hf_config(tmp_path)[0].query_growth is None


@pytest.mark.parametrize("name", ["llama-bias", "mistral", "gemma2", "qwen2"])
def test_a_folder_without_tokenizer_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content = {**model_config(name).to_dict(), "architectures": [f"{CONFIGS[name][0]}ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match=f"no tokenizer in {tmp_path}: give LLM a tokenizer="):
        load_tokenizer(Config(model=str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_says_what_it_is(architecture: str) -> None:
    cls = model_class([architecture])
    assert cls.known_as and cls.features and cls.model_type
