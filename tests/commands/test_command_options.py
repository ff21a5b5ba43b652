"""Every option of the engine and of a request reaches it from the command line, under its own name and under vLLM's."""

import json
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from nanovllm.commands.options import EngineCommand, descriptions, engine_options, sampling_options, take_vllm_words
from nanovllm.config import Config
from nanovllm.sampling_params import SamplingParams
from nanovllm.vllm_defaults import ENGINE_OPTIONS

app = typer.Typer()
received: list[tuple[Any, Any, dict[str, Any], dict[str, Any]]] = []


@app.command(cls=EngineCommand)
@engine_options
@sampling_options(max_tokens=77)
def command(model: str | None = None, revision: int = 5, *, engine: dict[str, Any], sampling: dict[str, Any]) -> None:
    received.append((model, revision, engine, sampling))


def parse(*args: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    received.clear()
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    return received[0]


def refusal(*args: str) -> str:
    result = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, args)
    assert result.exit_code == 2
    return " ".join(result.output.split())


OPTIONS = {f.name: f.type for cls in (SamplingParams, Config) for f in fields(cls)}
OPTIONS = {name: kind for name, kind in OPTIONS.items() if name not in ("model", "revision", "output_kind")}
TEXTS = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values that a command line can spell. None is spelled by leaving the option out."""
    if get_origin(kind) in (Union, UnionType):
        kinds = [k for k in get_args(kind) if k is not type(None)]
        kind = next((k for k in kinds if get_origin(k) is list), kinds[0])
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is list:
        element = get_args(kind)[0]
        return st.lists(TEXTS if element is Any else values_of(element), min_size=1, max_size=3)
    if get_origin(kind) is dict or is_dataclass(kind):
        return st.dictionaries(TEXTS, st.integers() | TEXTS, max_size=3)
    simple = {bool: st.booleans(), int: st.integers(), str: TEXTS, float: st.floats(allow_nan=False)}
    return simple[kind]


def spelled(name: str, value: Any, underscores: bool) -> list[str]:
    flag = f"--{name}" if underscores else f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, dict):
        return [f"{flag}={json.dumps(value)}"]
    if isinstance(value, list):
        return [arg for item in value for arg in (flag, str(item))]
    return [f"{flag}={value}"]


@given(data=st.data(), names=st.sets(st.sampled_from(sorted(OPTIONS))), underscores=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_options_arrive_as_they_were_given(data: st.DataObject, names: set[str], underscores: bool) -> None:
    values = {name: data.draw(values_of(OPTIONS[name]), label=name) for name in sorted(names)}
    args = [arg for name, value in values.items() for arg in spelled(name, value, underscores)]
    _, _, engine, sampling = parse(*args)
    of_requests = {f.name for f in fields(SamplingParams)}
    assert sampling == {name: value for name, value in values.items() if name in of_requests}
    assert engine == {n: v for n, v in values.items() if n not in of_requests}


def test_an_option_arrives_though_its_value_is_the_default() -> None:
    defaults = {f.name: f.default for f in fields(Config)}
    args = ["--max-num-seqs", str(defaults["max_num_seqs"]), "--enable-prefix-caching"]
    assert defaults["enable_prefix_caching"] is True
    assert parse(*args)[2] == {"max_num_seqs": defaults["max_num_seqs"], "enable_prefix_caching": True}


@pytest.mark.parametrize("cls", [Config, SamplingParams])
def test_every_field_has_a_line_in_the_help(cls: type) -> None:
    assert descriptions(cls).keys() == {f.name for f in fields(cls)}


def test_help_tells_the_defaults() -> None:
    output = CliRunner(env={"COLUMNS": "2000", "TERM": "dumb"}).invoke(app, ["--help"]).output
    assert "Default: 77." in output and "[default: 16384]" in output and "vLLM's name: --block-size." in output


def test_a_parameter_of_the_command_takes_the_place_of_an_option() -> None:
    assert parse("--revision", "7", "--seed", "3") == (None, 7, {}, {"seed": 3})


def test_vllm_s_other_names_are_those_of_our_options() -> None:
    args = ("--block-size", "16", "--num-gpu-blocks-override=7", "--kv_cache_memory_bytes", "9", "-tp", "2")
    engine = {"kvcache_block_size": 16, "num_kvcache_blocks": 7, "kvcache_memory_bytes": 9, "tensor_parallel_size": 2}
    assert parse(*args) == (None, 5, engine, {})


def test_vllm_s_options_that_ask_for_nothing_are_dropped() -> None:
    args = (
        "--swap-space 4 --disable-log-requests --enable-chunked-prefill --no-enable-lora -pp 1 --cuda_graph_sizes=[1]"
    )
    assert parse(*args.split(), "--async-scheduling", "--max-num-seqs", "3") == (None, 5, {"max_num_seqs": 3}, {})


def test_every_option_of_vllm_is_read_from_the_command_line() -> None:
    """With a value behind `=`, which no switch needs."""
    args = [f"--{name.replace('_', '-')}=[1]" for name in ENGINE_OPTIONS]
    assert take_vllm_words(["a", *args, "b"], set()) == (["a", "b"], dict.fromkeys(ENGINE_OPTIONS, [1]))


def test_switch_of_vllm_takes_no_argument_with_it() -> None:
    args = ["--disable-log-stats", "model", "--", "--swap-space"]
    assert take_vllm_words(args, set()) == (["model", "--", "--swap-space"], {"disable_log_stats": True})


def test_option_of_vllm_that_is_the_command_s_own_stays() -> None:
    assert take_vllm_words(["-dp", "2", "--swap_space", "4"], {"-dp", "--swap-space"}) == (
        ["-dp", "2", "--swap-space", "4"],
        {},
    )


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--quantization", "awq"), "quantization='awq' must be None: weights are not quantized"),
        (("--no-enable-chunked-prefill",), "enable_chunked_prefill=False must be None or True"),
        (("--pipeline-parallel-size", "2"), "pipeline_parallel_size=2 must be None or 1"),
        (("--hf-overrides", "[1]"), "must be a JSON object"),
        (("--hf-overrides", "{1"), "must be a JSON object"),
        (("--max-num-seqs", "many"), "--max-num-seqs"),
        (("--nonsense",), "No such option: --nonsense"),
        (("--max-num-seq", "1"), "No such option: --max-num-seq"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(args: tuple[str, ...], why: str) -> None:
    assert why in refusal(*args)
