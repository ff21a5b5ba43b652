"""Several ranks answer what one does, and take new weights as one does."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SHAPES, random_prompts, save_checkpoint
from leftovers import rank_processes
from safetensors.torch import load_file

from nanovllm import LLM, SamplingParams, StructuredOutputsParams, demo_model
from nanovllm.distributed.ranks import threads_per_rank

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SHARED = random_prompts([40], seed=4)[0]
PROMPTS = [SHARED + prompt for prompt in random_prompts([1, 17, 30, 2])] + random_prompts([70, 1, 16], seed=2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=11, max_tokens=16)
EDITED = replace(SEEDED, repetition_penalty=1.3, logprobs=2, prompt_logprobs=1)
PARAMS = [GREEDY, SEEDED, GREEDY, SEEDED, EDITED, GREEDY, SEEDED]


def answers(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.mark.parametrize(
    ("shape", "size"), [("mha-tied-bias", 2), ("gqa3-bias-linear", 3), ("plain", 4), ("gqa3-dim48", 3)]
)
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


def test_ranks_draw_under_the_masks_that_rank_0_makes(make_tp: Callable[..., LLM]) -> None:
    llm = make_tp(demo_model(), tensor_parallel_size=2, skip_tokenizer_init=False)
    llm.engine.max_behind = 1  # as on a GPU
    params = [
        SamplingParams(max_tokens=30, seed=1, structured_outputs=StructuredOutputsParams(regex="[a-z]{9}[0-9]{9}")),
        SamplingParams(max_tokens=20, temperature=0.0),
    ]
    made, plain = llm.generate(["import os\n"] * 2, params, use_tqdm=False)
    assert re.fullmatch("[a-z]{9}[0-9]{9}", made.outputs[0].text)
    assert (
        plain.outputs[0].token_ids == llm.generate(["import os\n"], params[1], use_tqdm=False)[0].outputs[0].token_ids
    )


@pytest.mark.parametrize(
    ("of_torch", "of_environment", "of_a_rank"),
    [(8, None, 4), (5, None, 2), (1, None, 1), (6, "6", 6), (6, "6,2", 6), (8, "2", 4), (8, "", 4)],
)
def test_a_rank_gets_its_share_of_the_threads_unless_they_were_meant_for_each(
    of_torch: int, of_environment: str | None, of_a_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_torch)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if of_environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", of_environment)
    assert threads_per_rank(2) == of_a_rank


def test_rank_0_computes_on_its_share_and_leaves_its_caller_his_number(
    checkpoint: Callable[..., Path], make_tp: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        llm = make_tp(checkpoint("plain"), tensor_parallel_size=2)
        seen, launch = [], llm.engine.runner.launch
        llm.engine.runner.launch = lambda plan: seen.append(torch.get_num_threads()) or launch(plan)
        answers(llm)
        assert set(seen) == {2} and torch.get_num_threads() == 4
        llm.engine.runner.launch = None
        with pytest.raises(TypeError):
            answers(llm)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of the shape with other weights than `checkpoint` gives it."""
    return lambda shape: save_checkpoint(tmp_path_factory.mktemp(shape), SHAPES[shape], seed=13)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("shape", ["mha-tied-bias", "plain"])
def test_new_weights_reach_every_rank_and_a_refused_one_none(
    shape: str, checkpoint: Callable[..., Path], trained: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    new_path = trained(shape)
    old, new = tensors_of(checkpoint(shape)), tensors_of(new_path)
    before, after = answers(make_tp(checkpoint(shape))), answers(make_tp(new_path))
    assert before != after
    llm = make_tp(checkpoint(shape), tensor_parallel_size=2)
    sent = llm.engine.followers.bytes_sent
    llm.load_weights(new.items())
    assert 50 < (llm.engine.followers.bytes_sent - sent) / len(new) < 200, "tensors go through the pipe"
    assert answers(llm) == after

    rest, bad = list(old.items()), ("model.norm.weight", torch.zeros(3))
    rest.remove(next(pair for pair in rest if pair[0] == bad[0]))
    with pytest.raises(ValueError, match="model.norm.weight.*the model has .64"):
        llm.load_weights([*rest, bad])  # a list: nothing is written
    assert answers(llm) == after

    def half(error: Exception | None) -> Iterator[tuple[str, Any]]:
        yield from rest[: len(old) // 2]
        if error is not None:
            raise error
        yield bad

    for error, cause in ((None, ValueError), (ZeroDivisionError(), ZeroDivisionError), (TypeError("x"), TypeError)):
        with pytest.raises(cause) as caught:
            llm.load_weights(half(error))
        assert f"{len(old) // 2} tensors had been loaded before" in "".join(caught.value.__notes__)
    llm.load_weights((name, tensor.double()) for name, tensor in reversed(old.items()))
    assert answers(llm) == before


def test_sleep_of_level_2_drops_every_ranks_weights_until_they_are_loaded(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_tp: Callable[..., LLM]
) -> None:
    new_path = trained("gqa3-bias-linear")
    llm = make_tp(checkpoint("gqa3-bias-linear"), tensor_parallel_size=3)
    llm.sleep(level=2)
    llm.wake_up()
    with pytest.raises(RuntimeError, match="call load_weights"):
        answers(llm)
    new = list(tensors_of(new_path).items())
    llm.load_weights(new[:7])
    with pytest.raises(RuntimeError, match="call load_weights"):
        answers(llm)
    llm.load_weights(new[7:])
    assert answers(llm) == answers(make_tp(new_path))
