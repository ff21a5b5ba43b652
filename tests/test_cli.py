"""The command `nanovllm`: its help needs no torch, and what it cannot do it refuses in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nanovllm
from nanovllm.cli import app
from nanovllm.commands import bench
from nanovllm.models.__main__ import family_rows

ROOT = Path(nanovllm.__file__).parents[1]


def run(*args: str, stdin: str | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `nanovllm …` in this process."""
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, args, input=stdin)
    return result.exit_code, result.stdout, result.stderr


def test_help_of_a_real_process_is_the_manual_and_loads_no_framework() -> None:
    code = "import sys, atexit; atexit.register(lambda: print({'torch', 'transformers'} & set(sys.modules)));"
    code += "sys.argv = ['nanovllm', '--help']; import runpy; runpy.run_module('nanovllm', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.endswith("set()\n")
    for command in ("chat", "generate", "bench", "models"):
        assert f"nanovllm {command}" in done.stdout


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_help_of_a_command_has_the_options_of_engine_and_request(command: str) -> None:
    code, stdout, _ = run(command, "--help")
    assert code == 0
    for option in ("--max-model-len", "--tensor-parallel-size", "-tp", "--no-enable-prefix-caching", "--top-p"):
        assert option in stdout


def test_version_is_the_package_s() -> None:
    assert run("--version") == (0, f"nano-vLLM {nanovllm.__version__}\n", "")


def test_models_lists_every_family() -> None:
    code, stdout, _ = run("models")
    assert code == 0
    assert [line.split()[0] for line in stdout.splitlines()[1:]] == [architecture for architecture, *_ in family_rows()]


@pytest.mark.parametrize("args", [("--nonsense",), ("nonsense",), ("chat", "--nonsense", "1"), ("models", "-tp", "2")])
def test_unknown_command_or_option_is_refused(args: tuple[str, ...]) -> None:
    code, stdout, stderr = run(*args)
    assert code == 2 and not stdout and "No such" in stderr


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--max-num-seqs", "0"), "max_num_seqs=0 must be at least 1"),
        (("--gpu-memory-utilization", "2"), "gpu_memory_utilization=2.0 must be a number in (0, 1]"),
        (("--dtype", "int3"), "dtype='int3' must be one of auto, bfloat16, float16, float32"),
        (("--top-p", "0"), "top_p=0.0 must be a number in (0, 1]"),
        (("--kvcache-block-size", "17"), "kvcache_block_size=17 must be a multiple of 16"),
    ],
)
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_value_out_of_range_is_one_line_in_the_engine_s_words(command: str, args: tuple[str, ...], why: str) -> None:
    assert run(command, "/nowhere", *args, stdin="Hi\n") == (2, "", f"nanovllm: {why}\n")


def test_model_that_is_not_there_is_one_line() -> None:
    code, stdout, stderr = run("chat", "/nowhere")
    assert code == 2 and not stdout and stderr == "nanovllm: model='/nowhere' is not a directory\n"


def test_bench_hands_on_to_the_repository_s_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    handed_on = []
    monkeypatch.setattr(os, "execv", lambda *args: handed_on.append(args))
    assert run("bench", "--streams", "1,8", "--help", "-x")[0] == 0
    assert handed_on == [(sys.executable, [sys.executable, str(ROOT / "bench.py"), "--streams", "1,8", "--help", "-x"])]


def test_bench_without_the_repository_says_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "BENCH", tmp_path / "bench.py")
    code, stdout, stderr = run("bench")
    assert code == 2 and not stdout and "clone the repository" in stderr
