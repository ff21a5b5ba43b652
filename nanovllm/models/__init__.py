"""The registry of models: finds the class for the architecture that a checkpoint's config.json names."""

import importlib
from typing import Any

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "mistral",
    "Ministral3ForCausalLM": "ministral3",
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
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
}
# Keys of the whole model's config that hold for its text part too, unless that has them
OF_ALL_PARTS = (
    "dtype",
    "torch_dtype",
    "eos_token_id",
    "quantization_config",
    "compression_config",
    "transformers_weights",
)


def model_class(architectures: Any) -> type:
    """The class for a config.json's `architectures`. Raises ValueError if we have none of them."""
    for name in architectures if isinstance(architectures, list) else []:
        if isinstance(name, str) and name in ARCHITECTURES:
            return getattr(importlib.import_module(f"nanovllm.models.{ARCHITECTURES[name]}"), name)
    known = ", ".join([*ARCHITECTURES, *TEXT_PARTS])
    raise ValueError(f"architectures={architectures} in config.json must name one of {known}")


def text_part(content: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The config of the text part of a model that sees images too; the config itself for all others.

    `overrides` replace keys of the config, and of the part. Raises ValueError if we do not have the text part.
    """
    content = content | overrides
    architectures = content.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or name not in TEXT_PARTS:
        return content
    text = content.get("text_config")
    model_type = text.get("model_type", next(iter(TEXT_PARTS[name]))) if isinstance(text, dict) else None
    if not isinstance(model_type, str) or model_type not in TEXT_PARTS[name]:
        allowed = ", ".join(TEXT_PARTS[name])
        raise ValueError(f"text_config of {name} has model_type={model_type!r:.80}: must be one of {allowed}")
    shared = {key: content[key] for key in OF_ALL_PARTS if key in content}
    # transformers ties the whole model's head, whatever the part says
    tie = content.get("tie_word_embeddings", True)
    own = {"architectures": [TEXT_PARTS[name][model_type]], "tie_word_embeddings": tie, "model_type": model_type}
    return shared | text | {key: value for key, value in overrides.items() if key != "text_config"} | own
