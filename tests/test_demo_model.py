"""The model that ships with the package: it is there, small, whole, trained, and says what its card says."""

import ast
import json
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from nanovllm import demo

PROMPTS = [
    "def __init__(self, name, value):\n",
    "def __len__(self):\n",
    "def __repr__(self):\n",
    'def close(self):\n    """',
    "def get(self, key, default=None):\n",
    "def is_empty(self):\n",
    "def connect(host, port):\n",
    'def encode(text, encoding="utf-8"):\n    """Encode',
    'def find(path, name):\n    """Find',
    "def load(file):\n",
    "class Stack:\n",
    "class Error(Exception):\n",
]
HELD_OUT = ["secrets.py", "types.py", "html/__init__.py", "importlib/abc.py", "xml/sax/__init__.py", "curses/ascii.py"]


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


def test_greedy_completions_are_python_that_ends(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    sound = 0
    for prompt in PROMPTS:
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=160)[0]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        lines = Counter(line.strip() for line in text.splitlines() if line.strip())
        assert max(lines.values()) <= 5, f"a loop: {text}"
        try:
            (definition,) = ast.parse(text).body
        except (SyntaxError, ValueError):
            continue
        sound += ids[-1] == tokenizer.eos_token_id and ast.get_docstring(definition) is not None
    assert sound >= 10  # of 12: another machine's rounding may turn a near tie


@torch.inference_mode()
def test_held_out_loss_is_near_the_one_on_the_card(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    card = (Path(demo.demo_model()) / "README.md").read_text()
    claimed = float(re.search(r"\*\*([\d.]+) nats per token", card)[1])
    assert all(f"`{name}`" in card for name in HELD_OUT)
    nats, num_tokens = 0.0, 0
    for name in HELD_OUT:
        text = (Path(sysconfig.get_path("stdlib")) / name).read_text("utf-8")
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : model.config.max_position_embeddings]
        nats += float(model(input_ids=ids, labels=ids).loss) * ids.numel()
        num_tokens += ids.numel()
    # Six files of 44, in this Python's version of them; a model that knew only how frequent tokens are is at 6.
    assert nats / num_tokens == pytest.approx(claimed, abs=0.3)
