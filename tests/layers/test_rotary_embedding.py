"""Every rope type against transformers' own rotary module, in both spellings of a config."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import MAX_POSITIONS, ROPE, TINY
from transformers import AutoConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from nanovllm.layers.rotary_embedding import build_cos_sin, rope_parameters

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


def test_unknown_type_is_refused_with_those_there_are() -> None:
    params = {"rope_type": "spiral", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match="rope_type='spiral' must be one of default, linear, dynamic, yarn, llama3"):
        build_cos_sin(16, 64, params)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
def test_missing_setting_is_named(rope_type: str) -> None:
    params = {"rope_type": rope_type, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match=f"rope_type='{rope_type}' needs the setting '(factor|low_freq_factor)'"):
        build_cos_sin(16, 64, params)
