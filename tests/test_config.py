"""Options are validated before anything is loaded."""

from typing import Any

import pytest

from nanovllm.config import Config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int8"),
        ("dtype", None),
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
        ("max_num_seqs", None),
        ("max_num_seqs", True),
        ("kvcache_block_size", 16.0),
        ("num_kvcache_blocks", "all"),
        ("enable_prefix_caching", 1),
        ("enforce_eager", "yes"),
        ("trust_remote_code", None),
        ("skip_tokenizer_init", 0),
        ("tokenizer", 3),
        ("revision", 3),
        ("generation_config", None),
        ("generation_config", {"temperature": 0.5}),
        ("override_generation_config", "vllm"),
        ("seed", 1.5),
        ("seed", True),
    ],
)
def test_value_of_the_wrong_type_is_a_type_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}=.*must be"):
        Config(model="m", **{name: value})


def test_share_of_memory_of_the_wrong_type_is_refused_by_name() -> None:
    for value in ("0.9", None, True):
        with pytest.raises((TypeError, ValueError), match="gpu_memory_utilization=.*must be"):
            Config(model="m", gpu_memory_utilization=value)


@pytest.mark.parametrize("model", [None, "", 3, ["m"]])
def test_model_must_be_a_name(model: Any) -> None:
    with pytest.raises(TypeError, match="model=.*must be"):
        Config(model=model)


def test_unknown_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="'gpu_memory_utilisation'; did you mean 'gpu_memory_utilization'"):
        Config.from_options("m", {"gpu_memory_utilisation": 0.5})
    with pytest.raises(TypeError, match="'zzz'; the options are .*max_num_seqs"):
        Config.from_options("m", {"zzz": 1})


def test_defaults_are_those_documented() -> None:
    config = Config.from_options("m", {})
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.gpu_memory_utilization) == (512, 16384, 0.9)
    assert config.enable_prefix_caching and not config.enforce_eager
    assert (config.dtype, config.device, config.load_format, config.tensor_parallel_size) == ("auto", "auto", "auto", 1)


def test_all_blocks_sizes_that_are_multiples_of_16_are_taken() -> None:
    for size in (16, 48, 256):
        assert Config(model="m", kvcache_block_size=size).kvcache_block_size == size
