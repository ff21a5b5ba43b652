"""`nanovllm generate` runs every line once, whatever interrupts it, and says of each bad line what is wrong with it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nanovllm import LLM, SamplingParams, demo_model
from nanovllm.cli import app
from nanovllm.commands.results_file import Line, ResultsFile

ROOT = Path(__file__).parents[2]
ENGINE = ("--device", "cpu", "--max-num-seqs", "4", "--num-kvcache-blocks", "40", "--max-model-len", "256")
GREEDY = ("--temperature", "0", "--max-tokens", "8")


def run(*args: str, stdin: str | bytes | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `nanovllm generate` with the demo model."""
    result = CliRunner().invoke(app, ["generate", demo_model(), *args, *ENGINE], input=stdin)
    return result.exit_code, result.stdout, result.stderr


def records(text: str | Path) -> list[dict[str, Any]]:
    """Records by index."""
    content = text.read_text() if isinstance(text, Path) else text
    return sorted(map(json.loads, content.splitlines()), key=lambda record: record["index"])


def texts(found: list[dict[str, Any]]) -> list[str]:
    return [record["choices"][0]["text"] for record in found]


def write_input(path: Path, num_lines: int, **more: Any) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"x = {i}\n", **more}) + "\n" for i in range(num_lines)))
    return path


def expected(prompts: list[str], **params: Any) -> list[str]:
    with LLM(demo_model(), device="cpu", max_model_len=256, max_num_seqs=4, num_kvcache_blocks=40) as llm:
        return [o["text"] for o in llm.generate(prompts, SamplingParams(**params), use_tqdm=False)]


def test_prompts_of_arguments_pipe_and_file_get_the_engine_s_answers(tmp_path: Path) -> None:
    prompts = ["import os\n".strip(), "def load(file):", "class Stack:"]
    answers = expected(prompts, temperature=0.0, max_tokens=8)
    code, stdout, _ = run(*prompts, *GREEDY)
    assert code == 0 and texts(records(stdout)) == answers
    code, stdout, _ = run(*GREEDY, stdin="\n".join(prompts))
    assert code == 0 and texts(records(stdout)) == answers
    lines = "".join(json.dumps({"prompt": prompt, "temperature": 0, "max_tokens": 8}) + "\n" for prompt in prompts)
    code, stdout, _ = run("--input", "-", stdin=lines)
    assert code == 0 and texts(records(stdout)) == answers


def test_a_line_or_the_command_line_may_hold_texts_to_a_form() -> None:
    lines = '{"prompt": "a"}\n{"prompt": "a", "structured_outputs": {"regex": "[0-9]{3}"}}\n'
    code, stdout, _ = run("--structured-outputs", '{"choice": ["yes", "no"]}', "--input", "-", stdin=lines)
    first, second = texts(records(stdout))
    assert code == 0 and first in ("yes", "no") and re.fullmatch("[0-9]{3}", second)


def test_bad_lines_have_errors_and_the_others_run(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "import os", "max_tokens": 3, "name": "first"}',
        "no json",
        json.dumps({"prompt": "x " * 400}),
        '{"prompt": ""}',
        '{"messages": [{"role": "user", "content": "Hi"}]}',
        '{"custom_id": "b", "body": {"prompt": "a", "temprature": 1}}',
        '{"prompt": [999999]}',
        '{"prompt": ["a", "b"]}',
        '{"prompt": "a", "temperature": "hot"}',
        '{"prompt": "half \\ud800"}',
        '{"prompt": "a", "n": 2, "max_tokens": 2, "logprobs": 1}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    code, _, stderr = run("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    found = records(tmp_path / "out.jsonl")
    assert code == 1 and "9 lines have errors" in stderr
    assert [record["index"] for record in found] == list(range(len(lines)))
    assert found[0]["input"] == {"name": "first"} and found[0]["usage"]["completion_tokens"] == 3
    assert len(found[10]["choices"]) == 2 and len(found[10]["choices"][0]["logprobs"]) == 2
    for index, why in enumerate(
        (
            "the line is no JSON",
            "prompt has .* tokens.*max_model_len=256",
            "prompt is empty",
            "chat template",
            "did you mean 'temperature'",
            "prompt has the token id 999999",
            "must be a string or a list of token ids",
            "temperature='hot' must be a finite number",
            "prompt",
        ),
        start=1,
    ):
        assert re.search(why, found[index]["error"]), (why, found[index])
    assert found[5]["custom_id"] == "b"


