"""Memory that is lent comes back, and with it the answers; what cannot be answered meanwhile is refused with reason."""

import json
import math
import resource
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import TINY, Reference, random_prompts
from safetensors.torch import load_file

from nanovllm import LLM, SamplingParams
from nanovllm.layers.linear import Linear

PROMPTS = random_prompts([20, 1, 33], seed=9)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
UNTIED_AND_TIED = ["gqa3-bias-linear", "gqa7-dim24-tied"]


def tokens(llm: LLM, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def expected(path: Path) -> list[list[int]]:
    return [Reference(path).greedy(prompt, 8) for prompt in PROMPTS]


def tensors_of(path: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(path / "model.safetensors").items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", UNTIED_AND_TIED)
@pytest.mark.parametrize("level", [1, 2])
def test_answers_are_the_same_after_sleep(
    level: int, shape: str, dtype: str, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint(shape), dtype=dtype)
    before = tokens(llm)
    packed = [isinstance(m, Linear) and m.format.is_laid_out for m in llm.engine.runner.model.modules()]
    for _ in range(2):
        llm.sleep(level)
        assert llm.is_sleeping
        llm.wake_up()
        assert not llm.is_sleeping
        if level == 2:
            llm.load_weights(tensors_of(checkpoint(shape)))
        assert tokens(llm) == before
    assert packed == [isinstance(m, Linear) and m.format.is_laid_out for m in llm.engine.runner.model.modules()]
    assert dtype != "float32" or before == expected(checkpoint(shape))


def test_level_1_is_the_default_and_keeps_the_weights(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint("plain"))
    llm.sleep()
    llm.wake_up()
    assert tokens(llm) == expected(checkpoint("plain"))


@pytest.mark.parametrize("level", [1, 2])
def test_memory_is_let_go(level: int, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(checkpoint("plain"), dtype="bfloat16")
    tokens(llm)
    runner = llm.engine.runner
    cache = [weakref.ref(runner.kv_cache), weakref.ref(runner.batch), weakref.ref(runner.inputs.input_ids)]
    weights = [weakref.ref(param) for param in runner.model.parameters()]
    weights += [
        weakref.ref(m.format.packed.opaque)
        for m in runner.model.modules()
        if isinstance(m, Linear) and m.format.is_laid_out
    ]
    llm.sleep(level)
    assert [ref() for ref in cache] == [None] * 3
    assert len(weights) > 10
    assert all((ref() is None) == (level == 2) for ref in weights)
    assert all(param.is_meta == (level == 2) for param in runner.model.parameters())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no way to ask how much memory the process holds")
def test_dropped_weights_are_given_to_the_system(make_llm: Callable[..., LLM], tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    config = {**TINY, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLM"]}))
    llm = make_llm(tmp_path, load_format="dummy", dtype="bfloat16")
    model = llm.engine.runner.model
    num_bytes = sum(param.nbytes for param in model.parameters())
    num_bytes += sum(
        2 * math.prod(m.format.packed.shape) for m in model.modules() if isinstance(m, Linear) and m.format.is_laid_out
    )
    before = resident()
    llm.sleep(2)
    assert num_bytes > 50e6 and before - resident() > 0.9 * num_bytes


@pytest.mark.parametrize("level", [1, 2])
def test_prefix_cache_is_empty_after_sleep(
    level: int, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint("plain"))
    for _ in range(2):
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert [output.num_cached_tokens for output in outputs] == [0, 0, 0]
        llm.sleep(level)
        llm.wake_up()
        llm.load_weights(tensors_of(checkpoint("plain")) if level == 2 else [])


def test_asleep_nothing_is_generated_or_loaded_and_the_error_says_what_to_call(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint("plain"))
    for level in (1, 2):
        llm.sleep(level)
        with pytest.raises(RuntimeError, match=r"sleeps: call wake_up\(\)"):
            tokens(llm)
        with pytest.raises(RuntimeError, match=r"sleeps: call wake_up\(\)"):
            llm.load_weights(tensors_of(checkpoint("plain")))
        assert llm.stats().num_waiting == 0
        llm.reset_prefix_cache()
    llm.wake_up()
    llm.load_weights(tensors_of(checkpoint("plain")))
    assert tokens(llm) == expected(checkpoint("plain"))


def test_after_level_2_nothing_is_generated_until_every_tensor_has_come(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm, pairs = make_llm(checkpoint("plain")), tensors_of(checkpoint("plain"))
    llm.sleep(2)
    llm.wake_up()
    for start in range(0, len(pairs), 6):
        with pytest.raises(RuntimeError, match=rf"{len(pairs) - start} tensors.*call load_weights\(\)"):
            tokens(llm)
        llm.load_weights(pairs[start : start + 6])
    assert tokens(llm) == expected(checkpoint("plain"))


def test_after_level_2_a_failed_load_counts_what_it_has_loaded(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm, pairs = make_llm(checkpoint("plain")), tensors_of(checkpoint("plain"))
    llm.sleep(2)
    llm.wake_up()
    with pytest.raises(ValueError, match="'extra'"):
        llm.load_weights(iter([*pairs[:4], ("extra", torch.zeros(1))]))
    with pytest.raises(RuntimeError, match=f"{len(pairs) - 4} tensors"):
        tokens(llm)
    llm.load_weights(pairs[4:])
    assert tokens(llm) == expected(checkpoint("plain"))


def test_weights_half_loaded_survive_level_1(checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> None:
    llm, pairs = make_llm(checkpoint("plain")), tensors_of(checkpoint("plain"))
    llm.sleep(2)
    llm.wake_up()
    llm.load_weights(pairs[:9])
    llm.sleep(1)
    llm.wake_up()
    llm.load_weights(pairs[9:])
    assert tokens(llm) == expected(checkpoint("plain"))


def test_sleep_and_wake_up_twice_are_once(checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(checkpoint("plain"))
    llm.wake_up()
    assert not llm.is_sleeping
    llm.sleep(1)
    llm.sleep(1)
    llm.wake_up()
    llm.wake_up()
    assert tokens(llm) == expected(checkpoint("plain"))
    llm.sleep(1)
    llm.sleep(2)  # deeper
    llm.sleep(1)  # no lighter
    llm.wake_up()
    with pytest.raises(RuntimeError, match="call load_weights"):
        tokens(llm)
    llm.wake_up()
    llm.load_weights(tensors_of(checkpoint("plain")))
    assert tokens(llm) == expected(checkpoint("plain"))


@pytest.mark.parametrize("level", [0, 3, -1, None, "1"])
def test_other_levels_are_refused(level: object, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(checkpoint("plain"))
    with pytest.raises(ValueError, match=f"level={level!r} must be 1 .* or 2"):
        llm.sleep(level)
    assert not llm.is_sleeping
    assert tokens(llm) == expected(checkpoint("plain"))


def test_sleep_is_refused_while_requests_run_and_they_go_on(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(checkpoint("plain"))
    engine = llm.engine
    seq = engine.make_sequence(PROMPTS[0], GREEDY)
    engine.add(seq)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="sleep.* while 1 requests are unfinished"):
            llm.sleep()
        engine.step()
    while engine.has_unfinished_requests:
        engine.step()
    assert seq.output_token_ids == expected(checkpoint("plain"))[0]


@pytest.mark.parametrize("level", [1, 2])
def test_engine_that_finds_no_memory_sleeps_on_and_may_be_woken_again(
    level: int, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(checkpoint("plain"))
    runner = llm.engine.runner
    llm.sleep(level)

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("somebody else's")

    with monkeypatch.context() as patch:
        patch.setattr("nanovllm.worker.model_runner.InputBatch", fail)  # once the cache is made
        with pytest.raises(torch.OutOfMemoryError):
            llm.wake_up()
    assert llm.is_sleeping and runner.kv_cache is None
    assert all(param.is_meta == (level == 2) for param in runner.model.parameters())
    with pytest.raises(RuntimeError, match=r"call wake_up\(\)"):
        tokens(llm)
    llm.wake_up()
    if level == 2:
        llm.load_weights(tensors_of(checkpoint("plain")))
    assert tokens(llm) == expected(checkpoint("plain"))


def test_weights_that_were_loaded_stay_when_the_cache_finds_no_memory(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(checkpoint("plain"))
    llm.sleep(2)
    llm.wake_up(tags=["weights"])
    llm.load_weights(tensors_of(checkpoint("plain")))

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("the trainer's")

    with monkeypatch.context() as patch:
        patch.setattr("nanovllm.worker.model_runner.InputBatch", fail)  # once the cache is made
        with pytest.raises(torch.OutOfMemoryError):
            llm.wake_up(tags=["kv_cache"])
    assert llm.is_sleeping and llm.engine.runner.kv_cache is None
    llm.wake_up(tags=["kv_cache"])
    assert tokens(llm) == expected(checkpoint("plain"))


def test_sleep_does_not_turn_the_random_numbers_back(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8)
    runs = []
    for sleeps in (False, True):
        llm = make_llm(checkpoint("plain"), seed=3)
        runs.append([tokens(llm, params)])
        if sleeps:
            llm.sleep()
            llm.wake_up()
        runs[-1].append(tokens(llm, params))
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_counters_go_on(checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(checkpoint("plain"))
    tokens(llm)
    before = llm.stats()
    llm.sleep()
    assert llm.stats() == before
    llm.wake_up()
    assert llm.stats() == before


@pytest.mark.parametrize("level", [1, 2])
def test_may_be_closed_asleep(level: int, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(checkpoint("plain"))
    llm.sleep(level)
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.wake_up()


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_that_was_interrupted_may_be_called_again(
    level: int, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(checkpoint("plain"))
    before = tokens(llm)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "stop", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.sleep(level)
    with pytest.raises(RuntimeError, match=r"sleep\(\) was interrupted: call it again"):
        tokens(llm)
    llm.sleep(level)
    llm.wake_up()
    if level == 2:
        llm.load_weights(tensors_of(checkpoint("plain")))
    assert tokens(llm) == before
