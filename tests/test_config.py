"""Options are validated before anything is loaded."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.config import Config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int8"),
        ("device", "tpu"),
        ("load_format", "gguf"),
        ("max_model_len", 0),
        ("max_num_seqs", 0),
        ("max_num_seqs", -3),
        ("max_num_batched_tokens", 0),
        ("kvcache_block_size", 0),
        ("kvcache_block_size", 17),
        ("kvcache_block_size", -16),
        ("num_kvcache_blocks", 0),
        ("kvcache_memory_bytes", 0),
        ("gpu_memory_utilization", 1.5),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", float("nan")),
        ("tensor_parallel_timeout", 0.0),
        ("tensor_parallel_timeout", "30"),
        ("tensor_parallel_size", 0),
        ("max_logprobs", -2),
        ("dtype", "torch.float16"),
        ("device", "cuda:1"),
    ],
)
def test_value_that_is_not_allowed_is_a_value_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*must be"):
        Config(model="m", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", 1.5),
        ("max_model_len", "4096"),
        ("max_num_seqs", True),
        ("kvcache_block_size", 16.0),
        ("num_kvcache_blocks", "all"),
        ("enable_prefix_caching", 1),
        ("enforce_eager", "yes"),
        ("skip_tokenizer_init", 0),
        ("tokenizer", 3),
        ("revision", 3),
        ("generation_config", {"temperature": 0.5}),
        ("override_generation_config", "vllm"),
        ("seed", 1.5),
        ("seed", True),
        ("max_logprobs", 1.0),
        ("max_logprobs", True),
        ("max_model_len", -1.0),
        ("tokenizer", b"t"),
    ],
)
def test_value_of_the_wrong_type_is_a_type_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}=.*must be"):
        Config(model="m", **{name: value})


def test_share_of_memory_of_the_wrong_type_is_refused_by_name() -> None:
    for value in ("0.9", True):
        with pytest.raises((TypeError, ValueError), match="gpu_memory_utilization=.*must be"):
            Config(model="m", gpu_memory_utilization=value)


@pytest.mark.parametrize("model", [None, "", 3, ["m"]])
def test_model_must_be_a_name(model: Any) -> None:
    with pytest.raises(TypeError, match="model=.*must be"):
        Config(model=model)


def test_unknown_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="'gpu_memory_utilisation'; did you mean 'gpu_memory_utilization'"):
        Config.from_options("m", {"gpu_memory_utilisation": 0.5})
    with pytest.raises(TypeError, match="'zzz'; it has .*max_num_seqs"):
        Config.from_options("m", {"zzz": 1})


@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.name != "model"])
def test_none_is_the_default_of_every_option(name: str) -> None:
    assert Config(model="m", **{name: None}) == Config.from_options("m", {name: None}) == Config(model="m")


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("dtype", "half", "float16"),
        ("dtype", "float", "float32"),
        ("dtype", torch.half, "float16"),
        ("dtype", torch.bfloat16, "bfloat16"),
        ("device", torch.device("cpu"), "cpu"),
        ("max_model_len", -1, None),
        ("num_kvcache_blocks", -1, None),
        ("gpu_memory_utilization", 1, 1.0),
        ("load_format", "safetensors", "safetensors"),
        ("tokenizer", Path("some/where"), "some/where"),
        ("max_logprobs", 0, 0),
    ],
)
def test_what_can_be_said_in_several_ways_is_one(name: str, value: Any, meant: Any) -> None:
    assert getattr(Config.from_options("m", {name: value}), name) == meant


def test_dtypes_that_are_not_served_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="dtype='float64' must be one of auto, bfloat16"):
        Config.from_options("m", {"dtype": torch.float64})


def test_a_path_is_a_model() -> None:
    assert Config(model=Path("/some/where")).model == "/some/where"


def test_vllms_names_are_ours_too() -> None:
    config = Config.from_options(
        "m", {"block_size": 32, "num_gpu_blocks_override": 9, "kv_cache_memory_bytes": 1 << 20}
    )
    assert (config.kvcache_block_size, config.num_kvcache_blocks, config.kvcache_memory_bytes) == (32, 9, 1 << 20)
    both = {"block_size": 32, "kvcache_block_size": 32, "num_gpu_blocks_override": None, "num_kvcache_blocks": 9}
    assert Config.from_options("m", both).num_kvcache_blocks == 9
    with pytest.raises(ValueError, match="block_size=32 and kvcache_block_size=16 are one option"):
        Config.from_options("m", {"block_size": 32, "kvcache_block_size": 16})
    with pytest.raises(ValueError, match="kvcache_block_size=17 must be a multiple of 16"):
        Config.from_options("m", {"block_size": 17})
    with pytest.raises(TypeError, match="'blocksize'; did you mean 'block_size'"):
        Config.from_options("m", {"blocksize": 16})


def test_defaults_are_those_documented() -> None:
    config = Config.from_options("m", {})
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.gpu_memory_utilization) == (512, 16384, 0.9)
    assert config.enable_prefix_caching and not config.enforce_eager
    assert (config.dtype, config.device, config.load_format, config.tensor_parallel_size) == ("auto", "auto", "auto", 1)


def test_all_blocks_sizes_that_are_multiples_of_16_are_taken() -> None:
    for size in (16, 48, 256):
        assert Config(model="m", kvcache_block_size=size).kvcache_block_size == size
