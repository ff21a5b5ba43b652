"""Of a model that sees images too, the engine runs the text part, and answers as transformers' whole model does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import make_family_model, model_config
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.models.checkpoint_config import load_hf_config

PROMPT = list(range(20, 60))
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 16,
    "patch_size": 8,
}


def make_whole_model(name: str, **changes: Any) -> transformers.PreTrainedModel:
    """A small model with a vision part, whose text part is that of `families.py`."""
    text, weights = model_config(name).to_dict(), make_family_model(name).state_dict()
    if name.startswith("gemma3"):
        vision = {**VISION, "model_type": "siglip_vision_model"}
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=1, **changes
        )
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        vision = {**VISION, "head_dim": 16, "model_type": "pixtral"}
        model = transformers.Mistral3ForConditionalGeneration(
            transformers.Mistral3Config(text_config=text, vision_config=vision, **changes)
        )
    model.model.language_model.load_state_dict(
        {key.removeprefix("model."): tensor for key, tensor in weights.items() if key.startswith("model.")}
    )
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.data.copy_(weights["lm_head.weight"] * 0.9)
    return model.eval()


@torch.inference_mode()
def answer_of(model: transformers.PreTrainedModel) -> list[int]:
    ids = list(PROMPT)
    for _ in range(GREEDY.max_tokens):
        best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-3
        ids.append(int(best.indices[0]))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["mistral-window", "ministral3", "gemma3"])
def test_tokens_are_the_whole_models_and_its_config_says_whether_the_head_is_tied(
    name: str, tie: bool, tmp_path: Path, make_llm: Callable[..., LLM]
) -> None:
    model = make_whole_model(name, tie_word_embeddings=tie)
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    if tie:
        edit_config(tmp_path, tie_word_embeddings=None)  # its default, whatever the part says
    expected = answer_of(model)
    llm = make_llm(tmp_path)
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
    # As newer checkpoints name the tensors
    newer = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    tensors = load_file(tmp_path / "model.safetensors")
    for old, new in newer.items():
        tensors = {new + key.removeprefix(old) if key.startswith(old) else key: t for key, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert make_llm(tmp_path).generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
    # And as a trainer of the whole model does
    llm.load_weights([(key, torch.zeros_like(t)) for key, t in tensors.items()])
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids != expected
    llm.load_weights(tensors.items())
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_what_the_whole_model_asks_for_and_we_lack_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="quantization_config with quant_method='fp8'"):
        load_hf_config(tmp_path)
    write_config(tmp_path)
    edit_config(tmp_path, text_config={"model_type": "gpt2"})
    with pytest.raises(ValueError, match="model_type='gpt2': must be one of mistral, ministral3"):
        load_hf_config(tmp_path)


def test_overrides_are_of_the_text_part(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert load_hf_config(tmp_path)[0].sliding_window == 23
    assert load_hf_config(tmp_path, {"sliding_window": 64})[0].sliding_window == 64


def write_config(path: Path, **changes: Any) -> None:
    content = make_whole_model("mistral-window").config.to_dict() | changes
    (path / "config.json").write_text(
        json.dumps(content | {"architectures": ["Mistral3ForConditionalGeneration"]}, default=str)
    )


def edit_config(path: Path, **changes: Any) -> None:
    """None removes a key."""
    content = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
