"""Every rope type against transformers' own rotary module, in both spellings of a config."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import MAX_POSITIONS, ROPE, TINY
from transformers import AutoConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from nanovllm.layers.rotary_embedding import build_cos_sin, rope_parameters
from nanovllm.models.checkpoint_config import load_hf_config

CASES: dict[str, dict[str, Any]] = {
    **ROPE,
    "yarn with its knobs": {
        **ROPE["yarn"],
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
    },
    "yarn with mscale": {**ROPE["yarn"], "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn not truncated": {**ROPE["yarn"], "truncate": False},
}


def reference_cos_sin(config: Qwen3Config, num_positions: int) -> torch.Tensor:
    """transformers' rotation of each position: cosines, then sines, without the repetition of the second half."""
    rotary = Qwen3RotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(num_positions)[None])
    half = config.head_dim // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)


def max_error(angles: float) -> float:
    """The rounding of an angle in float32 is an error of its cosine."""
    return 4 * angles * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("head_dim", [16, 48, 128])
@pytest.mark.parametrize("name", CASES)
def test_rotation_equals_transformers(name: str, head_dim: int) -> None:
    config = Qwen3Config(**{**TINY, "head_dim": head_dim, "rope_parameters": CASES[name]})
    ours = build_cos_sin(head_dim, MAX_POSITIONS, rope_parameters(config))
    assert ours.shape == (MAX_POSITIONS, head_dim) and ours.dtype == torch.float32
    theirs = reference_cos_sin(config, MAX_POSITIONS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=max_error(MAX_POSITIONS))


@pytest.mark.parametrize("name", CASES)
def test_old_spelling_means_the_same(name: str, tmp_path: Path) -> None:
    params = dict(CASES[name])
    theta, rope_type = params.pop("rope_theta"), params.pop("rope_type")
    scaling = None if rope_type == "default" else {"type": rope_type, **params}
    plain = SimpleNamespace(rope_theta=theta, rope_scaling=scaling, max_position_embeddings=MAX_POSITIONS)
    old = {k: v for k, v in TINY.items() if k != "rope_parameters"}
    old |= {"model_type": "qwen3", "rope_theta": theta, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(old))
    loaded = AutoConfig.from_pretrained(tmp_path)
    new = build_cos_sin(16, MAX_POSITIONS, rope_parameters(Qwen3Config(**{**TINY, "rope_parameters": CASES[name]})))
    for config in (plain, loaded):
        torch.testing.assert_close(build_cos_sin(16, MAX_POSITIONS, rope_parameters(config)), new, rtol=0, atol=0)


def test_config_without_any_rope_setting_has_the_original_theta() -> None:
    config = SimpleNamespace(max_position_embeddings=64)
    params = rope_parameters(config)
    assert (params["rope_type"], params["rope_theta"]) == ("default", 10000.0)


def test_reading_the_parameters_leaves_the_config_alone() -> None:
    config = SimpleNamespace(max_position_embeddings=64, rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    rope_parameters(config)["factor"] = 2.0
    assert config.rope_parameters == {"rope_theta": 5.0, "rope_type": "default"}


def test_dynamic_rope_is_stretched_for_the_longest_context_admitted() -> None:
    config = Qwen3Config(**{**TINY, "head_dim": 16, "rope_parameters": ROPE["dynamic"]})
    longest = 2 * MAX_POSITIONS
    ours = build_cos_sin(16, longest, rope_parameters(config))
    torch.testing.assert_close(ours, reference_cos_sin(config, longest), rtol=0, atol=max_error(longest))


def rope_of(**keys: Any) -> dict[str, Any]:
    return rope_parameters(SimpleNamespace(max_position_embeddings=64, **keys))


def test_unknown_type_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="rope_type='spiral' must be one of default, linear, dynamic, yarn, llama3"):
        rope_of(rope_parameters={"rope_type": "spiral"})


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
def test_missing_setting_is_named(rope_type: str) -> None:
    with pytest.raises(ValueError, match=f"rope_type='{rope_type}' needs the setting 'factor'"):
        rope_of(rope_parameters={"rope_type": rope_type})


