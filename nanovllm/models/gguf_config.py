"""Translates a GGUF file's metadata into the config.json that transformers would have written for the model.

`checkpoint_config` then checks it as it checks any config.json. What GGUF leaves out, llama.cpp's code decides, and so
does this module: the pattern of Gemma's windows, for one.
"""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm.models.gguf_file import GGUFFile, read_gguf

logger = logging.getLogger(__name__)

# Keys of an architecture, below its name, that this module reads or may pass over. Others are warned of.
READ = {
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window", "attention.sliding_window_pattern"),
    *("attention.key_length_swa", "attention.value_length_swa", "final_logit_softcapping"),
    *("rope.dimension_count", "rope.dimension_count_swa", "rope.freq_base", "rope.freq_base_swa"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    *("expert_count", "expert_used_count", "expert_feed_forward_length"),
}
# What changes the computation, and no family here has: key -> the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}
# Texts of tokens at which llama.cpp ends a generation, whatever eos_token_id says. Control tokens only.
END_TOKENS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>")
CONTROL = 3  # among the types of tokens


def read_config(path: Path) -> dict[str, Any]:
    """The config of the model in a GGUF file. Raises as `read_gguf`, and ValueError for what we lack, naming it."""
    file = read_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture={architecture!r:.80} is not supported: GGUF files are read of "
            f"{', '.join(ARCHITECTURES)}"
        )
    try:
        keys = _Keys(file, architecture)
        return _common(keys) | ARCHITECTURES[architecture](keys)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Keys:
    """The metadata of one architecture: `keys("block_count")` is `llama.block_count`."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture
        prefix = f"{architecture}."
        own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
        for key, neutral in NEUTRAL.items():
            if key in own and own[key] not in neutral:
                raise ValueError(f"{prefix}{key}={own[key]!r:.80} is not supported")
        unknown = own.keys() - READ - NEUTRAL.keys()
        if unknown:
            names = ", ".join(prefix + key for key in sorted(unknown))
            logger.warning("%s has metadata that is passed over: %s", file.path, names)
        self._own = own

    def __call__(self, key: str, default: Any = None) -> Any:
        """A value, of all layers if it is a list. Raises ValueError without it or a default, and for unequal layers."""
        value = self._own.get(key, default)
        if value is None:
            raise ValueError(f"{self.architecture}.{key} is missing")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ValueError(
                    f"{self.architecture}.{key}={value!r:.80}: layers of different shapes are not supported"
                )
            return value[0]
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self(key, default)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.architecture}.{key}={value!r:.80} must be an integer >= 1")
        return value

    def raw(self, key: str) -> Any:
        return self._own.get(key)

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors


def _common(keys: _Keys) -> dict[str, Any]:
    """What all families have."""
    metadata, tensors = keys.file.metadata, keys.file.tensors
    if "token_embd.weight" not in tensors:
        raise ValueError("tensor 'token_embd.weight' is missing: it holds no language model")
    hidden_size, num_heads = keys.size("embedding_length"), keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        if keys(key, head_dim) != head_dim:
            raise ValueError(f"{keys.architecture}.{key}={keys(key)}, unlike the keys' {head_dim}, is not supported")
    for key in ("rope.dimension_count", "rope.dimension_count_swa"):
        if keys(key, head_dim) != head_dim:
            raise ValueError(f"{keys.architecture}.{key}={keys(key)}, unlike head_dim={head_dim}, is not supported")
    return {
        "dtype": "float32" if all(t.type_name == "F32" for t in tensors.values()) else "bfloat16",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": keys("feed_forward_length", keys.raw("expert_feed_forward_length")),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not keys.has("output.weight"),
        "rope_parameters": _rope(keys),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_ids(metadata),
    }


def _eos_token_ids(metadata: dict[str, Any]) -> list[int]:
    names = ("eos", "eot", "eom")
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    types = metadata.get("tokenizer.ggml.token_type", [])
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    control = (i for i, kind in enumerate(types) if kind == CONTROL and i < len(tokens))
    ids += [i for i in control if tokens[i] in END_TOKENS]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _rope(keys: _Keys) -> dict[str, Any]:
    theta = float(keys("rope.freq_base", 10000.0))
    kind = keys("rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if keys.has("rope_freqs.weight"):
        if kind != "none":
            raise ValueError(f"rope.scaling.type={kind!r} beside a tensor 'rope_freqs.weight' is not supported")
        return rope | _llama3(keys, theta)
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type={kind!r:.80} is not supported: none, linear and yarn are")
    rope |= {"rope_type": kind, "factor": float(keys("rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = keys("rope.scaling.original_context_length", keys("context_length"))
        for name in ("beta_fast", "beta_slow"):
            if keys.raw(f"rope.scaling.yarn_{name}") is not None:
                rope[name] = keys(f"rope.scaling.yarn_{name}")
    return rope


def _llama3(keys: _Keys, theta: float) -> dict[str, Any]:
    """The settings of which llama.cpp's converter made the tensor of factors: Llama 3.1's, with any factor."""
    tensor = keys.file.tensors["rope_freqs.weight"]
    if tensor.type_name != "F32":
        raise ValueError(f"tensor 'rope_freqs.weight' is {tensor.type_name}, and F32 is supported")
    factors = tensor.data.view(np.float32).astype(np.float64)
    if np.all(factors == 1):
        return {}
    plain = theta ** (-np.arange(len(factors)) / len(factors))
    factor, low, high = float(factors.max()), 1.0, 4.0
    for original in (keys("rope.scaling.original_context_length", 8192), 8192):
        kept = np.clip((original * plain / (2 * math.pi) - low) / (high - low), 0, 1)
        if np.allclose(1 / factors, (1 - kept) / factor + kept, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError("tensor 'rope_freqs.weight' scales the rotation as Llama 3.1 does not: that is not supported")


def _llama(keys: _Keys) -> dict[str, Any]:
    """Llama, and what llama.cpp calls so: Mistral, SmolLM, and with experts Mixtral."""
    window = keys.raw("attention.sliding_window")
    if keys("expert_count", 0):
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_act": "silu",
            "sliding_window": window,
            "num_local_experts": keys("expert_count"),
            "num_experts_per_tok": keys("expert_used_count"),
        }
    if window:
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "sliding_window": window,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": keys.has("blk.0.attn_output.bias"),
        "mlp_bias": keys.has("blk.0.ffn_gate.bias"),
    }


def _qwen2(keys: _Keys) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def _qwen3(keys: _Keys) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": keys.has("blk.0.attn_output.bias"),
        "use_sliding_window": False,
    }


def _qwen3moe(keys: _Keys) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "attention_bias": keys.has("blk.0.attn_output.bias"),
        "num_experts": keys("expert_count"),
        "num_experts_per_tok": keys("expert_used_count"),
        "moe_intermediate_size": keys("expert_feed_forward_length"),
        "norm_topk_prob": True,  # llama.cpp knows no other
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def _gemma3(keys: _Keys) -> dict[str, Any]:
    """Each sixth layer reads all; the others have a window, and rotate without the scaling."""
    hidden_size, num_heads, num_layers = map(keys.size, ("embedding_length", "attention.head_count", "block_count"))
    pattern = keys.raw("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        windowed = [bool(is_windowed) for is_windowed in pattern]
    else:
        windowed = [(i + 1) % (pattern or 6) != 0 for i in range(num_layers)]
    is_27b = num_layers == 62  # whose scale is made of another size; the file does not say so
    scale_by = hidden_size // num_heads if is_27b else keys.size("attention.key_length", hidden_size // num_heads)
    local = {"rope_type": "default", "rope_theta": float(keys("rope.freq_base_swa", 10000.0))}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": ["sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed],
        "query_pre_attn_scalar": scale_by,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys("final_logit_softcapping", 0.0) or None,
        "rope_parameters": {"sliding_attention": local, "full_attention": _rope(keys)},
    }


# general.architecture -> what its config has beside, or instead of, the common keys
ARCHITECTURES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma3": _gemma3,
}
