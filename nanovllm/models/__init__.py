"""The models there are, by the name that a checkpoint's config.json gives its architecture."""

import importlib
from typing import Any

ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3"}


def model_class(hf_config: Any) -> type:
    """The class for a config's architecture. Raises ValueError if there is none."""
    names = getattr(hf_config, "architectures", None) or []
    for name in names:
        if name in ARCHITECTURES:
            return getattr(importlib.import_module(f"nanovllm.models.{ARCHITECTURES[name]}"), name)
    raise ValueError(f"architectures={names} in config.json must name one of {', '.join(ARCHITECTURES)}")
