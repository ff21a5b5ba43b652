"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) and its stretchings to longer contexts.

A pair of features (i, i + dim/2) of a query or key at position p is rotated by the angle p · inv_freq[i]. Everything
a model can choose is in `inv_freq` and one factor on cos and sin, so each type is a function from the config to those.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

RopeParameters = dict[str, Any]


def rope_parameters(hf_config: Any) -> RopeParameters:
    """The rope settings of a Hugging Face config in one spelling, that of transformers 5.

    Reads `rope_parameters`, or the older `rope_theta` and `rope_scaling`.
    """
    params = dict(getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {})
    params.setdefault("rope_theta", getattr(hf_config, "rope_theta", None) or 10000.0)
    params["rope_type"] = params.get("rope_type") or params.get("type") or "default"
    params.setdefault("original_max_position_embeddings", hf_config.max_position_embeddings)
    return params


def build_cos_sin(rotary_dim: int, max_position: int, params: RopeParameters) -> torch.Tensor:
    """The rotation of every position: `[max_position, rotary_dim]` float32, cosines then sines.

    Raises:
        ValueError: `params["rope_type"]` is not one of those here, or a setting that it needs is missing.
    """
    if params["rope_type"] not in _INV_FREQ:
        raise ValueError(f"rope_type={params['rope_type']!r} must be one of {', '.join(_INV_FREQ)}")
    try:
        inv_freq, scale = _INV_FREQ[params["rope_type"]](rotary_dim, max_position, params)
    except KeyError as missing:
        raise ValueError(f"rope_type={params['rope_type']!r} needs the setting {missing}") from missing
    angles = torch.arange(max_position, dtype=torch.float32)[:, None] * inv_freq  # [max_position, rotary_dim / 2]
    return torch.cat([angles.cos() * scale, angles.sin() * scale], dim=-1)


def _plain(dim: int, theta: float) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


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

    def feature_turning(rotations: float) -> float:  # the feature that turns so often over the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = feature_turning(params.get("beta_fast") or 32)
    high = feature_turning(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
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


_INV_FREQ: dict[str, Callable[[int, int, RopeParameters], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
