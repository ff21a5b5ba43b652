"""Yields a GGUF file's tensors as transformers names and orders them, with their blocks turned into numbers.

A tensor that holds numbers is a view of the mapped file. Blocks are dequantized by the gguf package a few rows at a
time, each piece straight into a tensor of the wanted dtype, so that no model lies in memory twice, and none in float32.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nanovllm.models.gguf_file import GGUFTensor, read_gguf

NUMBERS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PIECE = 1 << 17  # numbers dequantized at once: the temporaries stay in a core's cache; larger pieces take twice as long
SERIAL = 1 << 14  # numbers that PyTorch copies on one thread: with more, threads that wait for a busy core cost seconds

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
BLOCK = ATTENTION | {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Names that an architecture has beside, or instead of, those; {} is the expert's number, for [experts, …] tensors.
OTHER_NAMES = {
    "llama": {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
    "qwen3moe": {
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{}.gate_proj",
        "ffn_down_exps": "mlp.experts.{}.down_proj",
        "ffn_up_exps": "mlp.experts.{}.up_proj",
    },
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
IN_CONFIG = ("rope_freqs.weight",)  # which `gguf_config` reads
NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def read_gguf_tensors(
    path: Path, only: frozenset[str] | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor, or only those named, by transformers' names. Blocks become numbers of `dtype`.

    Raises as `read_gguf`, and ValueError for a tensor that the architecture has not, or of a type that is not read.
    """
    file = read_gguf(path)
    architecture = file.metadata.get("general.architecture")
    for gguf_name, tensor in file.tensors.items():
        name = None if gguf_name in IN_CONFIG else hf_name(gguf_name, architecture)
        if name is None or (only is not None and name not in only and "{}" not in name):
            continue
        try:
            numbers = to_torch(tensor, dtype)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"tensor {gguf_name!r} in {path} of type {tensor.type_name}: {error}") from error
        numbers = undo_conversion(numbers, name, architecture, file.metadata)
        if "{}" not in name:
            yield name, numbers
            continue
        for i, expert in enumerate(numbers):  # [experts, rows, columns]
            if only is None or name.format(i) in only:
                yield name.format(i), expert


def hf_name(gguf_name: str, architecture: str) -> str:
    """transformers' name of a tensor. Raises ValueError if the architecture has none of this name."""
    match = NAME.fullmatch(gguf_name)
    names = OUTSIDE if match and match[1] is None else BLOCK | OTHER_NAMES.get(architecture, {})
    if match is None or match[2] not in names:
        raise ValueError(f"tensor {gguf_name!r} is not known of the architecture {architecture!r}")
    block = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{block}{names[match[2]]}.{match[3]}"


def to_torch(tensor: GGUFTensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor's numbers: as the file has them, without a copy, or dequantized to `dtype`.

    Raises NotImplementedError, ValueError for a type that is not read.
    """
    if tensor.type_name in NUMBERS:
        return torch.from_numpy(tensor.data).view(NUMBERS[tensor.type_name]).view(tensor.shape)
    if tensor.type_name in ("I8", "I16", "I32", "I64"):
        raise ValueError("integers are no weights")
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.type_name]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    numbers = torch.empty(tensor.shape, dtype=dtype)
    flat, blocks = numbers.view(-1), tensor.data.reshape(-1, block_bytes)
    step = max(1, PIECE // block_size)
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step].reshape(
            1, -1
        )  # one row: gguf takes 16 rows at a time, whatever their size
        values = torch.from_numpy(gguf.dequantize(piece, kind)).view(-1)
        targets = flat[start * block_size : start * block_size + len(values)]
        for target, source in zip(targets.split(SERIAL), values.split(SERIAL), strict=True):
            target.copy_(source)
    return numbers


def undo_conversion(numbers: torch.Tensor, name: str, architecture: str, metadata: dict[str, Any]) -> torch.Tensor:
    """Undo what llama.cpp's converter does to the values: it turns Llama's rotation and adds 1 to Gemma's norms."""
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return numbers.float() - 1
    if architecture != "llama" or not re.search(r"\.[qk]_proj\.", name):
        return numbers
    num_heads = metadata["llama.attention.head_count"]
    if ".k_proj." in name:
        num_heads = metadata.get("llama.attention.head_count_kv", num_heads)
    if isinstance(num_heads, list):  # a number for each layer, all equal: see `gguf_config`
        num_heads = num_heads[0]
    # Pairs of features that are rotated together lie side by side here, and half a head apart in transformers.
    pairs = numbers.view(num_heads, -1, 2, *numbers.shape[1:])  # [heads, head_dim / 2, 2, …]
    return pairs.transpose(1, 2).reshape(numbers.shape)
