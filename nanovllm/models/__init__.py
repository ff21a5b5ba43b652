"""The models there are, by the name that a checkpoint's config.json gives its architecture."""

import importlib
from typing import Any

ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3"}


def model_class(architectures: Any) -> type:
    """The class for the `architectures` of a config.json. Raises ValueError if there is none."""
    for name in architectures if isinstance(architectures, list) else []:
        if isinstance(name, str) and name in ARCHITECTURES:
            return getattr(importlib.import_module(f"nanovllm.models.{ARCHITECTURES[name]}"), name)
    raise ValueError(f"architectures={architectures} in config.json must name one of {', '.join(ARCHITECTURES)}")
