"""The registry of models: finds the class for the architecture that a checkpoint's config.json names."""

import importlib
from typing import Any

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "SmolLM3ForCausalLM": "smollm3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "GptOssForCausalLM": "gpt_oss",
}
# Models that see images too, of which we run the text part: architecture -> that of the part, by its model_type
TEXT_PARTS = {
    "Gemma3ForConditionalGeneration": {"gemma3_text": "Gemma3ForCausalLM"},
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM"},
}


def model_class(architectures: Any) -> type:
    """The class for a config.json's `architectures`. Raises ValueError if we have none of them."""
    for name in architectures if isinstance(architectures, list) else []:
        if isinstance(name, str) and name in ARCHITECTURES:
            return getattr(importlib.import_module(f"nanovllm.models.{ARCHITECTURES[name]}"), name)
    known = ", ".join([*ARCHITECTURES, *TEXT_PARTS])
    raise ValueError(f"architectures={architectures} in config.json must name one of {known}")


def text_part(content: dict[str, Any]) -> dict[str, Any]:
    """The config of the text part of a model that sees images too; the config itself for all others.

    Raises ValueError if we do not have the text part.
    """
    architectures = content.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or name not in TEXT_PARTS:
        return content
    text = content.get("text_config")
    model_type = text.get("model_type") if isinstance(text, dict) else None
    if model_type not in TEXT_PARTS[name]:
        allowed = ", ".join(TEXT_PARTS[name])
        raise ValueError(f"text_config of {name} has model_type={model_type!r:.80}: must be one of {allowed}")
    shared = {
        key: content[key] for key in ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings") if key in content
    }
    return shared | text | {"architectures": [TEXT_PARTS[name][model_type]]}
