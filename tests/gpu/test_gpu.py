"""The engine on a CUDA device keeps the promises that it keeps on the CPU, and those that only a device can break."""

import gc
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SHAPES, TINY, WIDE, Reference, drawn_logits, random_prompts, save_checkpoint

from nanovllm import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LENGTHS = [40, 1, 17, 70, 2, 16, 15]
PROMPTS = random_prompts(LENGTHS)
GREEDY = SamplingParams(temperature=0.0, max_tokens=40)
GIB = 2**30

# A shape whose errors average out enough to be compared: more layers, heads of a real model's size.
MEDIUM = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1031,
}


@pytest.fixture
def make_gpu_llm(make_llm: Callable[..., LLM]) -> Callable[..., LLM]:
    def make(path: Path, max_behind: int | None = None, **options: Any) -> LLM:
        return make_llm(path, max_behind, **{"device": "cuda", **options})

    return make


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("medium"), MEDIUM)


@pytest.fixture(scope="module")
def wide_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config without weights."""
    path = tmp_path_factory.mktemp("wide")
    config = {**TINY, **WIDE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS, params: Any = GREEDY) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


_expected: dict[Path, list[list[int]]] = {}


def expected_tokens(path: Path) -> list[list[int]]:
    if path not in _expected:
        _expected[path] = [Reference(path).greedy(prompt, 40) for prompt in PROMPTS]
    return _expected[path]


class TestParity:
    @pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_greedy_float32_tokens_equal_transformers(
        self, shape: str, eager: bool, checkpoint: Callable[..., Path], make_gpu_llm: Callable[..., LLM]
    ) -> None:
        path = checkpoint(shape)
        llm = make_gpu_llm(path, enforce_eager=eager)
        assert (llm.engine.runner.graphs is None) == eager
        assert llm.engine.max_behind == 1, "the host does not plan ahead"
        for _ in range(2):  # the second round from the prefix cache
            assert tokens(llm) == expected_tokens(path)
        assert llm.stats().prefix_hits == sum((n - 1) // 16 * 16 for n in LENGTHS)

    @pytest.mark.parametrize(
        "options",
        [
            {"num_kvcache_blocks": 14},
            {"max_num_batched_tokens": 33},
            {"num_kvcache_blocks": 14, "max_num_batched_tokens": 33, "max_num_seqs": 5},
            {"enable_prefix_caching": False},
            {"kvcache_block_size": 48, "num_kvcache_blocks": 8},
            {"kvcache_block_size": 256, "num_kvcache_blocks": 8},
        ],
        ids=str,
    )
    def test_greedy_float32_tokens_equal_transformers_however_the_work_is_cut(
        self, options: dict[str, Any], checkpoint: Callable[..., Path], make_gpu_llm: Callable[..., LLM]
    ) -> None:
        path = checkpoint("gqa3-dim48")
        llm = make_gpu_llm(path, **options)
        for _ in range(3):
            assert tokens(llm) == expected_tokens(path)
        stats = llm.stats()
        assert stats.cache_usage == 0.0
        assert stats.num_preemptions > 0 or options.get("num_kvcache_blocks") != 14

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_logits_are_as_close_to_float32_as_transformers_are(
        self, dtype: torch.dtype, medium: Path, make_gpu_llm: Callable[..., LLM]
    ) -> None:
        """Compares prompt and decode logits with the float32 CPU reference, and transformers' own with it too."""
        llm = make_gpu_llm(medium, dtype=str(dtype).removeprefix("torch."), enforce_eager=True)
        ours = theirs = 0.0
        for prompt in random_prompts([1, 30, 130], vocab_size=MEDIUM["vocab_size"]):
            drawn = drawn_logits(llm, prompt, num_tokens=24)
            answer = drawn.argmax(-1).tolist()  # not a second run's: its prefix hits make other shapes, and other ties
            at = slice(len(prompt) - 1, -1)
            exact = Reference(medium).logits(prompt + answer)[at]
            half = Reference(medium, "cuda").logits(prompt + answer, dtype)[at]
            assert drawn.shape == exact.shape
            ours += float((drawn - exact).square().mean())
            theirs += float((half - exact).square().mean())
        assert 0 < ours**0.5 <= 1.25 * theirs**0.5, f"rms error {ours**0.5}, transformers' {theirs**0.5}"

    def test_bfloat16_graphs_give_the_tokens_of_eager_steps(
        self, medium: Path, make_gpu_llm: Callable[..., LLM]
    ) -> None:
        prompts = random_prompts([5, 30, 130, 64], vocab_size=MEDIUM["vocab_size"])
        answers = []
        for eager in (False, True):
            # Four sequences are a graph's size exactly: with no padding both run the same kernels on the same shapes.
            llm = make_gpu_llm(medium, dtype="bfloat16", enforce_eager=eager)
            answers.append(tokens(llm, prompts, SamplingParams(temperature=0.0, max_tokens=30)))
        assert answers[0] == answers[1]


