"""New weights for an engine that runs: it answers as one that was made from them, and an error leaves it serving."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SHAPES, Reference, random_prompts, save_checkpoint
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.layers.linear import Linear

PROMPTS = random_prompts([20, 1, 33], seed=9)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
UNTIED_AND_TIED = ["gqa3-bias-linear", "gqa7-dim24-tied"]

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of the shape with other weights than `checkpoint` gives it, and no close greedy choice either."""
    made: dict[str, Path] = {}

    def make(shape: str) -> Path:
        if shape not in made:
            made[shape] = save_checkpoint(tmp_path_factory.mktemp(shape), SHAPES[shape], seed=13)
        return made[shape]

    return make


def tensors_of(path: Path) -> Tensors:
    return load_file(path / "model.safetensors")


def tokens(llm: LLM) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def expected(path: Path) -> list[list[int]]:
    return [Reference(path).greedy(prompt, 8) for prompt in PROMPTS]


def mixture(tmp_path: Path, old: Path, new: Tensors) -> Path:
    """A checkpoint of the old weights with the new ones over them."""
    path = tmp_path / "mixture"
    path.mkdir()
    (path / "config.json").write_text((old / "config.json").read_text())
    save_file({**tensors_of(old), **new}, path / "model.safetensors", metadata={"format": "pt"})
    return path


def packed_layers(llm: LLM) -> list[str]:
    modules = llm.engine.runner.model.named_modules()
    return [name for name, module in modules if isinstance(module, Linear) and module.format.is_laid_out]


