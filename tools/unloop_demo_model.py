"""Cures the demo model of loops, measures it, and writes its model card: the second stage, after `train_demo_model.py`.

Under greedy decoding a model this small soon repeats one line for ever. The cure is sequence-level unlikelihood
training (Welleck et al., "Neural Text Generation with Unlikelihood Training", 2020): the model continues beginnings of
training documents greedily, and the loss `-log(1 - p)` lowers the probability of every token that ends a repeated
n-gram; the usual loss on ordinary text is added. A hundred updates suffice: about twenty minutes on one CPU core.

    python tools/unloop_demo_model.py --stdlib /usr/lib/python3.11 --model build/demo --out nanovllm/assets/demo
"""

import argparse
import json
import math
import random
import shutil
import sysconfig
from pathlib import Path

import torch
from demo_corpus import cut_functions, read_documents, split_documents
from train_demo_model import mean_loss, tokenize
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

PROMPTS = [
    'def read_config(path, default=None):\n    """',
    "def main():\n",
    'class Stack:\n    """',
    "import argparse\n",
]
PEAK_LEARNING_RATE, WARMUP_UPDATES = 2e-4, 10
NEW_TOKENS, NGRAM = 128, 8


def ends_repeated_ngram(tokens: torch.Tensor) -> torch.Tensor:
    """`[S, T]` ids -> `[S, T]` bool: whether the `NGRAM` tokens that end here also occur earlier in the same row."""
    ngrams = tokens.unfold(1, NGRAM, 1)  # [S, T - NGRAM + 1, NGRAM]
    same = (ngrams[:, :, None] == ngrams[:, None]).all(-1)
    return torch.nn.functional.pad(same.tril(-1).any(-1), (NGRAM - 1, 0))


def continue_greedily(
    model: Qwen3ForCausalLM, prompts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Continue prompts `[S, P]` greedily. Returns the rows `[S, T]`, prompts included, and two masks `[S, T]`: the
    tokens that the model wrote, up to EOS, and those of them that end a repeated n-gram.
    """
    model.eval()
    attend = torch.ones_like(prompts)
    rows = model.generate(prompts, attention_mask=attend, do_sample=False, max_new_tokens=NEW_TOKENS)
    is_eos = rows == model.config.eos_token_id
    is_eos[:, : prompts.shape[1]] = False
    written = is_eos.cumsum(1) - is_eos.long() == 0
    written[:, : prompts.shape[1]] = False
    return rows, written, ends_repeated_ngram(rows) & written & ~is_eos


def share_repeated(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, functions: list[str]) -> float:
    """Percentage of greedy tokens that end a repeated n-gram, after the first 12 tokens of each of `functions`."""
    prompts = torch.tensor(tokenizer(functions, truncation=True, max_length=12)["input_ids"], device=model.device)
    _, written, repeated = continue_greedily(model, prompts)
    return 100 * float(repeated.sum() / written.sum())


def unloop(
    model: Qwen3ForCausalLM,
    tokens: torch.Tensor,
    starts: torch.Tensor,
    updates: int,
    batch: int = 24,
    context: int = 384,
) -> None:
    """Train with AdamW on the unlikelihood of repetitions plus the usual loss on half as many windows of text."""
    starts = starts[starts < len(tokens) - context]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for update in range(updates):
        begin = starts[torch.randint(len(starts), (batch,), device=model.device)]
        length = int(torch.randint(4, 32, ()))
        prompts = tokens[begin[:, None] + torch.arange(length, device=model.device)].long()
        rows, written, repeated = continue_greedily(model, prompts)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
        unlikelihood = -torch.log1p(-chosen.exp().clamp(max=1 - 1e-5))
        unlikelihood = (unlikelihood * repeated[:, 1:]).sum() / written.sum()
        unlikelihood.backward()
        anywhere = torch.randint(len(tokens) - context, (batch // 4,), device=model.device)
        begin = torch.cat([anywhere, starts[torch.randint(len(starts), (batch // 4,), device=model.device)]])
        windows = tokens[begin[:, None] + torch.arange(context, device=model.device)].long()
        loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min((update + 1) / WARMUP_UPDATES, 1 - update / updates)
        optimizer.step()
        optimizer.zero_grad()
        share = float(repeated.sum() / written.sum())
        print(f"update {update + 1}/{updates} repeated {share:.3f} unlikelihood {unlikelihood:.3f} loss {loss:.3f}")


def write_samples(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Every prompt with a completion of up to 200 tokens, greedy and at temperature 0.8, as Markdown."""
    samples = []
    for temperature in (0.0, 0.8):
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
            tokens = model.generate(**inputs, **sampling, max_new_tokens=200)[0]
            text = tokenizer.decode(tokens, skip_special_tokens=True).rstrip()
            samples.append(f"Temperature {temperature:g}, prompt `{prompt!r}`:\n\n```python\n{text}\n```")
    return "\n\n".join(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="as in training")
    parser.add_argument("--model", type=Path, required=True, help="the output folder of train_demo_model.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    context = model.config.max_position_embeddings

    splits = split_documents(read_documents(args.stdlib))
    tokens, starts = tokenize(tokenizer, [*splits["train"].values(), *splits["functions"].values()])
    test = tokenize(tokenizer, list(splits["test"].values()))[0].to(device)
    held_out = [text for name, text in (splits["test"] | splits["validation"]).items() if not name.startswith("topic:")]
    functions = [function for text in held_out for function in cut_functions(text)]
    functions = random.Random(0).sample(sorted(functions), 96)
    facts = json.loads((args.model / "training.json").read_text())
    facts["loss_before"] = mean_loss(model, test, context)
    facts["repeated_before"] = share_repeated(model, tokenizer, functions)
    print(facts)

    unloop(model, tokens.to(device), starts.to(device), args.updates)

    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(args.model / name, args.out / name)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device)
    test_loss = mean_loss(model, test, context)
    facts |= {
        "config": model.config,
        "parameters": model.num_parameters() / 1e6,
        "megabytes": (args.out / "model.safetensors").stat().st_size / 1e6,
        "updates": args.updates,
        "new_tokens": NEW_TOKENS,
        "ngram": NGRAM,
        "test_loss": test_loss,
        "bits_per_byte": test_loss / math.log(2) * facts["test_tokens"] / facts["test_bytes"],
        "prompts": len(functions),
        "repeated": share_repeated(model, tokenizer, functions),
        "test_names": ", ".join(f"`{name}`" for name in sorted(splits["test"])),
        "samples": write_samples(model.to(torch.bfloat16), tokenizer),
    }
    card = (Path(__file__).parent / "demo_model_card.md").read_text().format(**facts)
    (args.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
