"""Every feature that families differ in computes on a CUDA device what transformers computes, with graphs and chains.

One config for each feature, in sizes that a kernel may meet: a head dimension is one of real models', or tiny. The
oracle is transformers in float32 on the CPU. `families.py` refuses a greedy choice that float32's rounding could turn.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import random_prompts
from families import cache_windows, family_reference, family_tokens, save_family
from safetensors.torch import load_file

from nanovllm import LLM, SamplingParams
from nanovllm.cache_groups import most_blocks_in_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"
NUM_TOKENS = 16
SHARED = random_prompts([258], seed=6)[0]
# Two begin with the same block of 256 tokens, two more with two blocks of 16; all but the first two are short.
PROMPTS = [shared + end for shared in (SHARED, SHARED[:41]) for end in ([5], [7, 8, 9])]
PROMPTS += random_prompts([70, 20, 33], seed=3)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)

BIG: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 64}
# name of a test -> (name in families.CONFIGS, what differs from it, seed)
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "qwen2-window": ("qwen2-window", {}, 0),
    "phi3-partial": ("phi3-partial", {"hidden_size": 192, "num_key_value_heads": 3}, 1),
    "ministral3": ("ministral3-window", {**BIG, "head_dim": 128}, 1),
    "smollm3": ("smollm3-window", BIG, 0),
    "olmo3": ("olmo3", BIG | {"head_dim": None}, 1),
    # Tied to its large embedding, a random model repeats its input.
    "gemma2": (
        "gemma2",
        {
            **BIG,
            "head_dim": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
        },
        8,
    ),
    "gemma3": ("gemma3", {**BIG, "head_dim": 128, "tie_word_embeddings": False}, 0),
    "qwen3moe": ("qwen3moe", {**BIG, "moe_intermediate_size": 96}, 1),
    "qwen3moe-odd": ("qwen3moe-dense-between", {}, 2),
    "mixtral": ("mixtral", BIG, 0),
    "gptoss": ("gptoss", BIG, 0),
}
LAYOUTS = ["phi3-partial", "olmo3", "gemma2", "mixtral", "gptoss"]  # of weights: each kind once
WITH_CHAINS = ["ministral3", "olmo3", "gemma2", "gemma3"]
Tokens = list[list[int]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tokens]]:
    """`case(name)`: a checkpoint, and what transformers answers to PROMPTS."""
    made: dict[str, tuple[Path, Tokens]] = {}

    def make(name: str) -> tuple[Path, Tokens]:
        if name not in made:
            base, change, seed = CASES[name]
            path = save_family(tmp_path_factory.mktemp(name), base, seed, **change)
            made[name] = path, family_tokens(path, PROMPTS, NUM_TOKENS)
        return made[name]

    return make


@pytest.fixture
def make(make_llm: Callable[..., LLM]) -> Callable[..., LLM]:
    def make(path: Path, **options: Any) -> LLM:
        return make_llm(path, **{"device": DEVICE, **options})

    return make


def tokens(llm: LLM, prompts: Tokens = PROMPTS) -> Tokens:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize("name", CASES)
def test_float32_tokens_are_transformers_in_small_blocks_and_chunks_under_preemption(
    name: str, case: Callable[[str], tuple[Path, Tokens]], make: Callable[..., LLM]
) -> None:
    path, expected = case(name)
    windows = cache_windows(path)
    num_blocks = most_blocks_in_all(100, windows, largest_chunk=33, block_size=16) + 1  # seldom enough for two
    llm = make(path, max_num_batched_tokens=33, num_kvcache_blocks=num_blocks, max_model_len=100)
    assert (llm.engine.runner.graphs is not None) == (DEVICE == "cuda")
    for _ in range(2):
        assert tokens(llm, PROMPTS[2:]) == expected[2:]
    assert llm.stats().num_preemptions > 0 or None not in windows
    assert llm.stats().cache_usage == 0.0


@pytest.mark.parametrize("name", CASES)
def test_float32_tokens_are_transformers_in_blocks_of_256_from_the_prefix_cache_and_with_weights_loaded_anew(
    name: str, case: Callable[[str], tuple[Path, Tokens]], make: Callable[..., LLM]
) -> None:
    path, expected = case(name)
    llm = make(path, kvcache_block_size=256, num_kvcache_blocks=60, max_num_batched_tokens=600)
    for _ in range(2):
        assert tokens(llm) == expected
    assert llm.stats().prefix_hits >= 2 * 256
    if name not in LAYOUTS:
        return
    llm.sleep(level=2)
    llm.wake_up()
    llm.load_weights(load_file(path / "model.safetensors").items())
    assert tokens(llm) == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {"compile": False}) for name in WITH_CHAINS), ("gemma2", {"enforce_eager": True})],
    ids=str,
)
def test_float32_tokens_are_the_same_without_compiled_chains(
    name: str, options: dict[str, bool], case: Callable[[str], tuple[Path, Tokens]], make: Callable[..., LLM]
) -> None:
    path, expected = case(name)
    assert tokens(make(path, **options)) == expected


@pytest.mark.parametrize("name", ["gemma3", "qwen3moe"])
def test_the_cache_is_as_large_as_the_memory_allows(
    name: str, case: Callable[[str], tuple[Path, Tokens]], make: Callable[..., LLM]
) -> None:
    """Measured with the largest step, whose shapes no other step has."""
    path, expected = case(name)
    llm = make(path, num_kvcache_blocks=None, gpu_memory_utilization=0.1)
    assert llm.engine.runner.num_blocks > 1000
    assert tokens(llm) == expected


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "qwen3moe-odd"])
def test_bfloat16_log_probabilities_are_as_close_to_float32_as_transformers_are(
    name: str, compile: bool, case: Callable[[str], tuple[Path, Tokens]], make: Callable[..., LLM]
) -> None:
    """By the median error, because a token whose last expert is a close choice may get another one, on either side.

    The two round at other places, so that the errors are alike and not equal: on 800 tokens their medians differ by a
    few per cent.
    """
    if not compile and name not in WITH_CHAINS:
        pytest.skip("there is nothing to compile")
    path, _ = case(name)
    prompts = random_prompts([300, 250, 200, 50], seed=5)
    exact = scores(family_reference(path), prompts)
    half = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager")
    theirs = scores(half.eval().to(DEVICE), prompts)
    llm = make(path, dtype="bfloat16", compile=compile, num_kvcache_blocks=200, max_num_batched_tokens=256)
    ours = torch.tensor([value for score in llm.log_likelihood(prompts) for value in score.logprobs[1:]])
    error, allowed = (ours - exact).abs().median(), (theirs - exact).abs().median()
    assert 0 < error <= 1.25 * allowed, f"median error {error}, transformers' {allowed}"


@torch.inference_mode()
def scores(model: transformers.PreTrainedModel, prompts: Tokens) -> torch.Tensor:
    """The log-probability of each token but the first of each prompt."""
    parts = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        logprobs = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        parts.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu())
    return torch.cat(parts)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3moe", {}),
        ("qwen3moe", {"enable_expert_parallel": True}),
        ("gptoss", {"enable_expert_parallel": True}),
        ("gemma3", {}),
        ("olmo3", {}),  # its norms are OLMo 2's
        ("ministral3", {}),
    ],
    ids=str,
)
def test_two_devices_answer_in_float32_what_transformers_does(
    name: str, options: dict[str, bool], case: Callable[[str], tuple[Path, Tokens]], make_tp: Callable[..., LLM]
) -> None:
    path, expected = case(name)
    llm = make_tp(path, device=DEVICE, tensor_parallel_size=2, max_num_batched_tokens=300, **options)
    assert tokens(llm) == expected
    llm.load_weights(load_file(path / "model.safetensors").items())
    assert tokens(llm) == expected
