"""config.json and the weights beside it: the tokens of transformers, or a refusal that names the file and the key."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Reference, random_prompts
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
PROMPT = random_prompts([20], seed=9)[0]
ABSENT = "<the key is absent>"  # a string, as xdist needs names of tests that are the same in all processes
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 80}

SERVED: list[dict[str, Any]] = [
    {"rope_scaling": YARN},
    {"rope_scaling": YARN, "rope_theta": 5e4, "rope_parameters": ABSENT},
    {"partial_rotary_factor": 0.5},
    {"use_sliding_window": True, "sliding_window": 4},  # layer_types are all full
    {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0, "layer_types": ABSENT},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "layer_types": None},
    {"use_sliding_window": True, "layer_types": ABSENT, "max_window_layers": ABSENT, "sliding_window": ABSENT},
    {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0, "layer_types": None},
    {"hidden_act": "swish"},
    {"architectures": ["Other", "Qwen3ForCausalLM"]},
    {"quantization_config": None},
    {"attn_logit_softcapping": 50.0, "mlp_bias": True, "attention_dropout": 0.5, "rotary_pct": 0.5, "use_cache": False},
    {"eos_token_id": [999, -1, 2**40]},
    {"eos_token_id": []},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rms_norm_eps": "1e-06"}, "rms_norm_eps='1e-06' must be a finite float >= 0"),
    ({"rms_norm_eps": 1}, "rms_norm_eps=1"),
    ({"rms_norm_eps": None}, "rms_norm_eps=None"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"max_position_embeddings": 320.0}, "max_position_embeddings=320.0 must be an integer >= 1"),
    ({"max_position_embeddings": "320"}, "max_position_embeddings='320'"),
    ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
    ({"hidden_size": 64.0}, "hidden_size=64.0"),
    ({"hidden_size": ABSENT}, "lacks hidden_size"),
    ({"head_dim": None}, "head_dim=None"),
    ({"head_dim": 15}, "head_dim=15 must be even"),
    ({"num_key_value_heads": 2.0}, "num_key_value_heads=2.0 must be an integer >= 1 or null"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True"),
    ({"num_hidden_layers": 1}, "layer_types has 2 entries for num_hidden_layers=1"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
    ({"attention_bias": None}, "attention_bias=None"),
    ({"use_sliding_window": "no"}, "use_sliding_window='no'"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention', but there is no"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types has 'linear_attention': must be of"),
    ({"layer_types": "full_attention"}, "layer_types='full_attention' must be a list of strings or null"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' must be one of silu, swish"),
    ({"hidden_act": ["silu"]}, "hidden_act=['silu'] must be a string"),
    ({"model_type": "llama"}, "model_type='llama' is not that of Qwen3ForCausalLM"),
    ({"quantization_config": {"quant_method": "fp8", "bits": 8}}, "quantization_config with quant_method='fp8'"),
    ({"quantization_config": {}}, "quantization_config with quant_method=None"),
    (
        {"compression_config": {"quant_method": "compressed-tensors"}},
        "compression_config with quant_method='compressed",
    ),
    ({"per_layer_config": {"0": {"intermediate_size": 40}}}, "per_layer_config is not supported"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights is not supported"),
    ({"eos_token_id": "3"}, "eos_token_id='3'"),
    ({"eos_token_id": [[3]]}, "eos_token_id=[[3]]"),
    ({"eos_token_id": True}, "eos_token_id=True"),
]


@pytest.fixture
def model_dir(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    shutil.copytree(checkpoint("plain"), tmp_path / "model")
    return tmp_path / "model"


def edit_config(path: Path, change: dict[str, Any]) -> None:
    config = {**json.loads((path / "config.json").read_text()), **change}
    kept = {key: value for key, value in config.items() if value is not ABSENT}
    (path / "config.json").write_text(json.dumps(kept))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def answer(llm: LLM) -> list[int]:
    return llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"]


@pytest.mark.parametrize("change", SERVED, ids=str)
def test_what_transformers_takes_gives_its_tokens(
    change: dict[str, Any], model_dir: Path, make_llm: Callable[..., LLM]
) -> None:
    edit_config(model_dir, change)
    assert answer(make_llm(model_dir)) == Reference(model_dir).greedy(PROMPT, 8)


@pytest.mark.parametrize(("change", "named"), REFUSED, ids=str)
def test_what_it_refuses_or_we_have_not_is_refused_by_file_and_key(
    change: dict[str, Any], named: str, model_dir: Path, make_llm: Callable[..., LLM]
) -> None:
    edit_config(model_dir, change)
    with pytest.raises(ValueError, match=rf"config\.json:? .*{re.escape(named)}"):
        make_llm(model_dir)


def test_no_number_of_key_value_heads_means_one_for_each_head(tmp_path: Path, make_llm: Callable[..., LLM]) -> None:
    from checkpoints import save_checkpoint

    path = save_checkpoint(tmp_path, {"num_key_value_heads": 4})
    edit_config(path, {"num_key_value_heads": None})
    assert answer(make_llm(path)) == Reference(path).greedy(PROMPT, 8)


@pytest.mark.parametrize("architectures", [5, "Qwen3ForCausalLM", [["Qwen3ForCausalLM"]], {}])
def test_architectures_that_are_no_list_of_names_are_refused(
    architectures: Any, model_dir: Path, make_llm: Callable[..., LLM]
) -> None:
    edit_config(model_dir, {"architectures": architectures})
    with pytest.raises(ValueError, match="architectures=.* in config.json must name one of LlamaForCausalLM"):
        make_llm(model_dir)


@pytest.mark.parametrize(
    ("change", "weights", "expected"),
    [
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, torch.float32, torch.bfloat16),
        ({"dtype": None, "torch_dtype": "float16"}, torch.float32, torch.float16),
        ({"dtype": "half"}, torch.float32, torch.float16),
        ({"dtype": ABSENT}, torch.float32, torch.float32),
        ({"dtype": ABSENT}, torch.bfloat16, torch.bfloat16),
        ({"dtype": None}, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_dtype_is_transformers_choice(
    change: dict[str, Any], weights: torch.dtype, expected: torch.dtype, model_dir: Path, make_llm: Callable[..., LLM]
) -> None:
    from transformers import Qwen3ForCausalLM

    edit_config(model_dir, change)
    edit_tensors(model_dir, lambda tensors: tensors.update({k: v.to(weights) for k, v in tensors.items()}))
    assert Qwen3ForCausalLM.from_pretrained(model_dir).dtype is expected
    assert make_llm(model_dir, dtype="auto").engine.runner.dtype is expected


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "float64", "int8", "", 16, ["float32"]])
def test_dtype_that_is_none_of_ours_is_named(dtype: Any, model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    edit_config(model_dir, {"dtype": dtype})
    with pytest.raises(ValueError, match=f"dtype={re.escape(repr(dtype))} in config.json is not supported"):
        make_llm(model_dir, dtype="auto")
    assert answer(make_llm(model_dir)) is not None  # float32 is asked for


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool], ids=str)
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_tensor_that_is_no_plain_weight_is_refused_by_name(
    name: str, dtype: torch.dtype, model_dir: Path, make_llm: Callable[..., LLM]
) -> None:
    edit_tensors(model_dir, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=f"tensor '{name}' in .* is {dtype}: weights must be float32, bfloat16"):
        make_llm(model_dir)


@pytest.mark.parametrize("index", ["of other weights", "of a file that is gone", "damaged"])
def test_whole_file_goes_before_an_index_left_beside_it(
    index: str, model_dir: Path, make_llm: Callable[..., LLM]
) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    if index == "of other weights":
        save_file({k: v * 0.5 for k, v in tensors.items()}, model_dir / "old.safetensors", metadata={"format": "pt"})
    weight_map = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "old.safetensors")})
    (model_dir / "model.safetensors.index.json").write_text("{" if index == "damaged" else weight_map)
    assert answer(make_llm(model_dir)) == Reference(model_dir).greedy(PROMPT, 8)


def test_folder_without_tokenizer_is_named_at_load(model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(FileNotFoundError, match=f"no tokenizer in {model_dir}: .*tokenizer=.*skip_tokenizer_init=True"):
        make_llm(model_dir, skip_tokenizer_init=False)


def test_damaged_tokenizer_is_named_with_its_folder(
    text_model: Path, tmp_path: Path, make_llm: Callable[..., LLM]
) -> None:
    path = tmp_path / "model"
    shutil.copytree(text_model, path)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(
        ValueError, match=f"tokenizer in {path} cannot be loaded: .*tokenizer=.*skip_tokenizer_init=True"
    ):
        make_llm(path, skip_tokenizer_init=False)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"(?s)tokenizer in {path} cannot be loaded: .*skip_tokenizer_init=True"):
        make_llm(path, skip_tokenizer_init=False)


def test_tokenizer_of_another_folder_serves(
    checkpoint: Callable[..., Path], text_model: Path, make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint("plain"), skip_tokenizer_init=False, tokenizer=str(text_model))
    assert llm.generate([[5, 6]], GREEDY, use_tqdm=False)[0]["text"]
