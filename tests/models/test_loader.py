"""Every parameter exactly once and of the right shape, or an error that names the tensor or the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import SHAPES, VOCAB_SIZE, Reference, random_prompts, save_checkpoint
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.models.generation_config import load_eos_token_ids
from nanovllm.models.model_path import resolve_model_path

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
PROMPT = random_prompts([20], seed=9)[0]


@pytest.fixture
def model_dir(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of its own, to be damaged."""
    shutil.copytree(checkpoint("plain"), tmp_path / "model")
    return tmp_path / "model"


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def load_error(path: Path, error: type[Exception], make_llm: Callable[..., LLM]) -> str:
    with pytest.raises(error) as raised:
        make_llm(path)
    return str(raised.value)


def test_no_such_directory_is_named(make_llm: Callable[..., LLM], tmp_path: Path) -> None:
    for path in (str(tmp_path / "nowhere"), "~/no/where", "a/b/c"):
        assert f"model={path!r} is not a directory" in load_error(Path(path), FileNotFoundError, make_llm)


def test_file_instead_of_a_directory_is_refused(model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    assert "is not a directory" in load_error(model_dir / "config.json", FileNotFoundError, make_llm)


def test_name_that_the_hub_does_not_give_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(OSError, match="model='no-such-model' is neither a local directory nor.*no network"):
        resolve_model_path("no-such-model", None)


def test_hub_id_is_fetched_at_its_revision(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def give(repo: str, revision: str | None = None, **kwargs: Any) -> str:
        asked.append((repo, revision))
        names = ["model.safetensors", "config.json", "consolidated.safetensors", "original/model.safetensors"]
        patterns = {key: kwargs[key] for key in ("allow_patterns", "ignore_patterns")}
        assert list(huggingface_hub.utils.filter_repo_objects(names, **patterns)) == names[:2]
        return str(model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert resolve_model_path("someone/some-model", "main") == model_dir
    assert asked == [("someone/some-model", "main")]


def test_directory_without_config_is_named(model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    (model_dir / "config.json").unlink()
    assert f"no config.json in {model_dir}" in load_error(model_dir, FileNotFoundError, make_llm)


@pytest.mark.parametrize("content", ["", "{", "[]", "nonsense"])
def test_damaged_config_names_its_place(model_dir: Path, make_llm: Callable[..., LLM], content: str) -> None:
    (model_dir / "config.json").write_text(content)
    with pytest.raises((OSError, ValueError), match="config.json|" + str(model_dir)):
        make_llm(model_dir)


@pytest.mark.parametrize("architectures", [["MambaForCausalLM"], [], None])
def test_unknown_architecture_is_answered_with_those_there_are(
    model_dir: Path, make_llm: Callable[..., LLM], architectures: Any
) -> None:
    edit_config(model_dir, architectures=architectures)
    message = load_error(model_dir, ValueError, make_llm)
    assert "architectures=" in message and "Qwen3ForCausalLM" in message


def test_unknown_activation_is_named(model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    edit_config(model_dir, hidden_act="gelu")
    assert "hidden_act='gelu' must be one of silu" in load_error(model_dir, ValueError, make_llm)


def test_no_weights_is_a_missing_file(model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    (model_dir / "model.safetensors").unlink()
    assert f"no *.safetensors in {model_dir}" in load_error(model_dir, FileNotFoundError, make_llm)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_truncated_weights_are_an_os_error_that_names_the_file(
    model_dir: Path, make_llm: Callable[..., LLM], keep: int
) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = load_error(model_dir, OSError, make_llm)
    assert "model.safetensors" in message and "damaged" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.weight",  # a part of a merged parameter
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
    ],
)
def test_missing_tensor_is_named(model_dir: Path, make_llm: Callable[..., LLM], name: str) -> None:
    edit_tensors(model_dir, lambda tensors: tensors.pop(name))
    message = load_error(model_dir, ValueError, make_llm)
    assert "missing" in message and message.rstrip(".").endswith(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("dim", [0, -1])
def test_misshapen_tensor_is_named_with_both_shapes(
    model_dir: Path, make_llm: Callable[..., LLM], name: str, dim: int
) -> None:
    shapes = []

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[name]
        tensors[name] = tensor.narrow(dim, 0, tensor.shape[dim] - 1).clone()
        shapes.extend([list(tensors[name].shape), list(tensor.shape)])

    edit_tensors(model_dir, cut)
    message = load_error(model_dir, ValueError, make_llm)
    assert repr(name) in message and all(str(shape) in message for shape in shapes)


def test_tensor_that_would_broadcast_is_refused(model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    name = "model.norm.weight"
    edit_tensors(model_dir, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert repr(name) in load_error(model_dir, ValueError, make_llm)


def test_unexpected_tensor_is_named(model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "extra"):
        copy = model_dir.parent / name
        shutil.copytree(model_dir, copy)
        edit_tensors(copy, lambda tensors, name=name: tensors.update({name: torch.zeros(3)}))
        message = load_error(copy, ValueError, make_llm)
        assert repr(name) in message and "not a part of Qwen3ForCausalLM" in message


def test_tensor_in_two_files_is_named(model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    file = model_dir / "model.safetensors"
    name = "model.norm.weight"
    save_file({name: load_file(file)[name]}, model_dir / "model-2.safetensors")
    file.rename(model_dir / "model-1.safetensors")
    message = load_error(model_dir, ValueError, make_llm)
    assert repr(name) in message and "twice" in message


def test_missing_file_of_the_index_is_named(make_llm: Callable[..., LLM], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, SHAPES["plain"], max_shard_size="100KB")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    message = load_error(path, FileNotFoundError, make_llm)
    assert shard.name in message and "model.safetensors.index.json" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index_is_named(make_llm: Callable[..., LLM], tmp_path: Path, content: str) -> None:
    path = save_checkpoint(tmp_path, SHAPES["plain"], max_shard_size="100KB")
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises((OSError, ValueError), match="model.safetensors.index.json"):
        make_llm(path)


def test_weights_under_another_file_name_are_found(model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    expected = Reference(model_dir).greedy(PROMPT, 8)
    (model_dir / "model.safetensors").rename(model_dir / "weights.safetensors")
    assert make_llm(model_dir).generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"] == expected


def test_files_outside_the_index_are_not_read(make_llm: Callable[..., LLM], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, SHAPES["plain"], max_shard_size="100KB")
    save_file({"model.norm.weight": torch.zeros(64)}, path / "consolidated.safetensors")
    assert make_llm(path).generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"] == Reference(path).greedy(PROMPT, 8)


def test_redundant_tensors_of_old_and_tied_checkpoints_are_passed_over(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint("gqa7-dim24-tied"), path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)

    edit_tensors(path, add)
    expected = Reference(checkpoint("gqa7-dim24-tied")).greedy(PROMPT, 8)
    assert make_llm(path).generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"] == expected


def test_weights_are_converted_to_the_dtype_asked_for(model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    """A bfloat16 checkpoint run in float32 is the same model, with the weights' rounding."""
    edit_tensors(model_dir, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    expected = Reference(model_dir).greedy(PROMPT, 8)
    assert make_llm(model_dir).generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"] == expected


def test_after_a_failed_load_the_next_model_serves(
    checkpoint: Callable[..., Path], model_dir: Path, make_llm: Callable[..., LLM]
) -> None:
    (model_dir / "model.safetensors").unlink()
    load_error(model_dir, OSError, make_llm)
    path = checkpoint("plain")
    assert make_llm(path).generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"] == Reference(path).greedy(PROMPT, 8)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (3, 9, {3}),
        ([3, 4], 9, {3, 4}),
        (None, 9, set()),
        ("absent", 9, {9}),
        ("absent", [9, 8], {9, 8}),
        ("absent", None, set()),
    ],
)
def test_eos_ids_are_generation_configs_and_without_that_file_the_configs(
    tmp_path: Path, generation: Any, config: Any, expected: set[int]
) -> None:
    if generation != "absent":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    hf_config = SimpleNamespace(eos_token_id=config, vocab_size=VOCAB_SIZE)
    assert load_eos_token_ids(Config(model=str(tmp_path)), tmp_path, hf_config) == expected


def test_damaged_generation_config_is_named(model_dir: Path, make_llm: Callable[..., LLM]) -> None:
    (model_dir / "generation_config.json").write_text("{")
    with pytest.raises((OSError, ValueError), match="generation_config.json"):
        make_llm(model_dir)


def test_defaults_of_a_config_are_those_of_transformers() -> None:
    from dataclasses import fields

    from transformers import Qwen3Config

    from nanovllm.models.qwen3 import Qwen3ForCausalLM

    defaults = {field.name: field.default for field in fields(Qwen3Config)}
    assert Qwen3ForCausalLM.default_config == {key: defaults[key] for key in Qwen3ForCausalLM.default_config}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_config_that_is_not_for_this_engine_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    save_checkpoint(tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=named):
        LLM(str(tmp_path), device="cpu", skip_tokenizer_init=True)
