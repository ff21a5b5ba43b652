"""Sleep on a CUDA device: `sleep` frees memory for other processes, `wake_up` restores the same answers, and new
weights go to the addresses that captured graphs know."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SHAPES, TINY, WIDE, Reference, random_prompts, save_checkpoint
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from nanovllm import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GIB, MIB = 2**30, 2**20
PROMPTS = random_prompts([20, 1, 33, 70], seed=9)
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
SHORT_WIDE = {**TINY, **WIDE, "max_position_embeddings": 4096}  # 0.7 GB in bfloat16

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def wide_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config without weights."""
    path = tmp_path_factory.mktemp("wide")
    config = {**SHORT_WIDE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def wide_tensors() -> Tensors:
    """Weights for `wide_config`, in host memory."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SHORT_WIDE))
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(param.shape, dtype=torch.bfloat16)
        if "norm" in name
        else (torch.randn(param.shape, generator=generator) * 0.05).bfloat16()
        for name, param in model.named_parameters()
    }


@pytest.fixture(scope="module")
def libraries_have_theirs(wide_config: Path) -> None:
    """Make an engine first: a process's first engine makes libraries allocate workspaces that they keep."""
    with wide_llm(wide_config, num_kvcache_blocks=64) as llm:
        tokens(llm)


def wide_llm(path: Path, **options: Any) -> LLM:
    defaults = {
        "device": "cuda",
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.3,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
    }
    return LLM(str(path), **{**defaults, **options})


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


def expected(path: Path) -> list[list[int]]:
    return [Reference(path).greedy(prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def in_use() -> int:
    """Bytes of the device's memory that processes hold."""
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.mark.usefixtures("libraries_have_theirs")
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("level", [1, 2])
def test_memory_is_given_back_asleep_and_the_answers_are_the_same_awake(
    level: int, eager: bool, wide_config: Path, wide_tensors: Tensors
) -> None:
    allocated_before, in_use_before = allocated(), in_use()
    with wide_llm(wide_config, enforce_eager=eager) as llm:
        llm.load_weights(wide_tensors.items())
        before = tokens(llm)
        allocated_awake, in_use_awake = allocated(), in_use()
        assert in_use_awake > in_use_before + 10 * GIB
        for _ in range(3):
            llm.sleep(level)
            assert torch.cuda.memory_allocated() < allocated_before + 64 * MIB
            assert in_use() < in_use_before + 256 * MIB
            assert all(p.is_meta if level == 2 else p.is_pinned() for p in llm.engine.runner.model.parameters())
            llm.wake_up()
            assert all(param.is_cuda for param in llm.engine.runner.model.parameters())
            assert (llm.engine.runner.graphs is None) == eager
            if level == 2:
                llm.load_weights(wide_tensors.items())
            assert tokens(llm) == before
            assert abs(allocated() - allocated_awake) < 64 * MIB
            assert abs(in_use() - in_use_awake) < 256 * MIB


@pytest.mark.parametrize("level", [1, 2])
def test_engine_that_finds_no_memory_sleeps_on_and_may_be_woken_again(
    level: int, wide_config: Path, wide_tensors: Tensors
) -> None:
    with wide_llm(wide_config) as llm:
        llm.load_weights(wide_tensors.items())
        before = tokens(llm)
        llm.sleep(level)
        asleep = allocated()
        # Room for nothing, and for the weights but not for the cache
        for room in (GIB // 8, 2 * GIB):
            taken = torch.empty(torch.cuda.mem_get_info()[0] - room, dtype=torch.uint8, device="cuda")
            with pytest.raises(torch.OutOfMemoryError):
                llm.wake_up()
            assert llm.is_sleeping
            with pytest.raises(RuntimeError, match=r"call wake_up\(\)"):
                tokens(llm)
            del taken
            assert allocated() <= asleep + MIB
        llm.wake_up()
        if level == 2:
            llm.load_weights(wide_tensors.items())
        assert tokens(llm) == before


@pytest.mark.parametrize("shape", ["gqa3-bias-linear", "gqa7-dim24-tied"])
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("source", ["cpu", "cuda", "float64"])
def test_new_weights_go_to_the_same_addresses_and_answer_as_transformers_does(
    source: str,
    eager: bool,
    shape: str,
    checkpoint: Callable[..., Path],
    make_llm: Callable[..., LLM],
    tmp_path: Path,
) -> None:
    trained = save_checkpoint(tmp_path, SHAPES[shape], seed=13)
    llm = make_llm(checkpoint(shape), device="cuda", enforce_eager=eager)
    assert tokens(llm) == expected(checkpoint(shape))
    runner = llm.engine.runner
    graphs, addresses = runner.graphs, [param.data_ptr() for param in runner.model.parameters()]
    new = load_file(trained / "model.safetensors")
    pairs = [(name, t.double() if source == "float64" else t.to(source)) for name, t in new.items()]
    llm.load_weights(iter(pairs[:9]))
    llm.load_weights(pairs[9:])
    for _, tensor in pairs:
        tensor.fill_(float("nan"))
    assert tokens(llm) == expected(trained) != expected(checkpoint(shape))
    assert runner.graphs is graphs and [param.data_ptr() for param in runner.model.parameters()] == addresses


def test_step_in_flight_of_an_aborted_request_does_no_harm(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
) -> None:
    path = checkpoint("plain")
    llm = make_llm(path, device="cuda")
    engine = llm.engine
    for give_back in (lambda: llm.load_weights(load_file(path / "model.safetensors").items()), llm.sleep):
        seq = engine.make_sequence(PROMPTS[0], GREEDY)
        engine.add(seq)
        assert engine.step() == [] and seq.output_token_ids == [], "no step is in flight"
        engine.abort([seq])
        give_back()
        llm.wake_up()
        assert tokens(llm) == expected(path)
