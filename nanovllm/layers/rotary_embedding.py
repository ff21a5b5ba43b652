"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) and its stretchings to longer contexts.

The rotation turns a pair of features (i, i + dim/2) of a query or key at position p by the angle p · inv_freq[i]. All
that a model can choose is in `inv_freq` and one factor on cos and sin, so each type is a function from the config to
those.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

RopeParameters = dict[str, Any]


class Rope:
    """How an attention layer rotates its queries and keys: the parameters, and the table made of them.

    Attributes:
        rotary_dim: how many of a head's dimensions, the first ones, are rotated.
        params: those of `rope_parameters`.
        cos_sin: `[max_position, rotary_dim]` float32, cosines then sines; None until `build_rope_tables`.
    """

    def __init__(self, rotary_dim: int, params: RopeParameters) -> None:
        self.rotary_dim = rotary_dim
        self.params = params
        self.cos_sin: torch.Tensor | None = None


def build_rope_tables(ropes: Iterable[Rope | None], max_position: int, device: str) -> None:
    """Make each rope's table, for positions below `max_position`. Equal parameters share one; None has none."""
    tables: dict[str, torch.Tensor] = {}
    for rope in ropes:
        if rope is not None:
            key = repr((rope.rotary_dim, sorted(rope.params.items())))
            if key not in tables:
                tables[key] = build_cos_sin(rope.rotary_dim, max_position, rope.params).to(device)
            rope.cos_sin = tables[key]


def rope_parameters(hf_config: Any, layer_type: str = "full_attention") -> RopeParameters:
    """The rope settings of a Hugging Face config in one spelling, with the names and the precedence of transformers 5.

    `rope_scaling` replaces `rope_parameters` whole, and `rope_theta` counts where neither has one. Types of layers may
    have settings of their own, by `layer_type`, if the config says so (`has_rope_by_layer_type`).

    Raises:
        ValueError: a setting is missing, of a wrong type, or not supported.
    """
    require_objects(hf_config)
    params = dict(getattr(hf_config, "rope_scaling", None) or getattr(hf_config, "rope_parameters", None) or {})
    if getattr(hf_config, "has_rope_by_layer_type", False):
        params = dict(params[layer_type])
    for key in {"full_attention", *(getattr(hf_config, "layer_types", None) or ())}:
        if key in params:
            raise ValueError(f"rope settings for each type of layer, as {key!r}, are not supported")
    params.setdefault("rope_theta", getattr(hf_config, "rope_theta", 10000.0))
    params.setdefault("rope_type", params.get("type", "default"))
    own = hf_config.max_position_embeddings
    if params["rope_type"] not in ("yarn", "llama3", "longrope"):
        params["original_max_position_embeddings"] = own  # the others do not read it
    elif hasattr(hf_config, "original_max_position_embeddings"):
        params["original_max_position_embeddings"] = hf_config.original_max_position_embeddings
    else:
        params.setdefault("original_max_position_embeddings", own)
    if getattr(hf_config, "partial_rotary_factor", None) is not None:
        params.setdefault("partial_rotary_factor", hf_config.partial_rotary_factor)
    _check(params)
    if params["rope_type"] in ("yarn", "longrope") and params.get("factor") is None:
        params["factor"] = own / params["original_max_position_embeddings"]
    return params


def require_objects(hf_config: Any) -> None:
    """Raises ValueError if the rope settings of a Hugging Face config are no JSON objects."""
    for key in ("rope_scaling", "rope_parameters"):
        value = getattr(hf_config, key, None)
        if not isinstance(value, dict | None):
            raise ValueError(f"{key}={value!r:.80} must be null or an object")


