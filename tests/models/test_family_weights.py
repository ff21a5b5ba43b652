"""Weights of every layout that families have can be loaded into a running model, dropped, and saved cut up.

Fused on disk (Phi-3), less one (Gemma), cut by heads (OLMo 2's norms), expert by expert, or all experts in one tensor.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_prompts
from families import CONFIGS, save_family
from safetensors.torch import load_file

from nanovllm import LLM, SamplingParams

PROMPTS = random_prompts([41, 20], seed=3)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, logprobs=1)


def answers(llm: LLM) -> list[list[Any]]:
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    return [
        [output.token_ids, [step[t].logprob for step, t in zip(output.logprobs, output.token_ids, strict=True)]]
        for output in outputs
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["phi3-partial", "gemma3", "olmo2", "mixtral", "gptoss"])
def test_new_weights_give_the_very_numbers_of_an_engine_made_with_them(
    name: str, dtype: str, tmp_path: Path, make_llm: Callable[..., LLM]
) -> None:
    old, new = save_family(tmp_path / "old", name, seed=1), save_family(tmp_path / "new", name, seed=2)
    tensors = load_file(new / "model.safetensors")
    expected = answers(make_llm(new, dtype=dtype))
    llm = make_llm(old, dtype=dtype)
    before = answers(llm)
    assert before != expected
    for _ in range(2):  # what is added to a weight is added once
        llm.load_weights(list(tensors.items()))
        assert answers(llm) == expected
    llm.load_weights(load_file(old / "model.safetensors").items())
    llm.sleep(level=1)
    llm.wake_up()
    assert answers(llm) == before
    llm.sleep(level=2)
    llm.wake_up()
    llm.load_weights(item for item in tensors.items())
    assert answers(llm) == expected
    (tmp_path / "cut").mkdir()
    shutil.copy(new / "config.json", tmp_path / "cut")
    llm.collective_rpc("save_sharded_state", args=(tmp_path / "cut",))
    assert answers(make_llm(tmp_path / "cut", dtype=dtype, load_format="sharded_state")) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_random_weights_serve_for_a_config_without_checkpoint(
    name: str, tmp_path: Path, make_llm: Callable[..., LLM]
) -> None:
    (save_family(tmp_path, name) / "model.safetensors").unlink()
    llm = make_llm(tmp_path, load_format="dummy", dtype="float16")
    assert all(torch.tensor(logprobs).isfinite().all() for _, logprobs in answers(llm))
