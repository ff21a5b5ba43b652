"""Derives what a config.json may leave out about its layers, as transformers 5 does."""

from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


def every(interval: int, num_layers: int) -> list[str]:
    """Sliding windows, and full attention in every `interval`th layer."""
    return [SLIDING if (index + 1) % interval else FULL for index in range(num_layers)]


def sliding_from(first: int, num_layers: int) -> list[str]:
    """Full attention, and sliding windows from layer `first` on."""
    return [SLIDING if index >= first else FULL for index in range(num_layers)]


def same_everywhere(config: Any) -> list[str]:
    """Sliding windows in all layers if the config has a window."""
    return [FULL if config.sliding_window is None else SLIDING] * config.num_hidden_layers


def use_window_if_asked(config: Any) -> None:
    """Qwen's rule: `use_sliding_window` decides whether there is a window, `max_window_layers` from which layer on."""
    if not config.use_sliding_window:
        config.sliding_window = None
    if config.layer_types is None:
        first = config.num_hidden_layers if config.sliding_window is None else config.max_window_layers
        config.layer_types = sliding_from(first, config.num_hidden_layers)


def rope_by_layer_type(config: Any, local_key: str | None, local_theta: float) -> None:
    """Give the config RoPE settings for each type of layer. `rope_scaling` and `rope_theta` are of full attention.

    Args:
        local_key: the key with the base for sliding windows; None: there is no such key.
        local_theta: the base for sliding windows that no key names.

    Raises ValueError if `rope_parameters` are not by type of layer.
    """
    given = config.rope_parameters or {}
    for key, value in given.items():
        if key not in (FULL, SLIDING) or not isinstance(value, dict | None):
            raise ValueError(f"rope_parameters has {key!r}: {value!r:.80}; must have an object for each type of layer")
    params = {layer_type: dict(given.get(layer_type) or {"rope_type": "default"}) for layer_type in (FULL, SLIDING)}
    params[FULL].update(config.rope_scaling or {})
    params[FULL].setdefault("rope_theta", config.rope_theta)
    params[SLIDING].setdefault("rope_theta", getattr(config, local_key or "", local_theta))
    config.rope_parameters, config.rope_scaling = params, None
