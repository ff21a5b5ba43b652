"""A device that fails for good, and a child that a process with a device forks: each test runs its own program."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, torch
from nanovllm import LLM, EngineDeadError, SamplingParams
llm = LLM(sys.argv[1], device="cuda", dtype="float32", skip_tokenizer_init=True, kvcache_block_size=16,
          num_kvcache_blocks=64, max_num_seqs=8)
params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
def answer():
    return llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]["token_ids"]
expected = answer()
"""


def run(path: Path, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + code, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_device_that_failed_for_good_is_the_end_of_the_engine_and_said_at_once(
    checkpoint: Callable[..., Path],
) -> None:
    done = run(
        checkpoint("plain"),
        """
launch = llm.engine.runner.launch
def out_of_bounds(plan):
    handle = launch(plan)
    torch.zeros(1, device="cuda")[torch.tensor([1 << 20], device="cuda")]  # a device-side assert
    return handle
llm.engine.runner.launch = out_of_bounds
for _ in range(2):
    try:
        answer()
    except EngineDeadError as error:
        assert "the device has failed for good" in str(error), error
    else:
        raise SystemExit("no error")
try:
    llm.check_health()
except EngineDeadError:
    print("dead", flush=True)
    os._exit(0)  # PyTorch aborts a process that frees page-locked tensors of a dead context
""",
    )
    assert (done.returncode, done.stdout) == (0, "dead\n"), done.stderr


def test_a_forked_child_that_ends_leaves_the_device_to_its_parent(checkpoint: Callable[..., Path]) -> None:
    done = run(
        checkpoint("plain"),
        """
pid = os.fork()
if pid == 0:
    try:
        answer()
    except EngineDeadError as error:
        sys.exit(7 if "forked" in str(error) else 8)  # by way of finalizers
    sys.exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert answer() == expected
print("alive")
""",
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
