"""Several ranks answer what one does, fail with a reason and never hang, and leave nothing behind."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.worker.ranks import RankError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SHARED = random_prompts([40], seed=4)[0]
PROMPTS = [SHARED + prompt for prompt in random_prompts([1, 17, 30, 2])] + random_prompts([70, 1, 16], seed=2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=11, max_tokens=16)
EDITED = replace(SEEDED, repetition_penalty=1.3, logprobs=2, prompt_logprobs=1)
PARAMS = [GREEDY, SEEDED, GREEDY, SEEDED, EDITED, GREEDY, SEEDED]


def answers(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def rank_pids(llm: LLM) -> list[int]:
    return [process.pid for process in llm.engine.followers._processes]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second if it ends while it is read
        return False


def are_gone(pids: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, pids))


def rank_processes() -> set[int]:
    """Processes that multiprocessing has spawned from this one, by the kernel's books and not by ours."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and "spawn_main" in command:
            found.add(int(stat.parent.name))
    return found


def open_sockets() -> set[str]:
    links = (os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())
    return {link for link in links if link.startswith("socket:")}


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, socket or file of the ranks outlives a test that has closed its engines."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    sockets = open_sockets()
    yield
    assert not rank_processes()
    assert not list(folder.glob("nanovllm-*"))
    assert open_sockets() <= sockets


@pytest.fixture
def make_tp(nothing_is_left: None, make_llm: Callable[..., LLM]) -> Callable[..., LLM]:
    """`make_llm`, whose engines are closed before the above looks."""
    return make_llm


@pytest.mark.parametrize(("shape", "size"), [("mha-tied-bias", 2), ("gqa3-bias-linear", 3), ("plain", 4)])
def test_tokens_are_those_of_one_rank(
    shape: str, size: int, checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    # 11 blocks hold two or three of the sequences; the vocabulary of 211 never comes out even, nor do 80 / 3.
    options = {"num_kvcache_blocks": 11, "max_num_batched_tokens": 48, "max_model_len": 170}
    expected = answers(make_tp(checkpoint(shape), **options))
    llm = make_tp(checkpoint(shape), tensor_parallel_size=size, **options)
    assert len(rank_processes()) == size - 1
    assert answers(llm) == expected
    stats = llm.stats()
    assert stats.num_preemptions and stats.prefix_hits
    per_step = llm.engine.followers.bytes_sent / (size - 1) / stats.num_steps
    assert 100 < per_step < 600  # prompts included: what has changed, not what there is
    llm.sleep()
    assert llm.is_sleeping
    llm.wake_up()
    assert answers(llm) == expected
    with pytest.raises(NotImplementedError, match="tensor_parallel_size"):
        llm.load_weights([])


def test_a_killed_rank_fails_its_engine_and_not_the_one_beside_it(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    llm, other = (make_tp(checkpoint("plain"), tensor_parallel_size=2) for _ in range(2))
    endless = SamplingParams(temperature=0.0, max_tokens=250, ignore_eos=True)
    stream, beside = llm.stream([[1, 2]], endless), other.stream([[1, 2]], endless)
    for _ in range(5):
        assert next(stream).outputs[0].token_ids == next(beside).outputs[0].token_ids
    (pid,) = rank_pids(llm)
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RankError, match=rf"rank 1 \(process {pid}\) was killed by signal 9\n.*make a new LLM"):
        for _ in stream:
            pass
    assert time.monotonic() - started < 5
    for _ in range(2):
        with pytest.raises(RankError, match="rank 1"):
            answers(llm)
    assert rank_processes() == set(rank_pids(other))
    for _ in range(5):
        next(beside)
    # What interrupts rank 0 amid a step leaves the others at an unknown place: they are ended too.
    other.engine.runner.launch = interrupt
    with pytest.raises(KeyboardInterrupt):
        next(beside)
    assert not rank_processes()
    with pytest.raises(RankError, match="rank 0 failed in launch: KeyboardInterrupt"):
        answers(other)


def interrupt(plan: Any) -> None:
    raise KeyboardInterrupt


def test_a_rank_that_raises_is_named_with_its_traceback_and_ends_the_others(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    llm = make_tp(checkpoint("gqa3-bias-linear"), tensor_parallel_size=3)
    followers = llm.engine.followers
    followers._links[1].send_bytes(pickle.dumps(("sleep", (7,), False)))
    assert are_gone(rank_pids(llm))  # although nobody calls
    with pytest.raises(RankError, match=r"(?s)rank 2 failed:\nTraceback.*level=7 must be 1"):
        answers(llm)
    assert not rank_processes()


def test_a_rank_that_stalls_is_named_after_the_timeout(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    llm = make_tp(checkpoint("plain"), tensor_parallel_size=2, tensor_parallel_timeout=1)
    pids = rank_pids(llm)
    os.kill(pids[0], signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 has not answered for 1 s"):
        answers(llm)
    assert time.monotonic() - started < 6
    assert are_gone(pids)


@pytest.mark.parametrize(
    ("shape", "size", "cause"),
    [
        ("plain", 3, "num_attention_heads=4 cannot be cut into tensor_parallel_size=3 equal parts"),
        ("gqa3-dim48", 3, "num_key_value_heads=2 must divide tensor_parallel_size=3 or be divided by it"),
    ],
)
def test_a_size_that_does_not_fit_the_heads_is_refused_before_anything_starts(
    shape: str,
    size: int,
    cause: str,
    checkpoint: Callable[..., Path],
    make_tp: Callable[..., LLM],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanovllm.worker.ranks.get_context", None)
    with pytest.raises(ValueError, match=cause):
        make_tp(checkpoint(shape), tensor_parallel_size=size)


def test_what_fails_in_rank_0_during_construction_is_raised_as_it_is(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    with pytest.raises(ValueError, match="max_model_len=65 exceeds the KV cache"):
        make_tp(checkpoint("plain"), tensor_parallel_size=2, num_kvcache_blocks=4, max_model_len=65)
    assert not rank_processes()


SCRIPT = """
import signal, sys, time
from nanovllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], device="cpu", dtype="float32", skip_tokenizer_init=True, tensor_parallel_size=2,
              num_kvcache_blocks=64, max_num_seqs=4)
    print(*(process.pid for process in llm.engine.followers._processes), flush=True)
    while True:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=200), use_tqdm=False)
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT"])
def test_no_rank_outlives_rank_0(end: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(script), str(checkpoint("plain"))]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    try:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 1
        assert all(map(is_running, pids))
        time.sleep(0.3)
        process.send_signal(signal.Signals[end])
        _, errors = process.communicate(timeout=10)
        assert are_gone(pids)
        assert ("KeyboardInterrupt" in errors) == (end == "SIGINT")
    finally:
        process.kill()
        process.communicate()
