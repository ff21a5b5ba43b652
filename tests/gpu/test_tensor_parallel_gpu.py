"""Two CUDA devices answer as one device does, with graphs and without, and a failed rank ends its engine alone.

Ranks add up other partial sums than one device, so numbers agree only within bfloat16's rounding. Tokens agree in
float32, where no two logits are that close.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_prompts, save_checkpoint
from leftovers import are_gone, kill_the_rank_of, rank_pids, rank_processes
from safetensors.torch import load_file

from nanovllm import LLM, RankError, SamplingParams
from nanovllm.kernels.norm import all_reduce

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1031,
}
PROMPTS = random_prompts([40, 1, 17, 70, 2, 16, 15], seed=4)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, seed=11, max_tokens=24)
PARAMS = [GREEDY, SEEDED, GREEDY, SEEDED, GREEDY, GREEDY, SEEDED]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("two-devices"), SHAPE)


@pytest.fixture
def make(make_tp: Callable[..., LLM], path: Path) -> Callable[..., LLM]:
    def make(size: int, **options: Any) -> LLM:
        return make_tp(path, **{"device": "cuda", "tensor_parallel_size": size, **options})

    return make


def answers(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.mark.parametrize(
    ("one_shot_bytes", "eager"), [(0, False), (1 << 18, False), (1 << 18, True)], ids=["nccl", "one-shot", "eager"]
)
def test_float32_tokens_are_those_of_one_device_with_preemption_and_after_sleep(
    one_shot_bytes: int, eager: bool, make: Callable[..., LLM], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_reduce, "ONE_SHOT_BYTES", one_shot_bytes)
    options = {"num_kvcache_blocks": 14, "max_num_batched_tokens": 48, "enforce_eager": eager}
    expected = answers(make(1, **options))
    llm = make(2, **options)
    assert (llm.engine.runner.graphs is None) == eager
    assert (llm.engine.followers.tp.peers is not None) == bool(one_shot_bytes), "the devices are not connected so"
    assert answers(llm) == expected
    assert llm.stats().num_preemptions
    if not eager:
        llm.sleep(level=2)
        llm.wake_up()
    llm.load_weights(load_file(path / "model.safetensors").items())
    assert answers(llm) == expected


def test_bfloat16_log_probabilities_are_those_of_one_device_within_its_rounding(
    make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts([200, 33, 64], seed=5)

    def score(size: int, dtype: str = "bfloat16") -> torch.Tensor:
        with make(size, dtype=dtype) as llm:
            return torch.tensor([value for score in llm.log_likelihood(prompts) for value in score.logprobs[1:]])

    exact = score(1, "float32")
    rounded = (score(1) - exact).abs()
    for one_shot_bytes in (0, 1 << 20):  # all prompts together are one message
        monkeypatch.setattr(all_reduce, "ONE_SHOT_BYTES", one_shot_bytes)
        error = (score(2) - exact).abs()
        assert error.mean() < 1.5 * rounded.mean() and error.max() < 3 * rounded.max()


@pytest.mark.parametrize("one_shot_bytes", [0, 1 << 18], ids=["nccl", "one-shot"])
def test_a_killed_rank_fails_its_engine_while_the_one_beside_it_goes_on(
    one_shot_bytes: int, make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_reduce, "ONE_SHOT_BYTES", one_shot_bytes)
    llm, other = make(2), make(2)
    beside = kill_the_rank_of(llm, other, max_tokens=1500)
    assert rank_processes() == set(rank_pids(other))
    for _ in range(5):
        next(beside)


def test_a_rank_that_is_stopped_is_named_after_the_timeout_and_the_device_is_free_again(
    make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_reduce, "ONE_SHOT_BYTES", 1 << 18)
    llm = make(2, tensor_parallel_timeout=6)
    expected = answers(llm)  # kernels of prompts are compiled, in which the ranks need not be equally fast
    (pid,) = rank_pids(llm)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 has not answered for 6 s"):
        answers(llm)
    assert 6 <= time.monotonic() - started < 14
    assert are_gone([pid])
    assert answers(make(1)) == expected
