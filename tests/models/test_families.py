"""Every family answers what transformers answers, float32 on the CPU, however the engine cuts up the work."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_prompts
from families import CONFIGS, cache_windows, family_reference, family_tokens, save_family
from ranks_in_threads import ranks_in_threads

from nanovllm import LLM, SamplingParams
from nanovllm.cache_groups import most_blocks_in_all
from nanovllm.models import ARCHITECTURES

NUM_TOKENS = 16
SHARED = random_prompts([41], seed=6)[0]
# Windows of the configs are 10 to 40 tokens: prompts end within them and far behind; two of them share a beginning.
PROMPTS = [SHARED + [5], SHARED + [7, 8, 9], *random_prompts([70, 20, 33], seed=3)]
MIXTURES = [name for name in CONFIGS if "moe" in name or name in ("mixtral", "gptoss")]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[list[int]]]]:
    """`family(name)`: a checkpoint, and what transformers answers to PROMPTS; made once."""
    made: dict[str, tuple[Path, list[list[int]]]] = {}

    def make(name: str) -> tuple[Path, list[list[int]]]:
        if name not in made:
            path = save_family(tmp_path_factory.mktemp(name), name)
            made[name] = path, family_tokens(path, PROMPTS, NUM_TOKENS)
        return made[name]

    return make


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_every_architecture_has_a_config_here() -> None:
    assert {f"{architecture}ForCausalLM" for architecture, _ in CONFIGS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("loop", [{}, {"with_graphs": True}], ids=["plain", "replayed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_transformers_in_small_blocks_and_chunks_of_33_under_preemption_and_from_the_prefix_cache(
    name: str,
    loop: dict[str, Any],
    family: Callable[[str], tuple[Path, list[list[int]]]],
    make_llm: Callable[..., LLM],
) -> None:
    path, expected = family(name)
    windows = cache_windows(path)
    num_blocks = most_blocks_in_all(100, windows, largest_chunk=33, block_size=16) + 1  # seldom enough for two
    small = make_llm(path, **loop, num_kvcache_blocks=num_blocks, max_num_batched_tokens=33, max_model_len=100)
    assert tokens(small) == expected
    # Where all layers have windows, a sequence never holds more than what it was admitted with.
    assert small.stats().num_preemptions > 0 or None not in windows
    assert small.stats().cache_usage == 0.0
    roomy = make_llm(path, **loop, max_num_batched_tokens=33, num_kvcache_blocks=400)
    assert tokens(roomy) == expected
    before = roomy.stats().prefix_hits
    assert tokens(roomy) == expected
    assert roomy.stats().prefix_hits - before >= 100 and roomy.stats().num_preemptions == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_answer_the_same(
    name: str, family: Callable[[str], tuple[Path, list[list[int]]]], make_llm: Callable[..., LLM]
) -> None:
    path, expected = family(name)
    if "7to1" in name or "nocap" in name or "partial" in name:
        pytest.skip("an odd number of heads cannot be cut into two equal parts")
    with ranks_in_threads():
        llm = make_llm(path, tensor_parallel_size=2)
    assert tokens(llm) == expected
    assert llm.engine.runner.tp.size == 2


@pytest.mark.parametrize("name", MIXTURES)
def test_two_ranks_with_whole_experts_each_answer_the_same(
    name: str, family: Callable[[str], tuple[Path, list[list[int]]]], make_llm: Callable[..., LLM]
) -> None:
    path, expected = family(name)
    with ranks_in_threads():
        assert tokens(make_llm(path, tensor_parallel_size=2, enable_expert_parallel=True)) == expected


@pytest.mark.parametrize("options", [{}, {"enable_expert_parallel": True}], ids=["cut experts", "whole experts"])
def test_so_do_two_processes(
    options: dict[str, bool], family: Callable[[str], tuple[Path, list[list[int]]]], make_tp: Callable[..., LLM]
) -> None:
    path, expected = family("gptoss")
    assert tokens(make_tp(path, tensor_parallel_size=2, **options)) == expected


@pytest.mark.parametrize("name", ["qwen2-window", "mistral-window", "ministral3", "gemma3", "gptoss"])
def test_log_probabilities_of_prompts_and_of_all_samples_are_transformers_under_preemption(
    name: str, family: Callable[[str], tuple[Path, list[list[int]]]], make_llm: Callable[..., LLM]
) -> None:
    path, _ = family(name)
    num_blocks = most_blocks_in_all(100, cache_windows(path), largest_chunk=33, block_size=16) + 1
    llm = make_llm(path, num_kvcache_blocks=num_blocks, max_num_batched_tokens=33, max_model_len=100)
    params = [
        SamplingParams(
            temperature=0.9, seed=7, n=3, max_tokens=20, logprobs=0, prompt_logprobs=0 if index % 2 else None
        )
        for index in range(len(PROMPTS))
    ]
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params, use_tqdm=False), strict=True):
        for sample in output.outputs:
            ids = [*prompt, *sample.token_ids]
            with torch.inference_mode():
                logits = family_reference(path)(torch.tensor([ids]), use_cache=False).logits[0, :-1]
            exact = logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
            ours = [step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)]
            torch.testing.assert_close(torch.tensor(ours), exact[-len(ours) :], rtol=1e-3, atol=1e-3)
        if output.prompt_logprobs is not None:
            pairs = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
            ours = [step[token].logprob for step, token in pairs]
            torch.testing.assert_close(torch.tensor(ours), exact[: len(ours)], rtol=1e-3, atol=1e-3)
    assert llm.stats().cache_usage == 0.0


@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU torch.compile needs a C++ compiler")
def test_compiled_chains_give_the_same_tokens(
    family: Callable[[str], tuple[Path, list[list[int]]]], make_llm: Callable[..., LLM]
) -> None:
    path, expected = family("gemma2")
    assert tokens(make_llm(path, compile=True)) == expected
