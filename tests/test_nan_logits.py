"""A sequence whose logits are NaN, or that has no token left to draw, ends with an error, and its neighbours go on."""

import asyncio
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_model, random_prompts

from nanovllm import LLM, AsyncLLM, SamplingParams

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
LOOPS = [{"max_behind": 0}, {"max_behind": 1}, {"max_behind": 1, "with_graphs": True}]
POISON = 7  # the token whose embedding is NaN
CLEAN = [[t for t in prompt if t != POISON] for prompt in random_prompts([40, 3, 70, 17])]
ASKED = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.0, "seed": 3, "top_k": 9, "top_p": 0.9},
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1},
    {"temperature": 0.0, "allowed_token_ids": [1, 2, 3], "min_tokens": 2, "stop_token_ids": [1]},
]


def poisoned_weights() -> list[tuple[str, torch.Tensor]]:
    weight = make_model({}).model.embed_tokens.weight.detach().clone()
    weight[POISON] = math.nan
    return [("model.embed_tokens.weight", weight)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loop", LOOPS, ids=["in turn", "overlapped", "replayed"])
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_nan_logits_end_their_own_sequence_with_an_error(
    asked: dict[str, Any],
    loop: dict[str, Any],
    device: str,
    checkpoint: Callable[..., Path],
    make_llm: Callable[..., LLM],
    caplog: pytest.LogCaptureFixture,
) -> None:
    llm = make_llm(checkpoint("plain"), device=device, **loop)
    # What is drawn must not be the token itself, which poisons its own continuation.
    params = SamplingParams(
        max_tokens=12, ignore_eos=True, **{"bad_words": (), "logit_bias": {POISON: -100.0}, **asked}
    )
    expected = [out["token_ids"] for out in llm.generate(CLEAN, params, use_tqdm=False)]
    llm.load_weights(poisoned_weights())
    prompts = [CLEAN[0], [POISON], CLEAN[1], [*CLEAN[2][:10], POISON, 5], CLEAN[2], CLEAN[3]]
    with caplog.at_level(logging.ERROR, logger="nanovllm"):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert sum("logits are NaN" in record.message for record in caplog.records) == 2
    for i in (1, 3):
        (completion,) = outputs[i].outputs
        assert outputs[i].finished and completion.finish_reason == "error" and not completion.token_ids
        assert "the model's logits are NaN" in completion.stop_reason
        assert params.prompt_logprobs is None or len(outputs[i].prompt_logprobs) == len(prompts[i])
    healthy = [output for i, output in enumerate(outputs) if i not in (1, 3)]
    assert [output["token_ids"] for output in healthy] == expected
    assert all(output["finish_reason"] in ("length", "stop") for output in healthy)
    assert llm.stats().cache_usage == 0.0 and llm.stats().num_running == 0


@pytest.mark.parametrize("loop", LOOPS, ids=["in turn", "overlapped", "replayed"])
def test_a_draw_that_leads_to_nan_keeps_the_tokens_before_it(
    loop: dict[str, Any], checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint("plain"), **loop)
    llm.load_weights(poisoned_weights())
    params = SamplingParams(temperature=0.0, max_tokens=12, allowed_token_ids=[POISON])
    *_, last = llm.stream([[1, 2, 3]], params)
    assert last.outputs[0].token_ids == [POISON] and last.outputs[0].finish_reason == "error"


def test_blocks_that_may_hold_nan_are_found_by_nobody(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    """NaN that was there once, as from weights that have been replaced since without emptying the cache."""
    llm = make_llm(checkpoint("plain"))
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompt = CLEAN[2]
    clean = llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"]
    cache = llm.engine.runner.kv_cache
    with torch.inference_mode():
        cache.fill_(math.nan)
    assert llm.generate([prompt], params, use_tqdm=False)[0]["finish_reason"] == "error"
    again = llm.generate([prompt], params, use_tqdm=False)[0]
    assert again["token_ids"] == clean and again.num_cached_tokens == 0


def test_a_request_whose_own_edits_leave_no_token_ends_with_an_error(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    """Only 5 is allowed, and 5 must not follow 5."""
    llm = make_llm(checkpoint("plain"))
    engine = llm.engine
    params = SamplingParams(temperature=0.0, max_tokens=12, allowed_token_ids=[5])
    seqs = [engine.make_sequence([1, 2], params, bad_words=words) for words in (((5, 5),), ())]
    for seq in seqs:
        engine.add(seq)
    while engine.has_unfinished_requests:
        engine.step()
    assert seqs[0].output_token_ids == [5] and seqs[0].finish_reason == "error"
    assert "no token is left" in seqs[0].stop_reason
    assert seqs[1].output_token_ids == [5] * 12


def test_an_async_reader_is_told_of_the_error(checkpoint: Callable[..., Path]) -> None:
    async def main() -> None:
        options = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "num_kvcache_blocks": 64}
        async with AsyncLLM(str(checkpoint("plain")), **options) as llm:
            await llm.load_weights(poisoned_weights())
            params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)

            async def last_of(prompt: list[int]) -> Any:
                return [output async for output in llm.generate(prompt, params)][-1].outputs[0]

            bad, good = await asyncio.gather(last_of([POISON, 1]), last_of([1, 2]))
            assert bad.finish_reason == "error" and "NaN" in bad.stop_reason
            assert good.finish_reason == "length" and len(good.token_ids) == 5

    asyncio.run(main())
