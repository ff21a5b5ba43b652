"""Small random models of every family, made by transformers, which is also the oracle of what they answer."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import MAX_POSITIONS, ROPE, VOCAB_SIZE

from nanovllm.cache_groups import group_layers
from nanovllm.models.checkpoint_config import load_hf_config

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def longrope(features: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(features)],
        "long_factor": [1.0 + 0.7 * i for i in range(features)],
    }


# So that no greedy choice in the tests is a close one, which float32 rounding could decide
SEEDS = {"mistral-window": 2}
FULL, SLIDING = "full_attention", "sliding_attention"
# Queries grow at every 16th position
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 20.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.8,
}
# name -> (architecture, what differs from SMALL)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": ROPE["llama3"]}),
    "llama-7to1": ("Llama", {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 24, "hidden_size": 56}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": None}),
    "qwen2": ("Qwen2", {"head_dim": None, "hidden_size": 64}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1, "num_key_value_heads": 1},
    ),
    "qwen3-window": ("Qwen3", {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 2}),
    "mistral": ("Mistral", {"sliding_window": None, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "mistral-window": ("Mistral", {"sliding_window": 23}),
    "ministral": ("Ministral", {"sliding_window": 10, "layer_types": [SLIDING, FULL, SLIDING]}),
    "ministral3": ("Ministral3", {"rope_parameters": GROWING}),
    "ministral3-window": (
        "Ministral3",
        {"rope_parameters": {**GROWING, "mscale": 0.7, "mscale_all_dim": 1.0}, "sliding_window": 29},
    ),
    "phi3": (
        "Phi3",
        {"head_dim": None, "hidden_size": 64, "sliding_window": 27, "original_max_position_embeddings": 40},
    ),
    "phi3-partial": (
        "Phi3",
        {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3-long": (
        "Phi3",
        {
            "head_dim": None,
            "hidden_size": 64,
            "rope_parameters": longrope(8),
            "original_max_position_embeddings": 16,
        },
    ),
    "phi4-mini": (
        "Phi3",
        {
            "head_dim": None,
            "hidden_size": 64,
            "tie_word_embeddings": True,
            "rope_parameters": {**longrope(6), "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 16,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3-window": (
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": 12, "no_rope_layers": [0, 1, 0], "attention_bias": True},
    ),
    "olmo2": ("Olmo2", {"head_dim": None, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "olmo3": ("Olmo3", {"sliding_window": 17, "num_hidden_layers": 5, "head_dim": None}),
    "gemma2": ("Gemma2", {"sliding_window": 13, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}),
    "gemma2-nocap": (
        "Gemma2",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "attn_logit_softcapping": None, "sliding_window": 40},
    ),
    "gemma3": ("Gemma3", {"sliding_window": 18, "num_hidden_layers": 7, "query_pre_attn_scalar": 20}),
    "qwen3moe": ("Qwen3Moe", {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 36}),
    "qwen3moe-dense-between": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 22,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 31}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "head_dim": None, "num_key_value_heads": 4}),
    "gptoss": (
        "GptOss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 14,
            "num_hidden_layers": 4,
            "rope_parameters": {**ROPE["yarn"], "truncate": False},
        },
    ),
    "gemma3-scaled": (
        "Gemma3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "sliding_window": 25,
            "layer_types": [SLIDING, SLIDING, FULL],
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 5000.0},
            },
            "final_logit_softcapping": 5.0,
        },
    ),
}


def model_config(name: str, **more: Any) -> transformers.PretrainedConfig:
    """Of CONFIGS, with `more` values."""
    architecture, change = CONFIGS[name]
    config_name = {"Gemma3": "Gemma3Text"}.get(architecture, architecture)
    values = {**SMALL, **change, **more}
    values = {key: value for key, value in values.items() if key != "head_dim" or value is not None}
    return getattr(transformers, f"{config_name}Config")(**values)


def make_family_model(name: str, seed: int = 0, **more: Any) -> transformers.PreTrainedModel:
    """A float32 model whose every parameter is random, norms, biases and sinks included."""
    architecture, _ = CONFIGS[name]
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(model_config(name, **more)).eval()
    offset = 0.0 if architecture.startswith("Gemma") else 1.0
    with torch.no_grad():
        for key, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if "norm" in key:
                param.copy_(offset + 0.3 * noise)
            elif key.endswith("bias") or param.dim() == 1:
                param.copy_(0.3 * noise)
            else:
                param.copy_(noise * (1.6 if "embed" not in key else 1.0) / param.shape[-1] ** 0.5)
    return model


def save_family(path: Path, name: str, seed: int | None = None, **more: Any) -> Path:
    make_family_model(name, SEEDS.get(name, 0) if seed is None else seed, **more).save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


def cache_windows(path: Path) -> tuple[int | None, ...]:
    """The window of each group of layers in the cache."""
    config, _ = load_hf_config(path)
    window_of = {"full_attention": None, "sliding_attention": config.sliding_window}
    return group_layers([window_of[layer_type] for layer_type in config.layer_types]).windows


@lru_cache(maxsize=2)
def family_reference(path: Path) -> transformers.PreTrainedModel:
    """The oracle. Not sdpa: it passes over Gemma 2's soft caps."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.inference_mode()
def family_tokens(path: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers for each prompt, all computed anew for each. Asserts that no choice is a close one.

    Shorter prompts are padded behind their end, which attention does not look at.
    """
    rows = [list(prompt) for prompt in prompts]
    for _ in range(num_tokens):
        longest = max(map(len, rows))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        for row, of_row in zip(rows, family_reference(path)(padded, use_cache=False).logits, strict=True):
            (best, second), (token, _) = (of_two.tolist() for of_two in of_row[len(row) - 1].topk(2))
            assert best - second > 1e-3, (
                f"a choice as close as {best - second} proves nothing; give {path.name} another seed"
            )
            row.append(token)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
