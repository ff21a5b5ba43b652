"""The registry of models: finds the class for the architecture that a checkpoint's config.json names."""

import importlib
from typing import Any

ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3"}


def model_class(architectures: Any) -> type:
    """The class for a config.json's `architectures`. Raises ValueError if we have none of them."""
    for name in architectures if isinstance(architectures, list) else []:
        if isinstance(name, str) and name in ARCHITECTURES:
            return getattr(importlib.import_module(f"nanovllm.models.{ARCHITECTURES[name]}"), name)
    raise ValueError(f"architectures={architectures} in config.json must name one of {', '.join(ARCHITECTURES)}")