def test_a_seed_gives_equal_prompts_different_answers_which_a_second_run_draws_again() -> None:
    def drawn(*args: str) -> list[str]:
        return texts(records(run(*["def "] * 4, "--max-tokens", "8", *args)[1]))

    first = drawn("--seed", "5")
    assert len(set(first)) > 1 and drawn("--seed", "5") == first and drawn("--seed", "6") != first


def test_killed_run_goes_on_and_no_line_runs_twice(tmp_path: Path) -> None:
    file, output = write_input(tmp_path / "in.jsonl", 32, ignore_eos=True), tmp_path / "out.jsonl"
    args = ("--input", str(file), "--output", str(output), "--temperature", "0", "--max-tokens", "24")
    process = subprocess.Popen(
        [sys.executable, "-m", "nanovllm", "generate", demo_model(), *args, *ENGINE],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not output.exists() or output.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = output.read_bytes()
    num_before = before.count(b"\n")
    assert 5 <= num_before < 32
    output.write_bytes(before + b'{"index": 31, "ha')  # as if it had been killed while writing
    assert run(*args)[0] == 0
    after = output.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1]) and after.count(b"\n") == 32
    found = records(output)
    assert [record["index"] for record in found] == list(range(32))
    prompts = [f"x = {i}\n" for i in range(32)]
    assert texts(found) == expected(prompts, temperature=0.0, max_tokens=24, ignore_eos=True)
    assert run(*args)[0] == 0 and output.read_bytes() == after


def test_ctrl_c_leaves_what_is_finished_and_the_next_run_does_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = write_input(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    args = ("--input", str(file), "--output", str(output), *GREEDY)
    write = ResultsFile.write

    def write_and_interrupt(self: ResultsFile, *arguments: Any) -> None:
        write(self, *arguments)
        if output.read_bytes().count(b"\n") == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ResultsFile, "write", write_and_interrupt)
    code, _, stderr = run(*args)
    assert code == 130 and "Stopped." in stderr and len(records(output)) == 3
    monkeypatch.undo()
    assert run(*args)[0] == 0
    assert [record["index"] for record in records(output)] == list(range(20))


def test_a_changed_input_or_another_answer_to_it_is_refused(tmp_path: Path) -> None:
    file, output = write_input(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    args = ("--input", str(file), "--output", str(output))
    assert run(*args, *GREEDY)[0] == 0
    before = output.read_bytes()
    code, _, stderr = run(*args, *GREEDY, "--top-k", "3")
    assert code == 2 and "sampling parameters have changed" in stderr
    write_input(file, 3, label=1)
    code, _, stderr = run(*args, *GREEDY)
    assert code == 2 and "has a result for line 0, but not for what it asks now" in stderr
    assert output.read_bytes() == before


def test_lines_stay_in_the_file_until_the_engine_has_room_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = write_input(tmp_path / "in.jsonl", 30), tmp_path / "out.jsonl"
    write, unfinished = ResultsFile.write, ResultsFile.unfinished
    num_taken, held = 0, []

    def counting(self: ResultsFile, lines: Iterable[Line]) -> Iterator[Line]:
        nonlocal num_taken
        num_taken = 0  # a first pass only looks at the lines
        for line in unfinished(self, lines):
            num_taken += 1
            yield line

    def write_and_count(self: ResultsFile, *arguments: Any) -> None:
        held.append(num_taken - len(held))
        write(self, *arguments)

    monkeypatch.setattr(ResultsFile, "unfinished", counting)
    monkeypatch.setattr(ResultsFile, "write", write_and_count)
    assert run("--input", str(file), "--output", str(output), *GREEDY)[0] == 0
    assert len(held) == 30 and max(held) == 2 * 4  # --max-num-seqs


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("a", "--input", "f"), "prompts come as arguments or from --input, not both"),
        (("--input", "/nowhere/f"), "No such file"),
        (("a", "--output", "/nowhere/f"), "No such file"),
        (("a", " "), "must not be blank"),
        (("a", "--output", __file__), "is no result of this command"),
    ],
)
def test_what_cannot_run_at_all_is_one_line(args: tuple[str, ...], why: str) -> None:
    code, stdout, stderr = run(*args)
    assert code == 2 and not stdout and why in stderr and stderr.count("\n") == 1