class TestGraphs:
    def test_every_batch_size_is_padded_without_harm(
        self, checkpoint: Callable[..., Path], make_gpu_llm: Callable[..., LLM]
    ) -> None:
        """39 sequences end one by one, so the batch takes every size, those of graphs and those between."""
        path = checkpoint("gqa7-dim24-tied")
        rng = random.Random(0)
        prompts = random_prompts([rng.randint(1, 60) for _ in range(39)], seed=1)
        lengths = list(range(2, 41))
        rng.shuffle(lengths)
        params = [SamplingParams(temperature=0.0, max_tokens=n) for n in lengths]
        graphed = make_gpu_llm(path, max_num_seqs=39)
        assert graphed.engine.runner.shapes.decodes == [1, 2, 4, 8, 16, 32, 39]
        expected = [Reference(path).greedy(p, n) for p, n in zip(prompts, lengths, strict=True)]
        for _ in range(2):
            assert tokens(graphed, prompts, params) == expected
        assert graphed.stats().cache_usage == 0.0

    def test_padding_writes_nowhere(self, checkpoint: Callable[..., Path], make_gpu_llm: Callable[..., LLM]) -> None:
        """Padded decode steps change no bit of blocks and rows that no sequence owns."""
        llm = make_gpu_llm(checkpoint("plain"), num_kvcache_blocks=32, max_num_seqs=8, enable_prefix_caching=False)
        runner = llm.engine.runner
        with torch.inference_mode():
            runner.kv_cache.fill_(123.0)
            runner.batch.token_ids.fill_(77)
        tokens(llm, PROMPTS[:3], SamplingParams(temperature=0.0, max_tokens=12))  # 3 sequences in the graph of 4
        torch.cuda.synchronize()
        used = -(-(40 + 12) // 16) + 1 + 2
        touched = (runner.kv_cache != 123.0).flatten(3).any(-1).any(0).any(0)  # [blocks]
        assert int(touched.sum()) <= used
        rows = (runner.batch.token_ids != 77).any(dim=1)
        assert int(rows.sum()) == 3

    @pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
    def test_prompts_that_join_decodes_are_padded_without_harm(
        self, eager: bool, checkpoint: Callable[..., Path], make_gpu_llm: Callable[..., LLM]
    ) -> None:
        """Sixty requests share twenty rows, so that prompts keep joining the decodes, one or a few at a time."""
        path = checkpoint("gqa7-dim24-tied")
        rng = random.Random(0)
        prompts = random_prompts([rng.randint(1, 90) for _ in range(60)], seed=2)
        lengths = [rng.randint(1, 40) for _ in prompts]
        params = [SamplingParams(temperature=0.0, max_tokens=n) for n in lengths]
        llm = make_gpu_llm(path, max_num_seqs=20, enforce_eager=eager, enable_prefix_caching=False)
        runner, shapes = llm.engine.runner, []
        apply = runner.batch.apply
        runner.batch.apply = lambda plan, slot, shape: (shapes.append(shape), apply(plan, slot, shape))
        expected = [Reference(path).greedy(p, n) for p, n in zip(prompts, lengths, strict=True)]
        assert tokens(llm, prompts, params) == expected
        mixed = [shape for shape in shapes if shape.num_chunks]
        assert {shape.num_decodes for shape in mixed} >= {16, 20}
        assert eager or sum(shape in runner.shapes.with_chunks() for shape in mixed) > 10

    @pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7])
    def test_any_number_of_rows_has_its_graphs(
        self, max_num_seqs: int, checkpoint: Callable[..., Path], make_gpu_llm: Callable[..., LLM]
    ) -> None:
        path = checkpoint("plain")
        assert tokens(make_gpu_llm(path, max_num_seqs=max_num_seqs)) == expected_tokens(path)


class TestSampling:
    PARAMS = [
        SamplingParams(temperature=0.0, max_tokens=40),
        SamplingParams(temperature=1.0, max_tokens=40, seed=1),
        SamplingParams(temperature=0.7, top_k=5, max_tokens=40, seed=2),
        SamplingParams(temperature=1.3, top_p=0.8, max_tokens=40, seed=3),
        SamplingParams(temperature=1.0, min_p=0.1, max_tokens=40, seed=-4),
        SamplingParams(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02, max_tokens=40, seed=2**62),
        SamplingParams(temperature=1.0, min_tokens=10, stop_token_ids=list(range(60)), max_tokens=40, seed=6),
    ]

    def test_parameters_inside_graphs_draw_the_tokens_of_the_cpu(
        self, checkpoint: Callable[..., Path], make_gpu_llm: Callable[..., LLM], make_llm: Callable[..., LLM]
    ) -> None:
        path = checkpoint("plain")
        expected = tokens(make_llm(path), PROMPTS, self.PARAMS)
        assert tokens(make_gpu_llm(path), PROMPTS, self.PARAMS) == expected
        assert tokens(make_gpu_llm(path, enforce_eager=True), PROMPTS, self.PARAMS) == expected
        assert tokens(make_gpu_llm(path, num_kvcache_blocks=14), PROMPTS, self.PARAMS) == expected

    def test_min_tokens_holds_back_eos_inside_graphs(
        self, checkpoint: Callable[..., Path], make_gpu_llm: Callable[..., LLM]
    ) -> None:
        llm = make_gpu_llm(checkpoint("plain"))
        llm.engine.eos_token_ids = frozenset(range(0, 60))
        params = SamplingParams(temperature=1.0, min_tokens=12, max_tokens=40)
        for answer in tokens(llm, PROMPTS * 2, params):
            assert len(answer) > 12 and min(answer[:12]) >= 60
            assert answer[-1] < 60 or len(answer) == 40

    def test_seeds_absent_differ_and_present_repeat(
        self, checkpoint: Callable[..., Path], make_gpu_llm: Callable[..., LLM]
    ) -> None:
        llm = make_gpu_llm(checkpoint("plain"))
        free = tokens(llm, [PROMPTS[0]] * 8, SamplingParams(temperature=1.0, max_tokens=20))
        assert len({tuple(answer) for answer in free}) == 8
        seeded = tokens(llm, [PROMPTS[0]] * 8, SamplingParams(temperature=1.0, max_tokens=20, seed=5))
        assert len({tuple(answer) for answer in seeded}) == 1


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def wide_llm(path: Path, **options: Any) -> LLM:
    defaults = {
        "device": "cuda",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.3,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "max_model_len": 2048,
    }
    return LLM(str(path), **{**defaults, **options})


