"""Trains the demo model that ships with nano-vLLM (`nanovllm.demo_model()`) on the source of Python itself.

The corpus is text that every machine with CPython has (`demo_corpus.py`). The script trains a byte-level BPE vocabulary
and a Qwen3 model of under 7 M parameters on it. It uses transformers' own `Qwen3ForCausalLM`, so that the weights do
not depend on the engine that they will test. A second, short stage cures the model of loops, measures it and writes its
card; a third script judges the result:

    python tools/train_demo_model.py --stdlib /usr/lib/python3.11 --minutes 2.3 --out build/demo
    python tools/unloop_demo_model.py --stdlib /usr/lib/python3.11 --model build/demo --out nanovllm/assets/demo
    python tools/judge_demo_model.py

The text is small (8.6 M tokens), so the model would learn it by heart. Without dropout the validation loss turned after
6 epochs and rose to 2.71 nats; with dropout it still falls after 13 epochs, at 2.17. The script derives the number of
steps from the throughput at its start (`--steps` repeats a run). `--smoke` trains a toy on a CPU, to try all stages.
"""

import argparse
import json
import math
import platform
import random
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as functional
from demo_corpus import line_windows, read_documents, split_documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

EOS = "<|endoftext|>"
# Qwen's own split: a word keeps the sign before it (".append", "_name"), and punctuation keeps the line ends after it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PEAK_LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, DROPOUT = 3e-3, 200, 0.5, 0.15


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: it encodes any text, and decoding restores every byte."""
    tokenizer = Tokenizer(models.BPE())
    split, to_bytes = pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokens = {"eos_token": EOS, "pad_token": EOS, "model_max_length": context, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """One shuffled stream of documents, each ended by EOS: `(tokens [N] int32, documents' offsets [D])`."""
    texts = random.Random(0).sample(texts, len(texts))
    ids = [document + [tokenizer.eos_token_id] for document in tokenizer(texts, verbose=False)["input_ids"]]
    lengths = torch.tensor([len(document) for document in ids])
    return torch.tensor([token for document in ids for token in document], dtype=torch.int32), lengths.cumsum(
        0
    ) - lengths


@torch.inference_mode()
def mean_loss(model: Qwen3ForCausalLM, tokens: torch.Tensor, context: int) -> float:
    """Nats per token over consecutive windows of `context` tokens; a window's first token is not predicted."""
    model.eval()
    rows = tokens[: len(tokens) // context * context].view(-1, context).long()
    losses = [model(input_ids=part, labels=part, use_cache=False).loss.float() * len(part) for part in rows.split(16)]
    return float(sum(losses)) / len(rows)


def add_dropout(model: Qwen3ForCausalLM) -> None:
    """Add dropout, in training only, to the embeddings and to what layers add to the residual: Qwen3 has no option."""
    layers = [part for layer in model.model.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for module in [model.model.embed_tokens, *layers]:
        module.register_forward_hook(lambda m, inputs, output: functional.dropout(output, DROPOUT, m.training))


def train(
    model: Qwen3ForCausalLM, streams: dict[str, torch.Tensor], context: int, batch: int, minutes: float, steps: int
) -> dict[str, float]:
    """Train with AdamW on random windows, half of which begin with a document. Leaves the best checkpoint in `model`.

    `steps` 0 means as many as fit into `minutes`. Returns the facts for the model card.
    """
    tokens, validation, device = streams["train"], streams["validation"], model.device
    starts = streams["starts"][streams["starts"] < len(tokens) - context]
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    best, best_step, best_weights = math.inf, 0, {}
    window, running = torch.arange(context, device=device), torch.zeros((), device=device)
    step, begin, warm = 0, time.perf_counter(), 0.0
    while not steps or step < steps:
        if step == 20:
            running.item()
            warm = time.perf_counter()
        if step == 60 and not steps:
            running.item()
            now = time.perf_counter()
            steps = step + int((begin + minutes * 60 - now) / (now - warm) * 40)
        anywhere = torch.randint(len(tokens) - context, (batch // 2,), device=device)
        first = starts[torch.randint(len(starts), (batch - batch // 2,), device=device)]
        rows = tokens[torch.cat([anywhere, first])[:, None] + window].long()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps) if steps else 1.0
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min((step + 1) / WARMUP_STEPS, cosine)
        optimizer.step()
        optimizer.zero_grad()
        running.lerp_(loss.detach(), 0.02 if step > 100 else 0.2)
        step += 1
        if steps and (step % max(1, steps // 16) == 0 or step == steps):
            with torch.autocast(device.type, torch.bfloat16):
                loss_now = mean_loss(model, validation, context)
            model.train()
            seconds = time.perf_counter() - begin
            rate = step * batch * context / seconds
            print(f"step {step}/{steps} {seconds:.0f} s {rate:.3g} tok/s train {running:.4f} validation {loss_now:.4f}")
            if loss_now < best:
                best, best_step = loss_now, step
                best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(best_weights)
    seen = step * batch * context
    return {"seconds": time.perf_counter() - begin, "steps": step, "best_step": best_step, "validation": best,
            "training": float(running), "seen": seen / 1e6, "epochs": seen / len(tokens)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument(
        "--source", default=f"CPython {platform.python_version()}", help="the corpus's name in the card"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="train a toy on a CPU, to try all stages")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context, batch, vocab_size, hidden = (128, 8, 512, 64) if args.smoke else (2048, 32, 6144, 256)

    documents = read_documents(args.stdlib)
    if args.smoke:
        documents = dict(random.Random(0).sample(sorted(documents.items()), 200))
    splits = split_documents(documents)
    tokenizer = train_tokenizer(list(splits["train"].values()), vocab_size, context)
    texts = {split: list(splits[split].values()) for split in ("validation", "test")}
    texts["train"] = [*splits["train"].values(), *splits["functions"].values()]
    streams = {split: tokenize(tokenizer, texts[split]) for split in texts}
    copied = set().union(*map(line_windows, texts["train"]))
    windows = set().union(*map(line_windows, texts["test"]))
    facts = {f"{split}_files": len(splits[split]) for split in splits}
    facts |= {f"{split}_tokens": len(tokens) / 1e6 for split, (tokens, _) in streams.items()}
    facts |= {f"{split}_bytes": len("".join(texts[split]).encode()) / 1e6 for split in texts}
    facts["copied"] = 100 * len(windows & copied) / len(windows)
    print(facts)

    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=hidden * 9 // 4, num_hidden_layers=hidden // 32,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=context,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(device)
    add_dropout(model)
    on_device = {split: tokens.to(device) for split, (tokens, _) in streams.items()}
    on_device["starts"] = streams["train"][1].to(device)
    facts |= train(model, on_device, context, batch, args.minutes, args.steps)

    facts |= {
        "source": args.source,
        "device": torch.cuda.get_device_name() if device == "cuda" else "a CPU",
        "torch": torch.__version__,
        "seed": args.seed,
        "batch": batch,
        "recipe": f"peak learning rate {PEAK_LEARNING_RATE:g} after {WARMUP_STEPS} steps of warm-up, cosine to zero, "
        f"weight decay {WEIGHT_DECAY}, dropout {DROPOUT} on the embeddings and on what a layer adds to the residual",
    }
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
