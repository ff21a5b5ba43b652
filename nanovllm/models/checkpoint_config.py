"""Reads a checkpoint's config.json as transformers 5 does, or raises an error that names the key.

transformers accepts each key in one type only and refuses "1e-06", 320.0 and null; so do we. It ignores keys that it
does not know; so do we.
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nanovllm.layers.rotary_embedding import require_objects, rope_parameters
from nanovllm.models import model_class, text_part
from nanovllm.models.generation_config import are_token_ids
from nanovllm.models.gguf_config import read_config
from nanovllm.models.gguf_file import ggufs_in, is_gguf
from nanovllm.models.layer_types import FULL, SLIDING
from nanovllm.models.weight_files import read_json

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
_DEFAULTS = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10000.0}
_OF_SOME_FAMILIES = ("layer_types", "sliding_window")  # transformers passes them over in the others


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
        files = ", ".join(file.name for file in ggufs_in(path))
        raise FileNotFoundError(
            f"no config.json in {path}" + (f": give one of its GGUF files, {files}" if files else "")
        )
    content = text_part(read_config(path) if is_gguf(path) else read_json(file), overrides or {})
    cls = model_class(content.get("architectures"))
    content |= {key: content[name] for key, name in cls.also_called.items() if name in content}
    missing = [key for key in cls.required_config if key not in content]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    hf_config = SimpleNamespace(**{**_DEFAULTS, **cls.default_config, **content})
    for key in _OF_SOME_FAMILIES:
        if key not in cls.default_config:
            setattr(hf_config, key, None)
    try:
        _check_types(hf_config, cls)
        _refuse_unsupported(hf_config, cls)
        _complete(hf_config, cls)
        _check_layers(hf_config, cls)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return hf_config, cls


def _check_types(hf_config: Any, cls: type) -> None:
    keys = {*cls.required_config, *cls.default_config, "eos_token_id"}
    for key, (is_right, allowed) in _RULES.items():
        if key not in keys:
            continue
        value = getattr(hf_config, key, None)
        may_be_null = key in _MAY_BE_NULL or key not in cls.required_config and cls.default_config.get(key) is None
        if not is_right(value) and not (value is None and may_be_null):
            raise ValueError(f"{key}={value!r:.80} must be {allowed}{' or null' if may_be_null else ''}")


def _complete(hf_config: Any, cls: type) -> None:
    """Derive the sizes and the layers that the config leaves open."""
    require_objects(hf_config)
    if hf_config.num_key_value_heads is None:
        hf_config.num_key_value_heads = hf_config.num_attention_heads
    if hf_config.head_dim is None:
        if hf_config.hidden_size % hf_config.num_attention_heads:
            raise ValueError(
                f"hidden_size={hf_config.hidden_size} must be a multiple of num_attention_heads="
                f"{hf_config.num_attention_heads} where there is no head_dim"
            )
        hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
    hf_config.rotary_dim = hf_config.head_dim
    hf_config.has_rope_by_layer_type = cls.has_rope_by_layer_type
    cls.complete(hf_config)
    allowed = [name for name, activation in ACTIVATIONS.items() if activation in cls.activations]
    if hf_config.hidden_act not in allowed:
        raise ValueError(f"hidden_act={hf_config.hidden_act!r} must be one of {', '.join(allowed)}")
    hf_config.hidden_act = ACTIVATIONS[hf_config.hidden_act]


def _check_layers(hf_config: Any, cls: type) -> None:
    num_layers, layer_types = hf_config.num_hidden_layers, hf_config.layer_types
    if len(layer_types) != num_layers:
        raise ValueError(f"layer_types has {len(layer_types)} entries for num_hidden_layers={num_layers}")
    unknown = set(layer_types) - {FULL, SLIDING}
    if unknown:
        raise ValueError(f"layer_types has {min(unknown)!r}: must be of {FULL!r} and {SLIDING!r}")
    if SLIDING in layer_types and hf_config.sliding_window is None:
        raise ValueError(f"layer_types has {SLIDING!r}, but there is no sliding_window")
    if hf_config.rotary_dim % 2:
        raise ValueError(f"head_dim={hf_config.rotary_dim} must be even: rotary embedding rotates its halves")
    for layer_type in set(layer_types):
        rope_parameters(hf_config, layer_type)


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


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return _is_int(value) and value >= 1


def _is_float(value: object) -> bool:
    return isinstance(value, float) and 0.0 <= value < math.inf


def _is_cap(value: object) -> bool:
    return isinstance(value, float) and 0.0 < value < math.inf


def _are_ints(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_int, value))


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


_CAPS = ("final_logit_softcapping", "attn_logit_softcapping")
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
            "original_max_position_embeddings",
            "sliding_window",
            "sliding_window_pattern",
            "query_pre_attn_scalar",
            "no_rope_layer_interval",
            "num_experts",
            "num_local_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "decoder_sparse_step",
        ),
        (_is_size, "an integer >= 1"),
    ),
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "norm_topk_prob"),
        (_is_bool, "true or false"),
    ),
    **dict.fromkeys(_CAPS, (_is_cap, "a finite float > 0")),
    "rms_norm_eps": (_is_float, "a finite float >= 0"),
    "hidden_act": (_is_string, "a string"),
    "hidden_activation": (_is_string, "a string"),
    "max_window_layers": (_is_int, "an integer"),
    "no_rope_layers": (_are_ints, "a list of integers"),
    "mlp_only_layers": (_are_ints, "a list of integers"),
    "layer_types": (_are_strings, "a list of strings"),
    "eos_token_id": (are_token_ids, "a token id or a list of them"),
}
_MAY_BE_NULL = {"num_key_value_heads", "sliding_window", "layer_types", "eos_token_id", *_CAPS}