YARN = ROPE["yarn"]
LLAMA3 = ROPE["llama3"]
LINEAR = {"rope_type": "linear", "factor": 2.0}
# What a config.json may say, beside or in place of the tiny model's `rope_parameters`
SERVED: list[dict[str, Any]] = [
    {"rope_scaling": YARN},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 80}},  # no theta: the default
    {"rope_scaling": {"rope_type": "default"}, "rope_theta": 5e4},
    {"rope_scaling": LINEAR, "rope_theta": 5e4},
    {"rope_scaling": {}},
    {"rope_scaling": None},
    {"rope_theta": 5e4},
    {"rope_theta": 5e4, "rope_parameters": None},
    {"rope_theta": None},
    {"rope_theta": 5e4, "rope_parameters": {"rope_theta": 3e4, "rope_type": "default"}},
    {"rope_theta": 5e4, "rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": {}},
    {"rope_parameters": {"rope_theta": 50000}},
    {"rope_parameters": {"type": "linear", "factor": 2}},
    {"rope_parameters": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    {"rope_parameters": {"type": "default", **LINEAR}},
    {"rope_parameters": {**LINEAR, "factor": 0.5}},
    {"rope_parameters": {**LINEAR, "original_max_position_embeddings": 10}},
    {"rope_parameters": {"sliding_attention": {"rope_theta": 5e4}}},
    {"partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {**YARN, "partial_rotary_factor": 1.0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 20}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "original_max_position_embeddings": 20},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_parameters": {**YARN, "factor": None}},
    {"rope_parameters": YARN, "original_max_position_embeddings": 40},
    {"rope_parameters": {**YARN, "original_max_position_embeddings": 80.0}},
    {"rope_parameters": {**YARN, "original_max_position_embeddings": 5}},  # shorter than a turn of the fastest feature
    {"rope_parameters": {**YARN, "beta_fast": 1, "beta_slow": 32}},
    {"rope_parameters": {**YARN, "beta_fast": 0, "beta_slow": None}},
    {"rope_parameters": {**YARN, "attention_factor": 0}},
    {"rope_parameters": {**YARN, "attention_factor": -1.0}},
    {"rope_parameters": {**YARN, "mscale": 1, "mscale_all_dim": 0.5}},
    {"rope_parameters": {**YARN, "mscale": 0.7}},
    {"rope_parameters": {**YARN, "truncate": None}},
    {"rope_parameters": {**YARN, "factor": 0.5}},
    {"rope_parameters": {**YARN, "attn_factor": 2.0}},
    {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 40},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_theta": None, "rope_parameters": None}, "rope_theta=None"),
    ({"rope_theta": "50000", "rope_parameters": None}, "rope_theta='50000'"),
    ({"rope_parameters": {"rope_theta": None}}, "rope_theta=None"),
    ({"rope_parameters": {"rope_theta": True}}, "rope_theta=True"),
    ({"rope_parameters": {"rope_theta": -5.0}}, "rope_theta=-5.0"),
    ({"rope_parameters": {"rope_theta": 1.0, **LINEAR, "rope_type": "yarn"}}, "rope_theta=1.0"),
    ({"rope_parameters": {"rope_type": None}}, "rope_type=None"),
    ({"rope_parameters": {"type": None}}, "rope_type=None"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type="),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type='longrope'"),
    ({"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}}, "rope_type='proportional'"),
    ({"rope_parameters": "yarn"}, "rope_parameters='yarn'"),
    ({"rope_scaling": [1]}, "rope_scaling="),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e4, "rope_type": "default"}}}, "full_attention"),
    ({"rope_scaling": LINEAR, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"rope_parameters": {**YARN, "partial_rotary_factor": None}}, "partial_rotary_factor=None"),
    ({"rope_parameters": {**LINEAR, "factor": "2"}}, "factor='2'"),
    ({"rope_parameters": {**LINEAR, "factor": None}}, "factor=None"),
    ({"rope_parameters": {**LINEAR, "factor": 0}}, "factor=0"),
    ({"rope_parameters": {**LINEAR, "factor": float("inf")}}, "factor=inf"),
    ({"rope_parameters": {**YARN, "original_max_position_embeddings": None}}, "original_max_position_embeddings=None"),
    ({"rope_parameters": YARN, "original_max_position_embeddings": None}, "original_max_position_embeddings=None"),
    ({"rope_parameters": {**YARN, "original_max_position_embeddings": "80"}}, "original_max_position_embeddings='80'"),
    ({"rope_parameters": {**YARN, "beta_fast": "16"}}, "beta_fast='16'"),
    ({"rope_parameters": {**YARN, "beta_slow": -1}}, "beta_slow=-1"),
    ({"rope_parameters": {**YARN, "attention_factor": "1"}}, "attention_factor='1'"),
    ({"rope_parameters": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor=None"),
    ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor=4.0 must exceed low_freq_factor=4.0"),
]


def save_config(path: Path, change: dict[str, Any]) -> None:
    config = {**TINY, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **change}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", SERVED, ids=str)
def test_settings_beside_each_other_count_as_in_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    save_config(tmp_path, change)
    ours = build_cos_sin(16, MAX_POSITIONS, rope_parameters(load_hf_config(tmp_path)[0]))
    theirs = reference_cos_sin(AutoConfig.from_pretrained(tmp_path), MAX_POSITIONS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=max_error(MAX_POSITIONS))


@pytest.mark.parametrize(("change", "named"), REFUSED, ids=str)
def test_settings_that_cannot_be_met_are_refused_by_file_and_key(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    save_config(tmp_path, change)
    with pytest.raises(ValueError, match=rf"config\.json: .*{re.escape(named)}"):
        load_hf_config(tmp_path)
