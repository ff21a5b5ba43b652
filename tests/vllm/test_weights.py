"""Weights, as programs for reinforcement learning handle them: reloaded, woken up apart, saved by rank, overridden."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.models.checkpoint_config import load_hf_config
from nanovllm.models.loader import build_outline, load_weights
from nanovllm.models.sharded_state import load_shard

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PROMPT = [5, 6, 7, 8, 9]


def answer(llm: LLM) -> list[int]:
    return llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def test_dummy_weights_are_replaced_by_those_of_the_folder(
    checkpoint: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    path = checkpoint("plain")
    expected = answer(make_llm(path))
    llm = make_llm(path, load_format="dummy")
    assert answer(llm) != expected
    assert llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},)) == [None]
    assert llm.collective_rpc("reload_weights") == [None]
    assert answer(llm) == expected


def test_functions_reach_the_worker_and_its_model(
    checkpoint: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    path = checkpoint("plain")
    llm = make_llm(path)
    expected = answer(llm)
    weights = load_file(path / "model.safetensors")

    def zero(worker: Any, factor: float, and_then: str = "") -> str:
        worker.model_runner.model.load_weights([(name, w * factor) for name, w in weights.items()])
        return f"{worker.device} {worker.rank} {and_then}"

    assert llm.collective_rpc(zero, args=(0.0,), kwargs={"and_then": "done"}) == ["cpu 0 done"]
    assert answer(llm) == [0] * 6
    driver = llm.llm_engine.model_executor.driver_worker
    driver.model_runner.model.load_weights(weights.items())
    assert answer(llm) == expected
    assert llm.apply_model(lambda model: type(model).__name__) == ["Qwen3ForCausalLM"]
    with pytest.raises(NotImplementedError, match="method='no_such_method' must be"):
        llm.collective_rpc("no_such_method")
    with pytest.raises(ValueError, match="overrides="):
        llm.collective_rpc("update_config", args=({"model_config": {}},))


@pytest.mark.parametrize("level", [1, 2])
def test_weights_wake_up_before_the_cache(
    checkpoint: Callable[[str], Path], make_llm: Callable[..., LLM], level: int
) -> None:
    path = checkpoint("plain")
    llm = make_llm(path)
    expected = answer(llm)
    llm.sleep(level)
    with pytest.raises(ValueError, match=r"tags=\['cache'\]"):
        llm.wake_up(tags=["cache"])
    with pytest.raises(RuntimeError, match="before the weights"):
        llm.wake_up(tags=["kv_cache"])
    llm.wake_up(tags=["weights"])
    assert llm.is_sleeping and llm.engine.runner.kv_cache is None
    llm.load_weights(load_file(path / "model.safetensors").items())
    with pytest.raises(RuntimeError, match=r"wake_up\(tags=\['kv_cache'\]\)"):
        answer(llm)
    llm.sleep(level)  # and once more
    llm.wake_up(tags=["weights"])
    llm.load_weights(load_file(path / "model.safetensors").items())
    llm.wake_up(tags=["kv_cache"])
    assert not llm.is_sleeping
    assert answer(llm) == expected


def test_what_an_engine_has_saved_it_reads_again(
    checkpoint: Callable[[str], Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    path, folder = checkpoint("mha-tied-bias"), tmp_path / "sharded"
    llm = make_llm(path)
    expected = answer(llm)
    llm.llm_engine.engine_core.save_sharded_state(path=str(folder), pattern=None, max_size=20_000)
    assert answer(llm) == expected
    assert len(list(folder.glob("model-rank-0-part-*.safetensors"))) > 1
    shutil.copy(path / "config.json", folder)
    assert answer(make_llm(folder, load_format="sharded_state")) == expected


def test_each_rank_saves_what_a_rank_needs(
    checkpoint: Callable[[str], Path], make_tp: Callable[..., LLM], tmp_path: Path
) -> None:
    path = checkpoint("plain")
    assert make_tp(path, tensor_parallel_size=2).collective_rpc("save_sharded_state", args=(tmp_path,)) == [None] * 2
    hf_config, cls = load_hf_config(path)
    for rank in range(2):
        tp = TensorParallel(size=2, rank=rank)
        saved, cut = (build_outline(hf_config, cls, tp).to_empty(device="cpu") for _ in range(2))
        load_shard(saved, rank, tmp_path)
        load_weights(cut, path)
        for (name, a), b in zip(saved.named_parameters(), cut.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_shards_that_do_not_fit_are_refused(
    checkpoint: Callable[[str], Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    path = checkpoint("plain")
    make_llm(path).collective_rpc("save_sharded_state", args=(tmp_path,))
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(ValueError, match="of torch.float32, and the model of this rank has .* of torch.bfloat16"):
        make_llm(tmp_path, load_format="sharded_state", dtype="bfloat16")
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ValueError, match="tensors missing in .*layers.2"):
        make_llm(tmp_path, load_format="sharded_state")
    with pytest.raises(FileNotFoundError, match="no model-rank-0-part"):
        make_llm(path, load_format="sharded_state")


def rotations(llm: LLM) -> torch.Tensor:
    return llm.engine.runner.attention_layers[0].spec.rope.cos_sin


def test_keys_of_the_config_are_overridden(
    checkpoint: Callable[[str], Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 80}
    path = checkpoint("plain")
    shutil.copytree(path, tmp_path / "edited")
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "edited" / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    plain = make_llm(path)
    edited = make_llm(tmp_path / "edited")
    overridden = make_llm(path, hf_overrides={"rope_parameters": rope, "max_model_len": 320})
    assert torch.equal(rotations(overridden), rotations(edited))
    assert not torch.equal(rotations(overridden), rotations(plain))
    assert answer(overridden) == answer(edited)
    with pytest.raises(TypeError, match="hf_overrides="):
        Config(model="m", hf_overrides=lambda config: config)
    with pytest.raises(ValueError, match="quantization_config"):
        make_llm(path, hf_overrides={"quantization_config": {"quant_method": "fp8"}})
