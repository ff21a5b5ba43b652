"""Every prompt token is scored once its prediction is computed, whatever chunks and preemptions make of the prompt."""

import random
from types import SimpleNamespace

import pytest
from simulated_engine import VOCAB_SIZE, make_engine, prefix_hashes, run

from nanovllm import SamplingParams
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.outputs import TokenLogprobs
from nanovllm.step_plan import StepPlan


def score_on_device(engine: LLMEngine) -> None:
    """Let the simulated device answer with the hash of the prefix that predicts the token, computed in this step."""
    device, launch = engine.runner, engine.runner.launch

    def launch_and_score(plan: StepPlan) -> SimpleNamespace:
        handle, spans = launch(plan), []
        for span in plan.prompt_logprobs:
            row, query_len = device.rows[plan.rows[span.index]], plan.query_lens[span.index]
            assert span.start == row.num_computed - query_len and 1 <= span.num_tokens <= query_len
            predicting = range(span.start, span.start + span.num_tokens)
            spans.append([TokenLogprobs([row.token_ids[i + 1]], [row.hashes[i]], [span.num_top]) for i in predicting])
        handle.prompt_logprobs = lambda: spans
        return handle

    device.launch = launch_and_score


@pytest.mark.parametrize("seed", range(40))
def test_prompts_are_scored_whole_and_in_order(seed: int) -> None:
    rng = random.Random(seed)
    engine = make_engine(
        num_blocks=rng.randrange(8, 14),
        block_size=4,
        max_num_seqs=rng.randrange(1, 6),
        max_num_batched_tokens=rng.choice([3, 5, 9, 64]),
        max_model_len=28,
        max_behind=rng.randrange(2),
    )
    score_on_device(engine)
    common = [rng.randrange(VOCAB_SIZE) for _ in range(20)]
    seqs = []
    for i in range(12):
        prompt = common[: rng.randrange(1, 20)] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(5))]
        num_top = rng.choice([None, i, i])
        params = SamplingParams(max_tokens=rng.randrange(1, 12), ignore_eos=True, prompt_logprobs=num_top)
        seqs.append(engine.make_sequence(prompt, params))
        engine.add(seqs[-1])
    run(engine)
    for seq in seqs:
        num_top, prompt = seq.params.prompt_logprobs, seq.token_ids[: seq.num_prompt_tokens]
        if num_top is None:
            assert seq.prompt_logprobs is None
        else:
            expected = zip(prompt[1:], prefix_hashes(prompt)[:-1], strict=True)
            assert seq.prompt_logprobs == [None, *(TokenLogprobs([t], [h], [num_top]) for t, h in expected)]
            assert seq.num_cached_tokens == 0
