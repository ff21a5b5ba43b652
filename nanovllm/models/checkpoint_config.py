"""Reads a checkpoint's config.json as transformers 5 does, or raises an error that names the key.

transformers accepts each key in one type only and refuses "1e-06", 320.0 and null; so do we. It ignores keys that it
does not know; so do we.
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nanovllm.layers.rotary_embedding import rope_parameters
from nanovllm.models import model_class
from nanovllm.models.generation_config import are_token_ids
from nanovllm.models.gguf_config import read_config
from nanovllm.models.gguf_file import is_gguf
from nanovllm.models.weight_files import read_json


def load_hf_config(path: Path, overrides: dict[str, Any] | None = None) -> tuple[Any, type]:
    """Read a checkpoint's config.json, or a GGUF file's metadata, fill in the defaults of optional keys, and find the
    model's class.

    `overrides` replace keys as if the file had them. We read plain JSON, because transformers' config class takes two
    seconds to import.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it names no architecture of ours, lacks a key, has a key of a wrong type, or asks for a feature
            that we lack.
    """
    file = path if is_gguf(path) else path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no config.json in {path}")
    content = (read_config(path) if is_gguf(path) else read_json(file)) | (overrides or {})
    cls = model_class(content.get("architectures"))
    missing = [key for key in cls.required_config if key not in content]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    hf_config = SimpleNamespace(**{**cls.default_config, **content})
    try:
        _check_types(hf_config)
        _refuse_unsupported(hf_config, cls)
        if hf_config.num_key_value_heads is None:
            hf_config.num_key_value_heads = hf_config.num_attention_heads
        rope_parameters(hf_config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return hf_config, cls


def _check_types(hf_config: Any) -> None:
    for key, (is_right, allowed) in _RULES.items():
        value = getattr(hf_config, key, None)
        if not is_right(value) and not (value is None and key in _MAY_BE_NULL):
            raise ValueError(f"{key}={value!r:.80} must be {allowed}{' or null' if key in _MAY_BE_NULL else ''}")
    if hf_config.head_dim % 2:
        raise ValueError(f"head_dim={hf_config.head_dim} must be even: rotary embedding rotates its halves")


def _refuse_unsupported(hf_config: Any, cls: type) -> None:
    for key in ("quantization_config", "compression_config"):
        quantization = getattr(hf_config, key, None)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise ValueError(f"{key} with quant_method={method!r:.80} is not supported: weights here are not quantized")
    for key in ("per_layer_config", "text_config", "transformers_weights"):
        if getattr(hf_config, key, None):
            raise ValueError(f"{key} is not supported")
    if getattr(hf_config, "model_type", cls.model_type) != cls.model_type:
        raise ValueError(f"model_type={hf_config.model_type!r:.80} is not that of {cls.__name__}, {cls.model_type!r}")
    if hf_config.hidden_act not in ("silu", "swish"):  # two names of one function
        raise ValueError(f"hidden_act={hf_config.hidden_act!r} must be 'silu'")
    _refuse_sliding_windows(hf_config)


def _refuse_sliding_windows(hf_config: Any) -> None:
    """`use_sliding_window` alone changes nothing: the other keys decide which layers have a window."""
    num_layers, layer_types = hf_config.num_hidden_layers, hf_config.layer_types
    if layer_types is None:
        first = hf_config.max_window_layers
        if hf_config.use_sliding_window and hf_config.sliding_window is not None and first < num_layers:
            raise ValueError(
                f"use_sliding_window=True with max_window_layers={first} is not supported: attention here is full"
            )
    elif len(layer_types) != num_layers:
        raise ValueError(f"layer_types has {len(layer_types)} entries for num_hidden_layers={num_layers}")
    elif set(layer_types) != {"full_attention"}:
        raise ValueError(f"layer_types={layer_types!r:.80} is not supported: attention here is full")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return _is_int(value) and value >= 1


def _is_float(value: object) -> bool:
    return isinstance(value, float) and 0.0 <= value < math.inf


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


# key: (check, what the check allows, in words).
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ),
        (_is_size, "an integer >= 1"),
    ),
    **dict.fromkeys(("attention_bias", "tie_word_embeddings", "use_sliding_window"), (_is_bool, "true or false")),
    "rms_norm_eps": (_is_float, "a finite float >= 0"),
    "hidden_act": (_is_string, "a string"),
    "max_window_layers": (_is_int, "an integer"),
    "sliding_window": (_is_int, "an integer"),
    "layer_types": (_are_strings, "a list of strings"),
    "eos_token_id": (are_token_ids, "a token id or a list of them"),
}
_MAY_BE_NULL = {"num_key_value_heads", "sliding_window", "layer_types", "eos_token_id"}