@pytest.mark.parametrize("shape", UNTIED_AND_TIED)
@pytest.mark.parametrize("form", ["list", "generator", "items", "float64", "Parameters"])
def test_answers_are_transformers_with_the_new_weights(
    shape: str, form: str, checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm, new = make_llm(checkpoint(shape)), tensors_of(trained(shape))
    assert tokens(llm) == expected(checkpoint(shape)) != expected(trained(shape))
    forms: dict[str, Any] = {
        "list": list(new.items()),
        "generator": (pair for pair in new.items()),
        "items": new.items(),
        "float64": [(name, tensor.double()) for name, tensor in new.items()],
        "Parameters": [(name, torch.nn.Parameter(tensor)) for name, tensor in new.items()],
    }
    llm.load_weights(forms[form])
    assert tokens(llm) == expected(trained(shape))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", UNTIED_AND_TIED)
def test_answers_in_half_precision_are_those_of_an_engine_made_from_the_new_weights(
    shape: str, dtype: str, checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm, other = make_llm(checkpoint(shape), dtype=dtype), make_llm(trained(shape), dtype=dtype)
    assert tokens(llm) != tokens(other)
    before = packed_layers(llm)
    llm.load_weights(tensors_of(trained(shape)).items())
    assert tokens(llm) == tokens(other)
    assert packed_layers(llm) == before
    theirs = other.engine.runner.model.state_dict()
    for name, tensor in llm.engine.runner.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("shape", UNTIED_AND_TIED)
def test_some_tensors_replace_only_themselves(
    shape: str,
    checkpoint: Callable[..., Path],
    trained: Callable[..., Path],
    make_llm: Callable[..., LLM],
    tmp_path: Path,
) -> None:
    parts = ["0.self_attn.v_proj", "1.self_attn.q_proj", "1.mlp.up_proj", "0.mlp.down_proj", "embed_tokens", "k_norm"]
    new = {name: t for name, t in tensors_of(trained(shape)).items() if any(part in name for part in parts)}
    llm = make_llm(checkpoint(shape))
    llm.load_weights(new.items())
    assert tokens(llm) == expected(mixture(tmp_path, checkpoint(shape), new)) != expected(checkpoint(shape))


def test_a_new_bias_leaves_packed_weights_packed(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    """To unpack a weight and to pack it again takes its time, and its memory twice."""
    shape = "gqa3-bias-linear"
    llm = make_llm(checkpoint(shape))
    layers = [m for m in llm.engine.runner.model.modules() if isinstance(m, Linear) and m.format.is_laid_out]
    before = [layer.format.packed for layer in layers]
    new = {name: tensor for name, tensor in tensors_of(trained(shape)).items() if name.endswith(".bias")}
    assert new and before
    llm.load_weights(new.items())
    assert all(layer.format.packed is packed for layer, packed in zip(layers, before, strict=True))
    assert tokens(llm) == expected(mixture(tmp_path, checkpoint(shape), new))


def test_a_model_may_come_in_buckets(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint("plain"))
    pairs = list(tensors_of(trained("plain")).items())
    for start in range(0, len(pairs), 5):
        llm.load_weights(iter(pairs[start : start + 5]))
    assert tokens(llm) == expected(trained("plain"))


def test_nothing_is_a_valid_bucket(checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(checkpoint("plain"))
    llm.load_weights([])
    assert tokens(llm) == expected(checkpoint("plain"))


def test_tied_head_may_come_along(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    shape = "gqa7-dim24-tied"
    new = tensors_of(trained(shape))
    llm = make_llm(checkpoint(shape))
    llm.load_weights([*new.items(), ("lm_head.weight", new["model.embed_tokens.weight"])])
    assert tokens(llm) == expected(trained(shape))


def test_prefixes_computed_with_the_old_weights_are_forgotten(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint("plain"))

    def cached() -> list[int]:
        return [output.num_cached_tokens for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]

    assert [cached(), cached()] == [[0, 0, 0], [16, 0, 32]]
    llm.load_weights(list(tensors_of(trained("plain")).items())[:1])
    assert [cached(), cached()] == [[0, 0, 0], [16, 0, 32]]
    with pytest.raises(ValueError, match="extra"):
        llm.load_weights(iter([*tensors_of(checkpoint("plain")).items(), ("extra", torch.zeros(1))]))
    assert [cached(), cached()] == [[0, 0, 0], [16, 0, 32]]
    assert tokens(llm) == expected(checkpoint("plain"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("extra", lambda t: torch.zeros(3), "is not a part of Qwen3ForCausalLM"),
        ("model.layers.0.self_attn.qkv_proj.weight", lambda t: torch.zeros(3), "is not a part of Qwen3ForCausalLM"),
        ("model.layers.1.self_attn.k_proj.weight", lambda t: t[1:], r"shape \[31, 64\] where the model has \[32, 64\]"),
        ("model.layers.1.self_attn.o_proj.weight", lambda t: t[:, 1:], r"shape \[64, 63\]"),
        ("model.layers.0.mlp.gate_proj.weight", lambda t: t.flatten(), r"shape \[5120\]"),
        ("model.embed_tokens.weight", lambda t: t[1:], r"shape \[210, 64\]"),
        ("model.norm.weight", lambda t: t[:1], r"shape \[1\] where the model has \[64\]"),  # it would broadcast
        ("model.layers.0.mlp.down_proj.weight", lambda t: t.to(torch.int8), r"is torch\.int8: weights must be float32"),
        ("model.layers.1.mlp.up_proj.weight", lambda t: t.to(torch.float8_e4m3fn), r"is torch\.float8_e4m3fn"),
        ("lm_head.weight", lambda t: t.T, r"shape \[64, 211\] where the model has \[211, 64\]"),
    ],
)
def test_a_list_with_a_wrong_tensor_is_refused_by_its_name_and_none_of_it_written(
    name: str,
    change: Callable[..., torch.Tensor],
    message: str,
    checkpoint: Callable[..., Path],
    trained: Callable[..., Path],
    make_llm: Callable[..., LLM],
) -> None:
    new = tensors_of(trained("plain"))
    new[name] = change(new.get(name))
    new[name] = new.pop(name)  # the last
    llm = make_llm(checkpoint("plain"))
    before = packed_layers(llm)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        llm.load_weights(new.items())
    assert tokens(llm) == expected(checkpoint("plain"))
    assert packed_layers(llm) == before


def test_a_tensor_that_comes_twice_is_refused(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    pairs = list(tensors_of(trained("plain")).items())
    llm = make_llm(checkpoint("plain"))
    with pytest.raises(ValueError, match=f"{pairs[0][0]}.* twice"):
        llm.load_weights([*pairs, pairs[0]])
    assert tokens(llm) == expected(checkpoint("plain"))


def test_what_is_not_a_pair_of_name_and_tensor_is_refused(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    new = tensors_of(trained("plain"))
    llm = make_llm(checkpoint("plain"))
    for wrong in (new, list(new.values()), [("model.norm.weight", [1.0])], [("model.norm.weight",)], [3]):
        with pytest.raises(TypeError, match="(?s)named_tensors has .* pairs of a name and a tensor"):
            llm.load_weights(wrong)
    assert tokens(llm) == expected(checkpoint("plain"))


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, None])
@pytest.mark.parametrize("shape", UNTIED_AND_TIED)
def test_what_a_generator_gave_before_its_error_is_written_and_counted(
    shape: str,
    error: type[Exception] | None,
    checkpoint: Callable[..., Path],
    trained: Callable[..., Path],
    make_llm: Callable[..., LLM],
    tmp_path: Path,
) -> None:
    new = dict(list(tensors_of(trained(shape)).items())[:7])

    def give() -> Iterator[tuple[str, torch.Tensor]]:
        yield from new.items()
        if error is not None:
            raise error("lost the trainer")
        yield "model.layers.1.mlp.up_proj.weight", torch.zeros(2, 2)

    llm = make_llm(checkpoint(shape))
    before = packed_layers(llm)
    with pytest.raises(error or ValueError, match="lost the trainer" if error else "up_proj.*shape") as raised:
        llm.load_weights(give())
    (note,) = raised.value.__notes__
    assert "7 tensors had been loaded" in note and min(new) in note
    assert packed_layers(llm) == before
    assert tokens(llm) == expected(mixture(tmp_path, checkpoint(shape), new)) != expected(checkpoint(shape))
    llm.load_weights(tensors_of(trained(shape)).items())
    assert tokens(llm) == expected(trained(shape))


def test_a_generator_runs_in_its_makers_mode(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    """What it makes for a trainer must not be inference tensors, which no backward pass could use."""
    modes = []

    def give() -> Iterator[tuple[str, torch.Tensor]]:
        for pair in tensors_of(trained("plain")).items():
            modes.append(torch.is_inference_mode_enabled() or not torch.is_grad_enabled())
            yield pair

    make_llm(checkpoint("plain")).load_weights(give())
    assert modes and not any(modes)


def test_engine_and_source_share_no_memory(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm, new = make_llm(checkpoint("plain")), tensors_of(trained("plain"))
    copies = {name: tensor.clone() for name, tensor in new.items()}
    llm.load_weights(new.items())
    assert all(torch.equal(new[name], copy) for name, copy in copies.items())
    for tensor in new.values():
        tensor.fill_(float("nan"))
    assert tokens(llm) == expected(trained("plain"))


def test_plain_weights_keep_their_addresses(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint("plain"))

    def addresses() -> dict[str, int]:
        return {name: param.data_ptr() for name, param in llm.engine.runner.model.named_parameters()}

    before = addresses()
    assert "model.norm.weight" in before
    llm.load_weights(tensors_of(trained("plain")).items())
    assert addresses() == before


def test_is_refused_while_requests_run_and_they_go_on(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint("plain"))
    engine, new = llm.engine, tensors_of(trained("plain"))
    seq = engine.make_sequence(PROMPTS[0], GREEDY)
    engine.add(seq)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="load_weights.* while 1 requests are unfinished"):
            llm.load_weights(new.items())
        engine.step()
    while engine.has_unfinished_requests:
        engine.step()
    assert seq.output_token_ids == expected(checkpoint("plain"))[0]
    llm.load_weights(new.items())
    assert tokens(llm) == expected(trained("plain"))


def test_step_in_flight_of_an_aborted_request_does_no_harm(
    checkpoint: Callable[..., Path], trained: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint("plain"), max_behind=1)
    engine = llm.engine
    seq = engine.make_sequence(PROMPTS[0], GREEDY)
    engine.add(seq)
    assert engine.step() == [] and seq.output_token_ids == [], "no step is in flight"
    engine.abort([seq])
    llm.load_weights(tensors_of(trained("plain")).items())
    assert tokens(llm) == expected(trained("plain"))


def test_dummy_weights_become_real_ones(
    trained: Callable[..., Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    config = json.loads((trained("plain") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = make_llm(tmp_path, load_format="dummy")
    llm.load_weights(tensors_of(trained("plain")).items())
    assert tokens(llm) == expected(trained("plain"))
