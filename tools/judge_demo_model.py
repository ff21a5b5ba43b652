"""Judges a demo model's weights before they ship: does it write Python that ends, and is its card's loss true?

Run it after training a new model. The tests check only that the package has the model and runs it. How well the model
writes changes only with its weights, so this script checks that, with transformers alone:

    python tools/judge_demo_model.py
    python tools/judge_demo_model.py --model build/demo

It prints each completion and the measured loss, then its complaints; with any complaint it exits with 1.
"""

import argparse
import ast
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

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
LEAST_SOUND = 10  # of the 12 above: rounding on another machine may decide a near tie differently
MOST_REPEATS = 5  # of one line in a completion
HELD_OUT = ["secrets.py", "types.py", "html/__init__.py", "importlib/abc.py", "xml/sax/__init__.py", "curses/ascii.py"]
# HELD_OUT has six of the card's files, in this Python's version. A model that knew only token frequencies would have a
# loss of 6 nats.
NATS_FROM_CARD = 0.3


def judge_completions(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Complaints about the greedy completions: each should be one documented definition that ends, without a loop."""
    complaints, sound = [], 0
    for prompt in PROMPTS:
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=160)[0]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        print(text, end="\n\n")
        lines = Counter(line.strip() for line in text.splitlines() if line.strip())
        if max(lines.values()) > MOST_REPEATS:
            complaints.append(f"after {prompt!r} it loops")
        try:
            (definition,) = ast.parse(text).body
        except (SyntaxError, ValueError):
            continue
        is_definition = isinstance(definition, ast.FunctionDef | ast.ClassDef)
        sound += int(ids[-1]) == tokenizer.eos_token_id and is_definition and bool(ast.get_docstring(definition))
    print(f"{sound} of {len(PROMPTS)} completions are a documented definition that ends")
    if sound < LEAST_SOUND:
        complaints.append(f"only {sound} completions are sound, of at least {LEAST_SOUND}")
    return complaints


@torch.inference_mode()
def judge_loss(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, stdlib: Path) -> list[str]:
    """Complaints about the card's loss, measured on a few of the files that the card names as held out."""
    stated = re.search(r"\*\*([\d.]+) nats per token", card)
    if stated is None:
        return ["the card states no loss"]
    claimed, nats, num_tokens = float(stated[1]), 0.0, 0
    for name in HELD_OUT:
        text = (stdlib / name).read_text("utf-8")
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : model.config.max_position_embeddings]
        nats += float(model(input_ids=ids, labels=ids).loss) * ids.numel()
        num_tokens += ids.numel()
    print(f"{nats / num_tokens:.3f} nats per token on {len(HELD_OUT)} held-out files; the card says {claimed:.3f}")
    complaints = [f"the card does not name {name} as held out" for name in HELD_OUT if f"`{name}`" not in card]
    if not abs(nats / num_tokens - claimed) <= NATS_FROM_CARD:
        complaints.append(f"the loss is further than {NATS_FROM_CARD} nats from the card's")
    return complaints


def main() -> None:
    assets = Path(__file__).parents[1] / "nanovllm" / "assets" / "demo"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=assets, help="default: the model that ships")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="Python's library")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    complaints = judge_completions(model, tokenizer)
    complaints += judge_loss(model, tokenizer, (arguments.model / "README.md").read_text("utf-8"), arguments.stdlib)
    sys.exit("\n".join(complaints) or None)


if __name__ == "__main__":
    main()
