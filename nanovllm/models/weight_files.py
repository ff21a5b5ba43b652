"""Finds the *.safetensors files that make up a checkpoint, and reads the tensors in them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nanovllm.models.gguf_file import is_gguf

# Of models that see images too: the parts that are not text, and what stands before a text part's names
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
TEXT_PREFIXES = {"language_model.": "", "model.language_model.": "model."}


def text_name(name: str) -> str | None:
    """A tensor's name in a model of text alone; None if it belongs to another part."""
    if name.startswith(OTHER_PARTS):
        return None
    for prefix, own in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def read_tensors(
    path: Path, only: frozenset[str] | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of text, or only those named, mapped from its file: only the parts that are used are read.

    `dtype` is for what a GGUF file holds in blocks: see `gguf_weights.read_gguf_tensors`, which raises ValueError, too.

    Raises:
        FileNotFoundError: there are no weights, or a file that the index lists is missing.
        OSError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if is_gguf(path):
        from nanovllm.models.gguf_weights import read_gguf_tensors

        yield from read_gguf_tensors(path, only, dtype)
        return
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 -- not a dict
                    own = text_name(name)
                    if own is not None and (only is None or own in only):
                        yield own, tensors.get_tensor(name)
        except SafetensorError as error:
            raise OSError(f"{file} is damaged: {error}") from error


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's files. As in transformers, model.safetensors wins over an index, which may be older."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no *.safetensors in {path}")
        return files
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    if not is_map or not weight_map:
        raise ValueError(f"{index} must have a 'weight_map' from tensor names to files")
    files = [path / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file.name} is listed in {index.name} but not in {path}")
    return files


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, if it does not hold a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content
