"""Steps that are padded and replayed, as on a GPU, answer as steps that run as they are, whatever meets in one step.

Which step may replay a graph is decided by what it asks, never by the shape that it happens to have.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.step_plan import StepPlan
from nanovllm.worker.cuda_graph import MAX_CHUNKS, StepShape

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
REPLAYED, IN_TURN = {"max_behind": 1, "with_graphs": True}, {"max_behind": 0, "enforce_eager": True}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ROOMY = {"max_num_seqs": 2 * MAX_CHUNKS, "num_kvcache_blocks": 512}


def run(llm: LLM, arrivals: list[tuple[int, list[int], SamplingParams]]) -> tuple[list[Sequence], list[StepPlan]]:
    """Each request arrives before the step of that number. Returns them finished, and the plans of all steps."""
    engine, plans = llm.engine, []
    launch = engine.runner.launch
    engine.runner.launch = lambda plan: plans.append(plan) or launch(plan)
    seqs: list[Sequence] = []
    for num_steps in range(2000):
        while len(seqs) < len(arrivals) and arrivals[len(seqs)][0] <= num_steps:
            seqs.append(engine.make_sequence(*arrivals[len(seqs)][1:]))
            engine.add(seqs[-1])
        if len(seqs) == len(arrivals) and not engine.has_unfinished_requests:
            break
        engine.step()
    assert all(seq.finish_reason == "length" for seq in seqs)
    return seqs, plans


def has_shape_of_a_graph(llm: LLM, plan: StepPlan) -> bool:
    return StepShape.of(plan) in llm.engine.runner.shapes.with_chunks()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("asked", [{"logprobs": 1}, {"prompt_logprobs": 0}, {"repetition_penalty": 1.3}], ids=str)
def test_extras_in_a_step_that_has_the_shape_of_a_graph(
    asked: dict[str, Any], device: str, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    """16 sequences decode, and 16 prompts of 16 tokens arrive that ask for more than a graph gives."""
    prompts = random_prompts([16] * 2 * MAX_CHUNKS)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, **asked)
    arrivals = [(0, prompt, GREEDY) for prompt in prompts[:MAX_CHUNKS]]
    arrivals += [(3, prompt, params) for prompt in prompts[MAX_CHUNKS:]]
    options = {**ROOMY, "device": device}
    llm = make_llm(checkpoint("plain"), **REPLAYED, **options)
    seqs, plans = run(llm, arrivals)
    assert any(has_shape_of_a_graph(llm, plan) for plan in plans)
    for seq, expected in zip(seqs, run(make_llm(checkpoint("plain"), **IN_TURN, **options), arrivals)[0], strict=True):
        assert seq.token_ids == expected.token_ids
        for ours, theirs in ((seq.logprobs, expected.logprobs), (seq.prompt_logprobs, expected.prompt_logprobs)):
            for one, other in zip(ours or [], theirs or [], strict=True):
                if one is not None:
                    assert one.token_ids == other.token_ids and one.ranks == other.ranks
                    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_cut_short_in_a_step_that_has_the_shape_of_a_graph(
    device: str, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    """The budget leaves 256 tokens beside 16 decodes: 15 whole prompts, and a part of one, which must not sample."""
    options = {**ROOMY, "max_num_batched_tokens": 256 + MAX_CHUNKS, "device": device}
    prompts = random_prompts([15] * (2 * MAX_CHUNKS - 1) + [90])
    arrivals = [(0 if i < MAX_CHUNKS else 3, prompt, GREEDY) for i, prompt in enumerate(prompts)]
    llm = make_llm(checkpoint("plain"), **REPLAYED, **options)
    seqs, plans = run(llm, arrivals)
    assert any(plan.num_samples < len(plan.rows) and has_shape_of_a_graph(llm, plan) for plan in plans)
    expected, _ = run(make_llm(checkpoint("plain"), **IN_TURN, **options), arrivals)
    assert [seq.token_ids for seq in seqs] == [seq.token_ids for seq in expected]


@pytest.mark.parametrize("seed", range(12))
def test_random_schedules_replayed_answer_as_schedules_in_turn(
    seed: int, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    rng = random.Random(seed)
    options = {
        "max_num_seqs": rng.choice([5, 16, 40]),
        "num_kvcache_blocks": rng.choice([20, 60, 400]),
        "max_num_batched_tokens": rng.choice([40, 256 + 16, 300, 1024]),
    }
    common = random_prompts([60], seed)[0]

    def params() -> SamplingParams:
        asked: dict[str, Any] = {"max_tokens": rng.randint(1, 20), "ignore_eos": True, "seed": rng.getrandbits(40)}
        asked |= rng.choice([{}, {}, {"temperature": 0.0}, {"top_k": 5}, {"logprobs": 2}, {"prompt_logprobs": 0}])
        asked |= rng.choice([{}, {}, {"frequency_penalty": 1.0}, {"allowed_token_ids": list(range(40))}])
        return SamplingParams(**asked)

    def prompt() -> list[int]:
        return common[: rng.choice([0, 17, 60])] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]

    bursts = sorted(rng.randint(0, 12) for _ in range(4))
    arrivals = [(burst, prompt(), params()) for burst in bursts for _ in range(rng.randint(1, 20))]
    llm = make_llm(checkpoint("plain"), **REPLAYED, **options)
    replayed, _ = run(llm, arrivals)
    expected, _ = run(make_llm(checkpoint("plain"), **IN_TURN, **options), arrivals)
    assert [seq.token_ids for seq in replayed] == [seq.token_ids for seq in expected]
    assert llm.engine.runner.graphs.num_replays["decodes"] > 0
