"""A rank that dies, raises or stalls fails its engine with a reason, within seconds, and leaves nothing behind."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inside import ending_ranks_raises, forbid_starting_ranks, order_rank
from leftovers import are_gone, is_running, kill_the_rank_of, rank_pids, rank_processes

from nanovllm import LLM, RankError, SamplingParams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

PROMPTS = [[1, 2, 3], [4, 5]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


def answers(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_a_killed_rank_fails_its_engine_and_not_the_one_beside_it(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    llm, other = (make_tp(checkpoint("plain"), tensor_parallel_size=2) for _ in range(2))
    beside = kill_the_rank_of(llm, other, max_tokens=250)
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


@pytest.mark.parametrize("seed", range(8))
def test_a_rank_killed_at_any_moment_is_an_error_and_leaves_nothing(
    seed: int, checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    draw = random.Random(seed)
    (size, shape), is_early = ((2, "plain"), (3, "gqa3-bias-linear"))[seed % 2], seed % 5 == 4

    def kill() -> None:
        deadline = time.monotonic() + 60
        while len(rank_processes()) < size - 1:
            if time.monotonic() > deadline:
                return  # the ranks have ended before all had started: the test has failed already
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 2 if is_early else 0.3))  # of some seconds that the start takes, or of the steps
        os.kill(draw.choice(sorted(rank_processes())), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    with pytest.raises(RankError, match="was killed by signal 9"):
        if is_early:
            killer.start()
        llm = make_tp(checkpoint(shape), tensor_parallel_size=size)
        if not is_early:
            killer.start()
        while True:
            answers(llm)
    killer.join(timeout=70)
    assert not killer.is_alive() and not rank_processes()


def interrupt(plan: Any) -> None:
    raise KeyboardInterrupt


def test_a_rank_that_raises_is_named_with_its_traceback_and_ends_the_others(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    llm = make_tp(checkpoint("gqa3-bias-linear"), tensor_parallel_size=3)
    order_rank(llm, 2, "sleep", 7)
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


def test_a_rank_that_stalls_while_rank_0_waits_for_its_device_is_named_too(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    llm = make_tp(checkpoint("plain"), tensor_parallel_size=2, tensor_parallel_timeout=1)
    pids, followers, launch = rank_pids(llm), llm.engine.followers, llm.engine.runner.launch
    aborted: list[bool] = []

    def wait_like_a_device() -> list[int]:
        while not aborted:
            time.sleep(0.01)
        raise RuntimeError("CUDA error: what an aborted collective may leave")

    object.__setattr__(followers.tp.group, "abort", lambda: aborted.append(True))
    llm.engine.runner.launch = lambda plan: (
        launch(plan) and SimpleNamespace(tokens=wait_like_a_device, awaits_masks=None)
    )
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 has not answered for 1 s") as caught:
        answers(llm)
    assert 1 < time.monotonic() - started < 5
    assert "CUDA error" in str(caught.value.__cause__)
    assert are_gone(pids)


def test_a_second_interrupt_before_the_ranks_have_been_ended_ends_them_at_the_next_call(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    llm = make_tp(checkpoint("plain"), tensor_parallel_size=2)
    pids = rank_pids(llm)
    llm.engine.runner.launch = interrupt
    with ending_ranks_raises(llm, interrupt), pytest.raises(KeyboardInterrupt):
        answers(llm)
    del llm.engine.runner.launch
    assert all(map(is_running, pids))  # and nobody knows how far they have come
    with pytest.raises(RankError, match="rank 0 was interrupted in launch"):
        answers(llm)
    assert are_gone(pids)


def test_a_size_that_does_not_fit_the_heads_is_refused_before_anything_starts(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_starting_ranks(monkeypatch)
    with pytest.raises(ValueError, match="num_attention_heads=4 cannot be cut into tensor_parallel_size=3 equal parts"):
        make_tp(checkpoint("plain"), tensor_parallel_size=3)


def test_a_model_without_experts_cannot_share_them(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_starting_ranks(monkeypatch)
    with pytest.raises(ValueError, match="enable_expert_parallel=True, but Qwen3ForCausalLM has no experts"):
        make_tp(checkpoint("plain"), tensor_parallel_size=2, enable_expert_parallel=True)


def test_what_fails_in_rank_0_during_construction_is_raised_as_it_is(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    with pytest.raises(ValueError, match="max_model_len=65 exceeds the KV cache"):
        make_tp(checkpoint("plain"), tensor_parallel_size=2, num_kvcache_blocks=4, max_model_len=65)
    assert not rank_processes()


SCRIPT = """
import signal, sys, time
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", dtype="float32", skip_tokenizer_init=True, tensor_parallel_size=2,
          num_kvcache_blocks=64, max_num_seqs=4)
print(*llm.engine.followers.processes.pids, flush=True)
while True:
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=200), use_tqdm=False)
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "SIGINT"])
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
