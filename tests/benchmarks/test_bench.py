"""The benchmark draws the published requests, its roofline adds up, and its JSON has every figure."""

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from families import save_family

from benchmarks.ceilings import Ceilings
from benchmarks.engines import EngineOptions, make_engine
from benchmarks.machine import seconds_since_process_start
from benchmarks.model_shape import ModelShape, model_shape, read_config
from benchmarks.roofline import decode_load, roofline
from benchmarks.runs import Result, compare, measure_split, timed_run
from benchmarks.setting import Setting
from benchmarks.step_timing import StepRecorder
from benchmarks.workloads import PRESETS, LengthMix, Workload, draw, few_streams, shrunk
from nanovllm import demo_model

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "benchmarks" / "shapes"
SMALL_RUN = "--max-model-len 512 --num-blocks 64 --min-input 5 --max-input 20 --min-output 3 --max-output 9".split()


def run_script(script: str, *args: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script from another directory, without the package installed."""
    command = [sys.executable, str(ROOT / script), *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # tests run side by side: threads that wait for each other crawl
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_headline_is_upstreams_workload_draw_for_draw():
    workload = draw("headline", PRESETS["headline"], vocab_size=151936)
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    max_tokens = [random.randint(100, 1024) for _ in range(256)]
    assert (workload.prompts, workload.max_tokens, workload.temperature) == (prompts, max_tokens, 0.6)
    assert (workload.num_input_tokens, workload.num_output_tokens) == (142_827, 133_966)


def test_cpu_workloads_have_the_published_token_counts():
    a, b = (draw(name, PRESETS[name], vocab_size=151936) for name in ("cpu-a", "cpu-b"))
    assert (len(a.prompts), a.num_input_tokens, a.num_output_tokens) == (16, 2_466, 1_271)
    assert all(32 <= n <= 256 for n in a.input_lens) and all(32 <= n <= 128 for n in a.max_tokens)
    assert (b.input_lens, b.max_tokens) == ([64], [128])
    streams = draw("8 streams", few_streams(8), vocab_size=151936)
    assert (streams.input_lens, streams.max_tokens) == ([128] * 8, [512] * 8)


def test_small_vocabulary_keeps_the_lengths():
    full, small = (draw("headline", PRESETS["headline"], vocab_size=size) for size in (151936, 512))
    assert (small.input_lens, small.max_tokens) == (full.input_lens, full.max_tokens)
    assert max(map(max, small.prompts)) < 512


@pytest.mark.parametrize("change", [{"num_seqs": 0}, {"min_input": 0}, {"max_output": 99}])
def test_impossible_workload_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        draw("bad", replace(PRESETS["headline"], **change), vocab_size=512)


def test_shrunk_mix_is_smaller_in_all_but_kind():
    mix = LengthMix(num_seqs=256, min_input=100, max_input=1024, min_output=3, max_output=8, lengths_first=True)
    assert shrunk(mix, 1) == mix
    assert shrunk(mix, 4) == LengthMix(
        num_seqs=64, min_input=25, max_input=256, min_output=1, max_output=2, lengths_first=True
    )


@pytest.mark.parametrize(
    "name",
    ["qwen3-0.6b", "qwen3-8b", "qwen3-32b", "llama-3.1-8b", "gemma-3-4b", "gpt-oss-20b", "qwen3-30b-a3b", "tiny"],
)
def test_model_shape_counts_the_weights_of_transformers_model(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(SHAPES / name))
    matrices = {key: p.numel() for key, p in model.named_parameters() if p.dim() == 2 and "bias" not in key}
    experts = sum(p.numel() for key, p in model.named_parameters() if p.dim() == 3)
    embedding = matrices.pop("model.embed_tokens.weight")
    head = matrices.pop("lm_head.weight", embedding)  # tied: the embedding is the head
    shape = model_shape(SHAPES / name, bytes_per_element=2)
    assert (shape.layer_params, shape.head_params) == (sum(matrices.values()), head)
    assert shape.num_experts * shape.expert_params == experts


def test_windows_and_experts_count_as_far_as_they_are_read():
    shape = ModelShape(
        layer_params=1000,
        head_params=0,
        windows=((None, 1), (4, 2)),
        kv_elements_per_token=10,
        attention_flops_per_pair=1,
        bytes_per_element=1,
        expert_params=100,
        num_experts=4,
        experts_per_token=2,
    )
    assert [shape.weight_bytes(n) for n in (1, 2, 1000)] == [1200, 1300, pytest.approx(1400)]
    # Decodes over 4, 5 and 6 tokens: the windows see 4 each time.
    bound = roofline(shape, [3], [4], Ceilings(1.0, 1.0, 1e9))
    assert bound.kv_read_s == 10 * (4 + 5 + 6) + 2 * 10 * (4 + 4 + 4)
    # Pairs of a prompt of 6 with a window of 4: 1 + 2 + 3 + 4 + 4 + 4.
    bound = roofline(shape, [6], [1], Ceilings(1e9, 1e9, 1.0))
    assert bound.prefill_s == 2 * 1200 * 6 + 21 + 2 * 18


def test_qwen3_shape_has_the_published_bytes():
    shape = model_shape(SHAPES / "qwen3-0.6b", bytes_per_element=2)
    assert shape.kv_bytes_per_token == 114_688
    assert round(shape.weight_bytes() / 1e9, 2) == 1.19


def test_decode_load_counts_live_sequences_and_their_context():
    # 3 + 4 tokens: decodes over 4, 5 and 6. 10 + 2: one, over 11. 5 + 1: its prompt gives its only token.
    num_seqs, context = decode_load([3, 10, 5], [4, 2, 1])
    assert (num_seqs.tolist(), context.tolist()) == ([0, 2, 1, 1], [0, 4 + 11, 5, 6])
    # Two rows: the third comes in at step 2, when the second has ended.
    num_seqs, context = decode_load([3, 10, 5], [4, 2, 3], max_num_seqs=2)
    assert (num_seqs.tolist(), context.tolist()) == ([0, 2, 1, 2, 1], [0, 4 + 11, 5, 6 + 6, 7])


def test_roofline_equals_the_sum_worked_out_by_hand():
    shape = ModelShape(
        layer_params=1000,
        head_params=500,
        windows=((None, 2),),
        kv_elements_per_token=5,
        attention_flops_per_pair=20,
        bytes_per_element=2,
    )
    # Decodes with 4, then 5 tokens of context: (3000 + 80) and (3000 + 100) bytes; 3160 and 3200 FLOPs.
    # Prefill: 3 tokens * 2000 + one head 1000 + 6 pairs * 40 = 7240 FLOPs; 3000 bytes.
    memory_bound = roofline(shape, [3], [3], Ceilings(100.0, 100.0, 1000.0))
    assert memory_bound.decode_s == pytest.approx(30.80 + 31.00)
    assert memory_bound.prefill_s == pytest.approx(30.0)
    assert memory_bound.total_s == pytest.approx(91.8)
    assert (memory_bound.weight_read_s, memory_bound.kv_read_s) == (pytest.approx(60.0), pytest.approx(1.8))
    assert memory_bound.num_decode_steps == 2
    compute_bound = roofline(shape, [3], [3], Ceilings(1e6, 1e6, 1000.0))
    assert compute_bound.decode_s == pytest.approx(3.16 + 3.20)
    assert compute_bound.prefill_s == pytest.approx(7.24)


def test_comparison_is_of_the_best_runs_and_of_neighbours():
    ours, theirs = (Result("a", name, 1, 1, 1, 1, runs_s=runs) for name, runs in (("x", [2.0, 1.0]), ("y", [3.0, 4.0])))
    ours.best_s, theirs.best_s = 1.0, 3.0
    assert compare(ours, theirs) == {"workload": "a", "engines": ["x", "y"], "ratio": 3.0, "ratio_by_run": [1.5, 4.0]}


def test_run_that_lost_tokens_is_not_reported():
    engine = SimpleNamespace(name="short", reset=lambda: None, generate=lambda workload: [[1, 2]])
    with pytest.raises(RuntimeError, match="short gave 2 tokens where 3"):
        timed_run(engine, Workload("w", [[1]], [3], 0.6))


def test_split_of_a_run_that_lost_tokens_is_not_reported():
    options = EngineOptions(
        model_dir=SHAPES / "tiny", load_format="dummy", device="cpu", dtype="float32", max_model_len=64,
        block_size=16, num_blocks=16,
    )  # fmt: skip
    engine = make_engine("nanovllm", options)
    short = replace(engine, generate=lambda workload: [ids[:-1] for ids in engine.generate(workload)])
    with pytest.raises(RuntimeError, match="gave 4 tokens where 5"):
        measure_split(short, Workload("w", [[1, 2]], [5], 0.0))
    engine.close()


def test_process_time_counts_from_the_start_of_the_interpreter():
    code = "import sys, time; time.sleep(0.5); sys.path.insert(0, sys.argv[1]); import benchmarks.machine as m;"
    code += "print(m.seconds_since_process_start())"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert 0.48 <= float(done.stdout) <= time.perf_counter() - start + 0.02  # the system's clock ticks at 100 Hz
    assert seconds_since_process_start() > 0


class FakeEngine:
    """An engine with steps of known cost: 20 ms of device time, 10 ms of host time."""

    is_cuda = False

    def __init__(self) -> None:
        self.runner = self
        self.batch = FakeBatch()
        self.plans = [
            SimpleNamespace(rows=[0, 1], num_decodes=1, num_tokens=31),
            SimpleNamespace(rows=[0, 1], num_decodes=2, num_tokens=2),
            SimpleNamespace(rows=[0], num_decodes=1, num_tokens=1),
        ]

    def launch(self, plan):
        self.batch.apply(plan, 0, 1)
        time.sleep(0.02)
        return SimpleNamespace(tokens=lambda: [7])

    def step(self):
        time.sleep(0.01)
        return self.runner.launch(self.plans.pop(0)).tokens()


class FakeBatch:
    def apply(self, plan, slot, num_padded):
        pass


def test_split_attributes_time_to_steps_and_host_and_leaves_the_engine_as_it_was():
    engine = FakeEngine()
    with StepRecorder(engine) as recorder:
        assert [engine.step() for _ in range(3)] == [[7]] * 3
    assert "step" not in vars(engine) and "launch" not in vars(engine) and "apply" not in vars(engine.batch)
    split = recorder.summary()
    assert (split["decode"]["num_steps"], split["decode"]["num_seqs"], split["decode"]["num_tokens"]) == (2, 3, 3)
    assert (split["prefill"]["num_steps"], split["prefill"]["num_tokens"]) == (1, 31)
    assert split["decode"]["busy_s"] >= 0.04 and split["prefill"]["busy_s"] >= 0.02
    assert split["decode"]["idle_s"] >= 0.02 and split["prefill"]["idle_s"] >= 0.01
    assert split["decode"]["host_s"] >= 0.02 and split["prefill"]["host_s"] >= 0.01
    assert split["device_busy_s"] + split["host_s"] <= split["wall_s"]
    assert split["host_s"] >= 0.03 and split["host_hidden_s"] < 1e-3  # they took turns
    assert split["host_not_hidden_s"] == pytest.approx(split["wall_s"] - split["device_busy_s"])
    assert split["device_idle_share"] == pytest.approx(split["host_not_hidden_s"] / split["wall_s"])
    full = split["full_batch"]  # two sequences decode together at most: of the two decode steps, one
    assert (full["num_steps"], full["num_seqs"]) == (1, 2)
    assert full["idle_share"] == pytest.approx(full["idle_s"] / (full["busy_s"] + full["idle_s"]))
    assert 0.2 < full["idle_share"] < 0.5  # 10 ms of 30


def test_transformers_batch_gives_each_request_the_tokens_it_gets_alone():
    options = EngineOptions(
        model_dir=SHAPES / "tiny", load_format="dummy", device="cpu", dtype="float32", max_model_len=512
    )
    engine = make_engine("transformers", options)
    together = Workload("together", [[1, 2, 3], list(range(5, 25)), [9] * 7], [4, 6, 9], temperature=0.0)
    alone = [
        engine.generate(Workload("alone", [prompt], [n], 0.0))[0]
        for prompt, n in zip(together.prompts, together.max_tokens, strict=True)
    ]
    assert engine.generate(together) == alone
    assert [len(token_ids) for token_ids in alone] == together.max_tokens


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_missing_vllm_is_named():
    options = EngineOptions(
        model_dir=SHAPES / "tiny", load_format="dummy", device="cpu", dtype="auto", max_model_len=64
    )
    with pytest.raises(ImportError, match="vLLM is not installed"):
        make_engine("vllm", options)


def test_bench_reports_every_figure_in_its_last_line(tmp_path):
    args = ["--shape", "tiny", "--device", "cpu", "--streams", "1,3", "--compare", "transformers", *SMALL_RUN]
    done = run_script("bench.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {
        "benchmark", "model", "options", "temperature", "seed", "shrink", "startup", "machine", "versions",
        "ceilings", "experts_hit", "results", "comparisons", "splits",
    }  # fmt: skip
    assert 0 < report["startup"]["engine_ready_s"] < report["startup"]["first_token_s"]
    assert min(report["ceilings"].values()) > 0
    assert {"torch", "transformers", "nano-vllm", "python"} <= set(report["versions"])
    assert [(r["workload"], r["engine"]) for r in report["results"]] == [
        ("1 stream", "nanovllm"), ("1 stream", "transformers"),
        ("3 streams", "nanovllm"), ("3 streams", "transformers"),
    ]  # fmt: skip
    for result in report["results"]:
        assert len(result["runs_s"]) == 2 and result["best_s"] == min(result["runs_s"])
        assert result["output_tok_s"] == pytest.approx(result["output_tokens"] / result["best_s"])
        assert result["percent_of_roofline"] == pytest.approx(100 * result["roofline"]["total_s"] / result["best_s"])
    assert [len(comparison["ratio_by_run"]) for comparison in report["comparisons"]] == [2, 2]
    for result, split in zip(report["results"][::2], report["splits"], strict=True):
        assert split["prefill"]["num_tokens"] == result["input_tokens"]  # no prefix was cached
        assert split["decode"]["num_tokens"] == result["output_tokens"] - result["num_seqs"]
        assert 0 < split["decode"]["busy_s"] + split["prefill"]["busy_s"] <= split["wall_s"]
        assert 0 < split["device_idle_share"] < 1


def test_bench_of_two_ranks_says_what_they_send_each_other(bench_here, capsys):
    printed = bench_here(
        "--shape", "tiny", "--device", "cpu", "--streams", "1", "--tensor-parallel-size", "2", *SMALL_RUN
    )
    report = json.loads(printed.splitlines()[-1])
    (result,) = report["results"]
    assert report["options"]["tensor_parallel_size"] == 2
    assert result["output_tokens"] > 0 and 100 < result["plan_bytes_per_step"] < 1000
    assert f"rank 0 sends {result['plan_bytes_per_step']:,.0f} bytes a step" in printed
    with pytest.raises(SystemExit):
        bench_here("--ablate", "--tensor-parallel-size", "2")
    assert "--ablate" in capsys.readouterr().err


def test_the_roofline_of_a_mixture_counts_the_experts_that_its_tokens_hit(bench_here, tmp_path):
    model = save_family(tmp_path / "model", "qwen3moe")
    printed = bench_here("--model", str(model), "--device", "cpu", "--streams", "1", *SMALL_RUN)
    report = json.loads(printed.splitlines()[-1])
    hits = dict(map(tuple, report["experts_hit"]))
    assert hits[1] == 3 and 3 < hits[8] <= 7  # 3 of 7 experts a token
    assert "experts hit in a layer: 3.0 by 1" in printed
    shape = replace(model_shape(model, bytes_per_element=4), experts_hit=((1, 3.0), (8, 5.0)))
    alike = [(shape.weight_bytes(n) / 4 - shape.layer_params - shape.head_params) / shape.expert_params for n in (1, 8)]
    assert alike == pytest.approx([3.0, 5.0])


def test_roofline_of_several_devices_is_that_of_one_with_their_rates():
    options = EngineOptions(
        model_dir=SHAPES / "qwen3-8b", load_format="dummy", device="cuda", dtype="auto", max_model_len=64
    )
    setting = Setting(options=options, config=read_config(SHAPES / "qwen3-8b"), temperature=0.6, seed=0, repeat=1)
    four = replace(setting, options=replace(options, tensor_parallel_size=4))
    on_a_cpu = replace(setting, options=replace(options, tensor_parallel_size=4, device="cpu"))
    workload, ceilings = Workload("w", [[1, 2, 3]], [8], 0.6), Ceilings(1e9, 1e9, 1e12)
    bounds = [each.bound(workload, ceilings).total_s for each in (setting, four, on_a_cpu)]
    assert bounds[0] == bounds[2] == pytest.approx(4 * bounds[1])


def test_bench_refuses_requests_longer_than_the_model(tmp_path):
    done = run_script("bench.py", "--shape", "tiny", "--device", "cpu", "--max-model-len", "1000", cwd=tmp_path)
    assert done.returncode != 0 and "max_model_len=1000" in done.stderr


def test_example_prints_completions(tmp_path):
    model = demo_model()
    done = run_script("example.py", "--model", model, "--prompt", "def main():\n", "--max-tokens", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "def main():" in done.stdout and "8 tokens in" in done.stdout
