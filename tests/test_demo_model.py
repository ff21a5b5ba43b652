"""The model that ships with the package: it is there, small and whole, and the engine runs it.

How well it writes is judged by `tools/judge_demo_model.py`, for whoever trains a new one.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from nanovllm import LLM, SamplingParams, demo


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(demo.demo_model(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo.demo_model())


def test_missing_package_data_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "DIRECTORY", tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match="lacks generation_config.json, model.safetensors, tokenizer.json"):
        demo.demo_model()


def test_finding_the_model_loads_no_framework() -> None:
    code = "import sys, nanovllm.demo as d; d.demo_model(); print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_weights_are_bfloat16_and_small_and_whole(model: Qwen3ForCausalLM) -> None:
    path = Path(demo.demo_model()) / "model.safetensors"
    assert path.stat().st_size <= 14e6
    assert 4e6 <= model.num_parameters() <= 8e6
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    with safe_open(path, "pt") as weights:
        stored = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    expected = {name: p for name, p in model.state_dict().items() if name != "lm_head.weight"}  # tied
    assert {name: weight.shape for name, weight in stored.items()} == {name: p.shape for name, p in expected.items()}
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}


def test_everything_agrees_on_the_eos_token(tokenizer: PreTrainedTokenizerFast) -> None:
    directory = Path(demo.demo_model())
    files = [json.loads((directory / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert [file["eos_token_id"] for file in files] == [tokenizer.eos_token_id] * 2
    assert tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer) == files[0]["vocab_size"]
    assert tokenizer("def f():\n").input_ids == tokenizer("def f():\n", add_special_tokens=False).input_ids


@given(text=st.text())
@settings(deadline=None, max_examples=200)
def test_tokenizer_gives_back_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_its_card_is_there_and_states_its_loss_and_the_licence_of_its_text() -> None:
    card = (Path(demo.demo_model()) / "README.md").read_text()
    assert re.search(r"\*\*[\d.]+ nats per token", card) and "PSF licence" in card


def test_the_engine_loads_it_and_writes_python_that_ends() -> None:
    with LLM(demo.demo_model(), device="cpu", dtype="float32", num_kvcache_blocks=64) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=160)
        (completion,) = llm.generate("class Stack:\n", params, use_tqdm=False)[0].outputs
    assert completion.finish_reason == "stop"
    ast.parse("class Stack:\n" + completion.text)
