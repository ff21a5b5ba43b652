"""Makes a tokenizer with as many tokens as a large model's, where no hub can be reached: for benchmarks of grammars.

It has the tokens of the chat model (of the demo model, if that is not installed), and then unions of two of them, drawn
at random, each with its merge. So texts become tokens and tokens bytes as in any byte-level BPE.
"""

import json
import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanovllm import chat_model, demo_model
from nanovllm.text.gguf_tokenizer import load_gguf_tokenizer

QWEN3_TOKENS = 151_936


def base_tokenizer(at_most: int = QWEN3_TOKENS) -> Any:
    """The chat model's tokenizer, 49,152 tokens; the demo model's, 6,144, if that is too large or not installed."""
    try:
        tokenizer = load_gguf_tokenizer(Path(chat_model()))
    except FileNotFoundError:
        return AutoTokenizer.from_pretrained(demo_model())
    return tokenizer if len(tokenizer) <= at_most else AutoTokenizer.from_pretrained(demo_model())


def wide_tokenizer(vocab_size: int = QWEN3_TOKENS) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` tokens, at least 6,144. The same number gives the same tokens."""
    from tokenizers import Tokenizer

    base = base_tokenizer(at_most=vocab_size)
    description = json.loads(base.backend_tokenizer.to_str())
    vocab, merges = description["model"]["vocab"], description["model"]["merges"]
    special = {token["content"] for token in description["added_tokens"]}
    parts = [token for token in vocab if token not in special]
    rng = random.Random(0)
    while len(vocab) < vocab_size:
        pair = rng.choice(parts), rng.choice(parts)
        if (union := "".join(pair)) not in vocab and len(union) <= 20:
            vocab[union] = len(vocab)
            merges.append(list(pair))
    tokenizer = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=base.eos_token)