def _check(params: RopeParameters) -> None:
    rope_type = params["rope_type"]
    if not isinstance(rope_type, str) or rope_type not in _INV_FREQ:
        raise ValueError(f"rope_type={rope_type!r:.80} must be one of {', '.join(_INV_FREQ)}")
    required, optional = _SETTINGS[rope_type]
    for key in ("rope_theta", *required):
        if key not in params:
            raise ValueError(f"rope_type={rope_type!r} needs the setting {key!r}")
        if key in ("short_factor", "long_factor"):
            continue  # lists
        is_derived = (rope_type, key, params[key]) == ("yarn", "factor", None)
        if not is_derived and not (_is_finite(params[key]) and params[key] > 0):
            raise ValueError(f"{key}={params[key]!r:.80} of rope_type={rope_type!r} must be a finite number > 0")
    for key in optional:
        value = params.get(key)
        if value is not None and not (_is_finite(value) and (value >= 0 or not key.startswith("beta"))):
            raise ValueError(f"{key}={value!r:.80} of rope_type={rope_type!r} must be null or a finite number")
    if rope_type == "longrope":
        for key in ("short_factor", "long_factor"):
            if not (isinstance(params[key], list) and all(_is_finite(x) and x > 0 for x in params[key])):
                raise ValueError(f"{key}={params[key]!r:.80} of rope_type='longrope' must be a list of numbers > 0")
        if params["original_max_position_embeddings"] <= 1:
            raise ValueError("original_max_position_embeddings of rope_type='longrope' must exceed 1")
    if rope_type == "yarn" and params["rope_theta"] <= 1:
        raise ValueError(f"rope_theta={params['rope_theta']} of rope_type='yarn' must exceed 1")
    if rope_type == "llama3" and params["high_freq_factor"] <= params["low_freq_factor"]:
        raise ValueError(
            f"high_freq_factor={params['high_freq_factor']} must exceed low_freq_factor={params['low_freq_factor']}"
        )
    # transformers passes a factor over with the default type, and breaks on one with any other.
    if rope_type != "default" and params.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={params['partial_rotary_factor']!r:.80} must be 1 or absent")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def build_cos_sin(rotary_dim: int, max_position: int, params: RopeParameters) -> torch.Tensor:
    """The rotation of every position: `[max_position, rotary_dim]` float32, cosines then sines.

    `params` are those of `rope_parameters`.
    """
    inv_freq, scale = _INV_FREQ[params["rope_type"]](rotary_dim, max_position, params)
    angles = torch.arange(max_position, dtype=torch.float32)[:, None] * inv_freq  # [max_position, rotary_dim / 2]
    return torch.cat([angles.cos() * scale, angles.sin() * scale], dim=-1)


def _plain(dim: int, theta: float, stretch: torch.Tensor | float = 1.0) -> torch.Tensor:
    # In transformers' order of operations: a digit of rounding counts at far positions.
    return 1.0 / (stretch * theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _default(dim: int, max_position: int, params: RopeParameters) -> tuple[torch.Tensor, float]:
    return _plain(dim, params["rope_theta"]), 1.0


def _linear(dim: int, max_position: int, params: RopeParameters) -> tuple[torch.Tensor, float]:
    """Position interpolation (Chen et al., 2023, arXiv:2306.15595)."""
    return _plain(dim, params["rope_theta"]) / params["factor"], 1.0


def _dynamic(dim: int, max_position: int, params: RopeParameters) -> tuple[torch.Tensor, float]:
    """NTK-aware scaling, for the longest context this engine admits: keys stay valid as a sequence grows."""
    original, factor = params["original_max_position_embeddings"], params["factor"]
    length = max(max_position, original)
    stretch = (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
    return _plain(dim, params["rope_theta"] * stretch), 1.0


def _yarn(dim: int, max_position: int, params: RopeParameters) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., 2023, arXiv:2309.00071): fast features extrapolate, slow ones interpolate."""
    theta, original, factor = params["rope_theta"], params["original_max_position_embeddings"], params["factor"]

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    scale = params.get("attention_factor")
    if scale is None and params.get("mscale") and params.get("mscale_all_dim"):
        scale = magnitude(factor, params["mscale"]) / magnitude(factor, params["mscale_all_dim"])
    elif scale is None:
        scale = magnitude(factor)

    def feature_turning(rotations: float) -> float:  # the feature that makes so many turns over the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = feature_turning(params.get("beta_fast") or 32)
    high = feature_turning(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    extrapolated = 1 - ramp.clamp(0, 1)
    plain = _plain(dim, theta)
    return plain / factor * (1 - extrapolated) + plain * extrapolated, scale


def _llama3(dim: int, max_position: int, params: RopeParameters) -> tuple[torch.Tensor, float]:
    """Llama 3.1: wavelengths past the original context are stretched, short ones kept, a ramp between."""
    original, factor = params["original_max_position_embeddings"], params["factor"]
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    plain = _plain(dim, params["rope_theta"])
    wavelength = 2 * math.pi / plain
    kept = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - kept) + plain * kept, 1.0


def _longrope(dim: int, max_position: int, params: RopeParameters) -> tuple[torch.Tensor, float]:
    """LongRoPE (Ding et al., 2024, arXiv:2402.13753): each feature is stretched by a factor of its own.

    There are factors for the original context and for longer ones. transformers chooses them anew as a sequence grows
    past the original context, and computes all its keys again. Here the longest context that the engine admits
    chooses, as in vLLM.
    """
    original, factor = params["original_max_position_embeddings"], params["factor"]
    stretch = params["long_factor" if max_position > original else "short_factor"]
    if len(stretch) != dim // 2:
        raise ValueError(
            f"rope_type='longrope' has {len(stretch)} factors: must be {dim // 2}, half of the rotary dimension"
        )
    scale = params.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return _plain(dim, params["rope_theta"], torch.tensor(stretch, dtype=torch.float32)), scale


_INV_FREQ: dict[str, Callable[[int, int, RopeParameters], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
# type: (the settings it requires, those it accepts), beside rope_theta. All are numbers.
_SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}
