"""A tied checkpoint that brings a head: taken if it differs, as by transformers; refused by a model that runs tied."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SHAPES, Reference, random_prompts, save_checkpoint
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.models.tied_head import EMBEDDING, HEAD, fingerprint

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
PROMPT = random_prompts([20], seed=9)[0]
TIED = "gqa7-dim24-tied"


def answer(llm: LLM) -> list[int]:
    return llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def say_tied(path: Path) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return path


def is_tied(llm: LLM) -> bool:
    return llm.engine.runner.model.lm_head.is_tied


@pytest.fixture
def contradicting(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Its config.json says that the head is tied, and its weights have another."""
    shutil.copytree(checkpoint("plain"), tmp_path / "model")
    return say_tied(tmp_path / "model")


class TestLoad:
    def test_head_of_the_file_is_taken(
        self,
        contradicting: Path,
        checkpoint: Callable[..., Path],
        make_llm: Callable[..., LLM],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        llm = make_llm(contradicting)
        assert (
            answer(llm)
            == Reference(contradicting).greedy(PROMPT, 8)
            == Reference(checkpoint("plain")).greedy(PROMPT, 8)
        )
        assert "lm_head.weight differs from model.embed_tokens.weight" in caplog.text

    def test_head_of_a_file_in_shards_is_taken(self, make_llm: Callable[..., LLM], tmp_path: Path) -> None:
        path = say_tied(save_checkpoint(tmp_path, SHAPES["plain"], max_shard_size="60KB"))
        weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
        assert weight_map[HEAD] != weight_map[EMBEDDING]
        assert answer(make_llm(path)) == Reference(path).greedy(PROMPT, 8)

    def test_head_of_the_file_is_cut_over_the_ranks(self, contradicting: Path, make_tp: Callable[..., LLM]) -> None:
        llm = make_tp(contradicting, tensor_parallel_size=2)
        assert answer(llm) == Reference(contradicting).greedy(PROMPT, 8)

    def test_equal_head_is_no_second_copy(
        self, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], tmp_path: Path
    ) -> None:
        path = tmp_path / "model"
        shutil.copytree(checkpoint(TIED), path)
        tensors = tensors_of(path)
        save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, path / "model.safetensors", metadata={"format": "pt"})
        llm = make_llm(path)
        assert is_tied(llm) and answer(llm) == Reference(path).greedy(PROMPT, 8)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_equal_means_equal_in_the_models_dtype(
        self, dtype: str, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], tmp_path: Path
    ) -> None:
        from transformers import Qwen3ForCausalLM

        path = tmp_path / "model"
        shutil.copytree(checkpoint(TIED), path)
        tensors = tensors_of(path)
        tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16().float()
        tensors[HEAD] = tensors[EMBEDDING] * (1 + 2.0**-12)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        theirs = Qwen3ForCausalLM.from_pretrained(path, dtype=dtype)
        ours = make_llm(path, dtype=dtype)
        assert is_tied(ours) == (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == (dtype == "bfloat16")

    def test_head_of_another_shape_is_named(self, contradicting: Path, make_llm: Callable[..., LLM]) -> None:
        tensors = tensors_of(contradicting)
        tensors[HEAD] = tensors[HEAD][1:].clone()
        save_file(tensors, contradicting / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"tensor 'lm_head.weight' .* shape \[210, 64\]"):
            make_llm(contradicting)

    def test_new_weights_and_deep_sleep_know_of_the_head(
        self, contradicting: Path, make_llm: Callable[..., LLM], tmp_path: Path
    ) -> None:
        new = save_checkpoint(tmp_path / "new", SHAPES["plain"], seed=13)
        llm = make_llm(contradicting)
        llm.load_weights(tensors_of(new).items())
        assert answer(llm) == Reference(new).greedy(PROMPT, 8)
        llm.sleep(2)
        llm.wake_up()
        llm.load_weights([pair for pair in tensors_of(contradicting).items() if pair[0] != HEAD])
        with pytest.raises(RuntimeError, match="'lm_head.weight' for one, have not come back"):
            answer(llm)
        llm.load_weights([(HEAD, tensors_of(contradicting)[HEAD])])
        assert answer(llm) == Reference(contradicting).greedy(PROMPT, 8)


class TestRunning:
    @pytest.fixture(scope="class")
    def new(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_checkpoint(tmp_path_factory.mktemp("trained"), SHAPES[TIED], seed=13)

    @pytest.mark.parametrize("form", ["list", "generator"])
    @pytest.mark.parametrize("place", ["first", "last", "in a call after"])
    def test_equal_head_may_come(
        self, place: str, form: str, new: Path, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        pairs, head = list(tensors_of(new).items()), (HEAD, tensors_of(new)[EMBEDDING])
        calls = {"first": [[head, *pairs]], "last": [[*pairs, head]], "in a call after": [pairs, [head]]}[place]
        llm = make_llm(checkpoint(TIED))
        for call in calls:
            llm.load_weights(call if form == "list" else iter(call))
        assert answer(llm) == Reference(new).greedy(PROMPT, 8)

    def test_equal_head_may_come_from_memory_that_is_used_again(
        self, new: Path, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        def give() -> Iterator[tuple[str, torch.Tensor]]:
            tensors = tensors_of(new)
            buffer = torch.empty(max(t.numel() for t in tensors.values()))
            for name, tensor in [(HEAD, tensors[EMBEDDING]), *tensors.items()]:
                part = buffer[: tensor.numel()].view(tensor.shape)
                part.copy_(tensor)
                yield name, part

        llm = make_llm(checkpoint(TIED))
        llm.load_weights(give())
        assert answer(llm) == Reference(new).greedy(PROMPT, 8)

    def test_head_of_the_weights_in_force_may_come_alone(
        self, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        llm = make_llm(checkpoint(TIED), dtype="bfloat16")
        before = answer(llm)
        llm.load_weights([(HEAD, tensors_of(checkpoint(TIED))[EMBEDDING])])
        assert answer(llm) == before

    @pytest.mark.parametrize("order", [[HEAD], [HEAD, EMBEDDING], [EMBEDDING, HEAD]], ids=str)
    def test_head_that_differs_is_refused_and_none_of_its_list_written(
        self, order: list[str], new: Path, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        tensors = tensors_of(new)
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][7, 3] *= -1
        llm = make_llm(checkpoint(TIED))
        with pytest.raises(ValueError, match="tensor 'lm_head.weight' differs from 'model.embed_tokens.weight'"):
            llm.load_weights([(name, tensors[name]) for name in order])
        assert answer(llm) == Reference(checkpoint(TIED)).greedy(PROMPT, 8)
        llm.load_weights(tensors_of(new).items())
        assert answer(llm) == Reference(new).greedy(PROMPT, 8)

    def test_head_of_old_weights_is_refused_and_a_later_right_one_is_not(
        self, new: Path, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        llm = make_llm(checkpoint(TIED))
        old = (HEAD, tensors_of(checkpoint(TIED))[EMBEDDING])
        llm.load_weights(tensors_of(new).items())
        with pytest.raises(ValueError, match="differs"):
            llm.load_weights(iter([old]))
        llm.load_weights(iter(tensors_of(new).items()))
        llm.load_weights([(HEAD, tensors_of(new)[EMBEDDING])])
        assert answer(llm) == Reference(new).greedy(PROMPT, 8)

    @pytest.mark.parametrize(
        "tensor", [torch.zeros(210, 64), torch.zeros(211), torch.zeros(211, 64).char()], ids=["rows", "vector", "int8"]
    )
    def test_head_of_another_shape_or_dtype_is_named(
        self, tensor: torch.Tensor, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        llm = make_llm(checkpoint(TIED))
        with pytest.raises(ValueError, match="tensor 'lm_head.weight'.*(shape|int8)"):
            llm.load_weights([(HEAD, tensor)])

    def test_after_deep_sleep_the_head_waits_for_its_embedding(
        self, new: Path, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        tensors = tensors_of(new)
        llm = make_llm(checkpoint(TIED))
        llm.sleep(2)
        llm.wake_up()
        llm.load_weights([(HEAD, tensors[EMBEDDING])])
        llm.load_weights(tensors.items())
        assert answer(llm) == Reference(new).greedy(PROMPT, 8)
        llm.sleep(2)
        llm.wake_up()
        llm.load_weights([(HEAD, tensors_of(checkpoint(TIED))[EMBEDDING])])
        with pytest.raises(ValueError, match="differs"):
            llm.load_weights(tensors.items())

    def test_ranks_are_told_of_no_head(
        self, new: Path, checkpoint: Callable[..., Path], make_tp: Callable[..., LLM]
    ) -> None:
        shape = "mha-tied-bias"
        llm = make_tp(checkpoint(shape), tensor_parallel_size=2)
        tensors = tensors_of(checkpoint(shape))
        llm.load_weights([(HEAD, tensors[EMBEDDING])])
        with pytest.raises(ValueError, match="differs"):
            llm.load_weights([(HEAD, tensors[EMBEDDING] * 2)])
        assert answer(llm) == Reference(checkpoint(shape)).greedy(PROMPT, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_is_of_what_the_model_would_hold(dtype: torch.dtype) -> None:
    matrix: Any = torch.randn(5000, 24, dtype=torch.float64).bfloat16()
    matrix[0, 0] = 0.0
    mark = fingerprint(matrix, dtype)
    assert mark == fingerprint(matrix.double(), dtype)
    for row, column in ((0, 1), (4999, 23), (2500, 12)):
        other = matrix.clone()
        other[row, column] *= -1
        assert fingerprint(other, dtype) != mark
    assert fingerprint(matrix.flip(0), dtype) != mark != fingerprint(matrix.roll(1, dims=1), dtype)
    matrix[0, 0] = -0.0
    assert fingerprint(matrix, dtype) == mark