@pytest.fixture(scope="module")
def libraries_have_theirs(wide_config: Path) -> None:
    """Make an engine first: a process's first engine makes libraries allocate workspaces that they keep."""
    wide_llm(wide_config).close()


@pytest.mark.usefixtures("libraries_have_theirs")
class TestMemory:
    @pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
    def test_engine_fills_the_share_it_was_given_and_gives_it_back(self, eager: bool, wide_config: Path) -> None:
        before = allocated()
        free, total = torch.cuda.mem_get_info()
        with wide_llm(wide_config, enforce_eager=eager) as llm:
            used = free - torch.cuda.mem_get_info()[0]
            assert 0.27 * total < used < 0.3 * total + GIB // 2, f"{used / GIB:.2f} GiB of {total / GIB:.2f}"
            # The largest step there can be, and then many decodes with every sampler mode: no more than was measured.
            params = [SamplingParams(temperature=1.0, top_p=0.9, top_k=i % 50, max_tokens=20) for i in range(100)]
            outputs = llm.generate(random_prompts([1500] * 100, vocab_size=151936), params, use_tqdm=False)
            assert all(len(output["token_ids"]) >= 1 for output in outputs)
            used = free - torch.cuda.mem_get_info()[0]
            assert used < 0.3 * total + GIB // 2, f"{used / GIB:.2f} GiB of {total / GIB:.2f}"
        assert allocated() <= before + 2**20
        assert free - torch.cuda.mem_get_info()[0] < GIB, "the device's memory was not given back"

    def test_dropping_the_last_reference_gives_the_memory_back(self, wide_config: Path) -> None:
        before = allocated()
        llm = wide_llm(wide_config, num_kvcache_blocks=64)
        assert torch.cuda.memory_allocated() > before + GIB // 2
        del llm
        assert allocated() <= before + 2**20

    def test_two_engines_share_the_device_and_answer_as_one_does(self, wide_config: Path) -> None:
        _, total = torch.cuda.mem_get_info()
        prompts = random_prompts([100, 3, 700], vocab_size=151936)
        with wide_llm(wide_config) as first, wide_llm(wide_config) as second:
            for llm in (first, second):
                cache = llm.engine.runner.kv_cache
                assert 0.1 * total < cache.numel() * cache.element_size() < 0.3 * total
            expected = tokens(first, prompts)
            assert tokens(second, prompts) == expected
            first.close()
            assert tokens(second, prompts) == expected

    def test_share_too_small_for_the_weights_is_refused(self, wide_config: Path) -> None:
        before = allocated()
        with pytest.raises(ValueError, match="no room for one block.*gpu_memory_utilization"):
            wide_llm(wide_config, gpu_memory_utilization=0.004)
        assert allocated() <= before + 2**20


class TestFailure:
    @pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()], ids=repr)
    @pytest.mark.parametrize("where", ["launch", "read"])
    def test_engine_serves_correctly_after_a_failure_with_steps_in_flight(
        self, where: str, error: BaseException, checkpoint: Callable[..., Path], make_gpu_llm: Callable[..., LLM]
    ) -> None:
        path = checkpoint("plain")
        llm = make_gpu_llm(path)
        for at in (1, 2, 9):
            owner, name = (llm.engine.runner, "launch") if where == "launch" else (llm.engine, "_read_tokens")
            original, calls = getattr(owner, name), iter(range(at - 1))

            def fail(*args: Any, original: Any = original, calls: Any = calls) -> Any:
                if next(calls, None) is None:
                    raise error
                return original(*args)

            setattr(owner, name, fail)
            with pytest.raises(type(error)):
                tokens(llm)
            delattr(owner, name)
            assert llm.stats().cache_usage == 0.0
            assert tokens(llm) == expected_tokens(path)
