"""Writes small transformers models as GGUF files, with the changes to names and values of llama.cpp's converter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

Quantize = Callable[[str, np.ndarray], GGMLQuantizationType]

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}


def write_gguf(
    path: Path,
    model: Any,
    metadata: dict[str, Any] | None = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    edit: Callable[[dict[str, np.ndarray]], Any] = lambda tensors: None,
) -> Path:
    """Write a model's config and weights; matrices of `kind`, the rest in float32.

    Args:
        metadata: further keys; a key of the architecture without its name begins with a dot: ".rope.scaling.type".
        edit: changes the tensors before they are written.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    keys = {f"{architecture}.{key}": value for key, value in metadata_of(config).items()}
    for key, value in (metadata or {}).items():
        keys[architecture + key if key.startswith(".") else key] = value
    for key, value in keys.items():
        add(writer, key, value)
    tensors = gguf_tensors(model, architecture)
    edit(tensors)
    for name, tensor in tensors.items():
        stored = kind if tensor.ndim > 1 and "rope" not in name else GGMLQuantizationType.F32
        if stored in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            writer.add_tensor(name, gguf.quants.quantize(tensor, stored))
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write a key in the type that llama.cpp's converter would give it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def metadata_of(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if config.model_type in ("mistral", "gemma3_text"):
        found["attention.sliding_window"] = config.sliding_window
    if hasattr(config, "num_experts_per_tok"):
        found["expert_count"] = getattr(config, "num_experts", None) or config.num_local_experts
        found["expert_used_count"] = config.num_experts_per_tok
    if config.model_type == "qwen3_moe":
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    return found


def gguf_tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """The model's weights as llama.cpp names and changes them. Each expert's become one tensor of all."""
    config = model.config
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in saved_weights(model).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and ".q_proj." in name:
            tensor = interleave(tensor, config.num_attention_heads)
        elif architecture == "llama" and ".k_proj." in name:
            tensor = interleave(tensor, config.num_key_value_heads)
        elif architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        stem, _, leaf = name.rpartition(".")
        part = names.get_name(stem)
        assert part is not None, name
        tensors[f"{part}.{leaf}"] = tensor.float().numpy()
    return tensors


def saved_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights by the names of a checkpoint, but all experts of a layer in one tensor, as the name map has them."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            weights[name.replace("gate_up_proj", "gate_proj.weight")] = gate
            weights[name.replace("gate_up_proj", "up_proj.weight")] = up
        else:
            weights[name + ".weight" if name.endswith("experts.down_proj") else name] = tensor
    return weights


def interleave(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`permute` of llama.cpp's converter: features half a head apart come to lie side by side."""
    return tensor.view(num_heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
