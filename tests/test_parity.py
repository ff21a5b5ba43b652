"""Greedy tokens equal to transformers' `generate`, every token, float32 on the CPU, however the work is cut up.

What the engine does to a request (chunks, preemption, shared blocks, a loop one step ahead) must not be seen in what it
answers. float32 leaves no room for excuses: the reference asserts that no choice it makes is a close one.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ROPE, SHAPES, VOCAB_SIZE, Reference, drawn_logits, random_prompts, save_checkpoint, set_eos

from nanovllm import LLM, SamplingParams

LENGTHS = [40, 1, 17, 70, 2, 16, 15]  # around the block size of 16, and several blocks: 14 of them
NUM_TOKENS = 40
PROMPTS = random_prompts(LENGTHS)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)

_expected: dict[Path, list[list[int]]] = {}


def expected_tokens(path: Path) -> list[list[int]]:
    """transformers' continuations of PROMPTS."""
    if path not in _expected:
        reference = Reference(path)
        _expected[path] = [reference.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
        for prompt, tokens in zip(PROMPTS, _expected[path], strict=True):
            best = reference.logits(prompt + tokens)[len(prompt) - 1 : -1].topk(2).values
            gap = float((best[:, 0] - best[:, 1]).min())
            assert gap > 1e-3, f"a choice as close as {gap} proves nothing; give {path} another seed"
    return _expected[path]


def generate(llm: LLM, prompts: list[list[int]] = PROMPTS, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


# How the engine's loop may run: a step after the other, one ahead, and padded and replayed as on a GPU.
LOOPS: dict[str, dict[str, Any]] = {
    "in turn": {"max_behind": 0},
    "overlapped": {"max_behind": 1},
    "replayed": {"max_behind": 1, "with_graphs": True},
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("shape", SHAPES)
class TestEveryShape:
    def test_tokens_under_constant_preemption(
        self, shape: str, loop: dict[str, Any], checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        llm = make_llm(checkpoint(shape), **loop, num_kvcache_blocks=14)
        assert generate(llm) == expected_tokens(checkpoint(shape))
        assert llm.stats().num_preemptions >= 5
        assert llm.stats().cache_usage == 0.0

    def test_tokens_with_prompts_in_chunks_of_33(
        self, shape: str, loop: dict[str, Any], checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        llm = make_llm(checkpoint(shape), **loop, max_num_batched_tokens=33)
        assert generate(llm) == expected_tokens(checkpoint(shape))
        assert llm.stats().num_steps > sum(LENGTHS) // 33 + NUM_TOKENS - 1

    def test_tokens_with_a_roomy_cache_and_from_the_prefix_cache_in_the_second_round(
        self, shape: str, loop: dict[str, Any], checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        llm = make_llm(checkpoint(shape), **loop)
        rounds = [llm.generate(PROMPTS, GREEDY, use_tqdm=False) for _ in range(2)]
        for outputs in rounds:
            assert [o["token_ids"] for o in outputs] == expected_tokens(checkpoint(shape))
        cached = [(n - 1) // 16 * 16 for n in LENGTHS]  # whole blocks, the last token left to compute
        assert [o.num_cached_tokens for o in rounds[0]] == [0] * len(LENGTHS)
        assert [o.num_cached_tokens for o in rounds[1]] == cached
        assert llm.stats().prefix_hits == sum(cached) and llm.stats().num_preemptions == 0

    def test_tokens_without_prefix_cache_nor_graphs(
        self, shape: str, loop: dict[str, Any], checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        llm = make_llm(checkpoint(shape), **loop, enable_prefix_caching=False, enforce_eager=True)
        for _ in range(2):
            assert generate(llm) == expected_tokens(checkpoint(shape))
        assert llm.stats().prefix_hits == 0


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_tokens_under_everything_at_once(
    loop: dict[str, Any], checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    """Preemption, chunks, shared prefixes and few rows together, three rounds on one engine."""
    path = checkpoint("gqa3-dim48")
    llm = make_llm(path, **loop, num_kvcache_blocks=14, max_num_batched_tokens=33, max_num_seqs=5)
    for _ in range(3):
        assert generate(llm) == expected_tokens(path)
    stats = llm.stats()
    assert stats.num_preemptions > 0 and stats.prefix_hits > 0 and stats.evictions > 0 and stats.cache_usage == 0.0


@pytest.mark.parametrize("block_size", [32, 48])
def test_tokens_with_other_block_sizes(
    block_size: int, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    path = checkpoint("plain")
    llm = make_llm(path, kvcache_block_size=block_size, num_kvcache_blocks=10, max_num_batched_tokens=50)
    for _ in range(2):
        assert generate(llm) == expected_tokens(path)


def test_requests_that_share_a_prefix_in_one_step_answer_as_if_alone(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    path = checkpoint("gqa7-dim24-tied")
    common = random_prompts([50], seed=3)[0]
    prompts = [common + tail for tail in random_prompts([1, 2, 20, 33], seed=4)] + [common, common]
    llm = make_llm(path)
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.num_cached_tokens for o in outputs] == [0, 48, 48, 48, 48, 48]
    assert [o["token_ids"] for o in outputs] == [Reference(path).greedy(p, NUM_TOKENS) for p in prompts]


def test_long_generation_continues_a_conversation_from_its_own_blocks(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    """Blocks filled by decoding are found again when the answer comes back as part of the next prompt."""
    path = checkpoint("gqa2-dynamic")
    llm = make_llm(path)
    prompt = PROMPTS[5]
    answer = generate(llm, [prompt])[0]
    follow_up = prompt + answer + [5, 6, 7]
    output = llm.generate([follow_up], GREEDY, use_tqdm=False)[0]
    assert output.num_cached_tokens == (len(prompt) + NUM_TOKENS - 1) // 16 * 16
    assert output["token_ids"] == Reference(path).greedy(follow_up, NUM_TOKENS)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("num_blocks", [14, 128])
def test_every_eos_of_generation_config_stops(
    num_blocks: int, loop: dict[str, Any], checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    plain = expected_tokens(checkpoint("plain"))
    eos = [plain[2][4], plain[4][10], plain[6][20]]  # so that they do occur
    path = tmp_path / "model"
    shutil.copytree(checkpoint("plain"), path)
    set_eos(path, eos)
    llm = make_llm(path, **loop, num_kvcache_blocks=num_blocks)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    reference = Reference(checkpoint("plain"))
    assert [o["token_ids"] for o in outputs] == [reference.greedy(p, NUM_TOKENS, eos) for p in PROMPTS]
    for output in outputs:
        stopped = output["token_ids"][-1] in eos
        assert output["finish_reason"] == ("stop" if stopped else "length")
        assert output.outputs[0].stop_reason == (output["token_ids"][-1] if stopped else None)  # no tokenizer says else
    assert {"stop"} <= {o["finish_reason"] for o in outputs}
    assert llm.stats().cache_usage == 0.0


def test_eos_of_config_json_stops_where_there_is_no_generation_config(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    plain = expected_tokens(checkpoint("plain"))
    path = tmp_path / "model"
    shutil.copytree(checkpoint("plain"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": plain[5][7]}))
    tokens = generate(make_llm(path), [PROMPTS[5]])[0]
    assert tokens == plain[5][: plain[5].index(plain[5][7]) + 1]


def test_sharded_checkpoint_with_an_index(make_llm: Callable[..., LLM], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, SHAPES["gqa3-dim48"], max_shard_size="100KB")
    assert (path / "model.safetensors.index.json").is_file() and len(list(path.glob("*.safetensors"))) > 2
    assert generate(make_llm(path)) == expected_tokens(path)


def test_config_in_the_spelling_of_transformers_4(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint("gqa3-dim48"), path)
    config = json.loads((path / "config.json").read_text())
    rope = dict(config.pop("rope_parameters"))
    assert rope["rope_type"] == "yarn"
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": "float32"}
    config.pop("dtype", None)
    (path / "config.json").write_text(json.dumps(config))
    assert generate(make_llm(path, dtype="auto")) == expected_tokens(checkpoint("gqa3-dim48"))


def test_context_stretched_by_yarn_is_allowed_beyond_the_positions_of_the_config(
    make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    """Qwen's model cards: max_position_embeddings stays, `rope_parameters` with a factor are added."""
    rope = {**ROPE["yarn"], "factor": 4.0, "original_max_position_embeddings": 64}
    path = save_checkpoint(tmp_path, {"max_position_embeddings": 64, "rope_parameters": rope}, seed=2)
    prompt = random_prompts([150])[0]
    llm = make_llm(path, max_model_len=256)
    assert generate(llm, [prompt])[0] == Reference(path).greedy(prompt, NUM_TOKENS)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_within_float32(
    shape: str, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    path = checkpoint(shape)
    for llm in (make_llm(path), make_llm(path, max_num_batched_tokens=33)):
        for prompt in PROMPTS:
            theirs = Reference(path).logits(prompt)[-1]
            torch.testing.assert_close(
                drawn_logits(llm, prompt)[0], theirs, rtol=0, atol=2e-5 * float(theirs.abs().max())
            )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", ["plain", "gqa7-dim24-tied"])
def test_half_precision_is_as_close_to_float32_as_transformers_is(
    shape: str, dtype: str, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    path = checkpoint(shape)
    llm = make_llm(path, dtype=dtype)
    ours = theirs = 0.0
    for prompt in PROMPTS:
        exact = Reference(path).logits(prompt)[-1]
        ours += float((drawn_logits(llm, prompt)[0] - exact).square().mean())
        theirs += float((Reference(path).logits(prompt, getattr(torch, dtype))[-1] - exact).square().mean())
    assert 0 < ours**0.5 <= 1.5 * theirs**0.5


def test_dtype_auto_is_the_checkpoints(checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> None:
    assert make_llm(checkpoint("plain"), dtype="auto").engine.runner.dtype is torch.float32
    assert make_llm(checkpoint("plain"), dtype="bfloat16").engine.runner.dtype is torch.bfloat16


def test_random_weights_run_without_a_checkpoint(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    shutil.copy(checkpoint("plain") / "config.json", tmp_path)
    first, second = (generate(make_llm(tmp_path, load_format="dummy")) for _ in range(2))
    assert first == second
    assert all(len(tokens) == NUM_TOKENS and max(tokens) < VOCAB_SIZE for tokens in first)
