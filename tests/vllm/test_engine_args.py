"""`EngineArgs`, and vLLM's command line."""

import argparse
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from nanovllm.vllm.config import ProfilerConfig
from nanovllm.vllm.utils.argparse_utils import FlexibleArgumentParser

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.vllm import AsyncEngineArgs, EngineArgs


def config(model: str, **options: Any) -> Config:
    return Config.from_options(model, options)


def parse(*args: str, **defaults: Any) -> argparse.Namespace:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.set_defaults(**defaults)
    parser.add_argument("--max-tokens", type=int)
    return parser.parse_args(list(args))


@pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])
def test_every_option_at_its_default_is_taken(cls: type) -> None:
    args = cls(model="m")
    assert is_dataclass(cls)
    for options in (asdict(args), vars(args), args.given()):
        assert config(**options) == Config(model="m")
    with pytest.raises(TypeError, match="no_such_option"):
        cls(model="m", no_such_option=1)


def test_the_command_line_gives_the_options() -> None:
    args = vars(
        parse("--model=m", "--max-model-len", "64", "--dtype=half", "--enforce-eager", "-tp=2", "--max-tokens=3")
    )
    assert args.pop("max_tokens") == 3
    assert config(**args) == Config(
        model="m", max_model_len=64, dtype="float16", enforce_eager=True, tensor_parallel_size=2
    )


def test_underscores_and_json_and_no_are_taken() -> None:
    args = parse(
        "--max_model_len=64", "--hf-overrides", '{"a": 1}', "--no-enable-prefix-caching", "--kv_cache_memory_bytes", "5"
    )
    engine_args = EngineArgs.from_cli_args(args)
    assert engine_args.given() == {
        "model": "Qwen/Qwen3-0.6B",
        "max_model_len": 64,
        "hf_overrides": {"a": 1},
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 5,
    }


def test_what_is_passed_over_needs_no_value() -> None:
    args = parse("--model=m", "--disable-log-stats", "--async-scheduling", "--enable-sleep-mode", "--swap-space", "4")
    assert config(**EngineArgs.from_cli_args(args).given()) == Config(model="m")


def test_a_value_with_an_underscore_stays_as_it_is() -> None:
    assert parse("--model", "my_model", "--revision=some_tag").model == "my_model"


def test_what_is_not_here_is_refused_when_an_engine_is_made() -> None:
    options = vars(parse("--model", "m", "--quantization", "fp8"))
    del options["max_tokens"]
    with pytest.raises(ValueError, match="quantization='fp8' must be None"):
        LLM(**options)


def test_an_llm_is_made_of_them(text_model: Path) -> None:
    args = EngineArgs(model=str(text_model), dtype="float32", block_size=16, num_gpu_blocks_override=8, seed=0)
    llm = LLM.from_engine_args(args)
    try:
        config = llm.llm_engine.vllm_config
        assert (config.cache_config.block_size, config.cache_config.num_gpu_blocks) == (16, 8)
        assert config.model_config.max_model_len == 128
        assert config.model_config.get_vocab_size() == config.model_config.hf_config.vocab_size == 257
        assert config.parallel_config.tensor_parallel_size == llm.get_world_size() == 1
        assert llm.llm_engine.get_tokenizer() is llm.get_tokenizer()
        assert len(llm.generate([65], SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].token_ids) == 2
    finally:
        llm.shutdown()


def test_a_trace_is_written_where_it_is_asked_for(
    text_model: Path, tmp_path: Path, make_llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(text_model, profiler_config=ProfilerConfig(profiler="torch", torch_profiler_dir=str(tmp_path / "t")))
    with pytest.raises(RuntimeError, match="without start_profile"):
        llm.stop_profile()
    llm.start_profile()
    with pytest.raises(RuntimeError, match="call stop_profile"):
        llm.start_profile()
    llm.generate([65], SamplingParams(max_tokens=2), use_tqdm=False)
    llm.stop_profile()
    (trace,) = (tmp_path / "t").iterdir()
    assert "aten::" in trace.read_text()
    with pytest.raises(ValueError, match="profiler_config=.*delay_iterations"):
        make_llm(text_model, profiler_config={"torch_profiler_dir": "t", "delay_iterations": 3}).start_profile()
    with pytest.raises(TypeError, match="profiler_config=3 must be a dict"):
        Config(model="m", profiler_config=3)
