"""Small random checkpoints, as transformers writes them, and what transformers itself answers with them."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.step_plan import StepPlan
from nanovllm.worker.cuda_graph import StepShape

VOCAB_SIZE = 211
MAX_POSITIONS = 320

TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# Qwen3-0.6B's widths with few layers: a vocabulary and activations whose memory counts.
WIDE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}

ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 50000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 5.0,
        "original_max_position_embeddings": MAX_POSITIONS // 5,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 50000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": MAX_POSITIONS // 5,
    },
}

# heads / kv_heads are 1, 2, 3 and 7
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mha-tied-bias": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "gqa3-dim48": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 48, "rope_parameters": ROPE["yarn"]},
    "gqa7-dim24-tied": {
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "tie_word_embeddings": True,
        "rope_parameters": ROPE["llama3"],
    },
    "gqa3-bias-linear": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "rope_parameters": ROPE["linear"],
    },
    "gqa2-dynamic": {"rope_parameters": ROPE["dynamic"], "head_dim": 32, "num_hidden_layers": 3},
}

# Chosen so that no greedy choice in the tests is a close one, which float32 rounding could decide.
SEEDS = {"mha-tied-bias": 2, "gqa7-dim24-tied": 5, "gqa3-bias-linear": 2}


def make_model(shape: dict[str, Any], seed: int = 0) -> Qwen3ForCausalLM:
    """A float32 model whose every parameter is random, norms and biases included, so that none can be mixed up."""
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**{**TINY, **shape})).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if "norm" in name:
                param.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                param.copy_(0.3 * noise)
            else:  # large enough that greedy continuations wander instead of repeating one token
                param.copy_(noise * (1.6 if "embed" not in name else 1.0) / param.shape[-1] ** 0.5)
    return model


def save_checkpoint(path: Path, shape: dict[str, Any], seed: int = 0, max_shard_size: str = "1GB") -> Path:
    make_model(shape, seed).save_pretrained(path, max_shard_size=max_shard_size)
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


def set_eos(path: Path, eos_token_id: int | list[int]) -> None:
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))


def save_byte_tokenizer(path: Path) -> None:
    """A tokenizer whose ids 0 … 255 are bytes; 256 is its end-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(path)


def save_spaced_tokenizer(path: Path) -> int:
    """One like Llama's: spaces are in the tokens, and the decoder leaves the first of a text out. Returns its size.

    A prompt begins with `<s>`, id 1.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = ["▁", "▁hi", "▁world", "▁a", *"abcdefghijklmnopqrstuvwxyz!."]
    pieces = [(token, 0.0) for token in ("<unk>", "<s>", "</s>")] + [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces += [(word, -float(3 - len(word.strip("▁")) / 2)) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(path)
    return len(pieces)


@lru_cache(maxsize=2)
def reference_model(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()


@dataclass(slots=True)
class Reference:
    """What transformers says: `generate`, greedy, one prompt at a time, no padding."""

    path: Path
    device: str = "cpu"

    def greedy(self, prompt: list[int], num_tokens: int, eos_token_id: Any = None) -> list[int]:
        model = reference_model(self.path, self.device)
        ids = torch.tensor([prompt], device=self.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=eos_token_id,
            pad_token_id=0,
            use_cache=True,
        )
        return out[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def logits(self, token_ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`[tokens, vocab]` float32 of one forward pass."""
        model = reference_model(self.path, self.device, dtype)
        return model(torch.tensor([token_ids], device=self.device)).logits[0].float().cpu()


def random_prompts(lengths: list[int], seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def drawn_logits(llm: LLM, prompt: list[int], num_tokens: int = 1) -> torch.Tensor:
    """The logits `[num_tokens, vocab]` float32 from which the engine draws each token of a greedy continuation.

    CUDA graphs replay what they recorded, so with `num_tokens > 1` the engine must be eager.
    """
    runner = llm.engine.runner
    model, batch, seen, places = runner.model, runner.batch, [], []
    compute, apply = model.compute_logits, batch.apply

    def note_place(plan: StepPlan, slot: int, shape: StepShape) -> None:
        if plan.num_samples:
            places.append(0 if plan.num_decodes else shape.num_decodes)  # a prompt comes after padded decodes
        apply(plan, slot, shape)

    batch.apply = note_place
    model.compute_logits = lambda hidden: seen.append(compute(hidden)) or seen[-1]
    try:
        llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=num_tokens), use_tqdm=False)
    finally:
        del model.compute_logits, batch.apply
    return torch.stack([logits[place].float().cpu() for logits, place in zip(seen, places, strict=True)][:num_tokens])
