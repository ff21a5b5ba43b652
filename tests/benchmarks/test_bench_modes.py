"""The benchmark's modes measure and judge every row, and an ablation really switches its optimization off."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_bench import SHAPES, run_script

import bench
from benchmarks.ablation import VARIANTS, check_chart, draw_chart, read_report
from benchmarks.attention_timing import AttentionShape, Pool, decode_lengths
from benchmarks.engines import EngineOptions, make_engine
from benchmarks.model_shape import read_config
from benchmarks.plain_kernels import plain_gate_mul, plain_kernels, plain_qk_norm_rope_store, plain_sample, replaced
from benchmarks.ranks import rank_lines, sum_lines
from benchmarks.sampling_cost import CASES, PLAIN
from benchmarks.scaling import RUNS, peak_blocks
from benchmarks.setting import Setting
from benchmarks.targets import GOALS, ROWS, goal_lines, goals_for, judge
from benchmarks.workloads import Workload

SMALL_MODE = "--shape tiny --device cpu --shrink 64 --block-size 16 --num-blocks 512 --max-model-len 512".split()


@pytest.fixture
def run_mode(bench_here: Callable[..., str]) -> Callable[..., dict[str, Any]]:
    """`run_mode(*arguments)` runs a mode at a 64th of its size, in this process. Returns its report."""

    def run(*args: str) -> dict[str, Any]:
        printed = bench_here(*SMALL_MODE, *args)
        return json.loads(printed.splitlines()[-1]) | {"printed": printed}

    return run


def test_all_measures_every_row_of_the_goals(run_mode):
    report = run_mode("--all")
    rows = {row["key"]: row for row in report["rows"]}
    assert list(rows) == [key for key in ROWS if key not in ("scaling", "small_cache")]
    assert {key for key, row in rows.items() if not row["measured"] > 0} <= {"host_not_hidden", "device_idle"}
    assert all(row["row"] in report["printed"] and row["reached"] is None for row in rows.values())  # a CPU has no goal
    results = {result["workload"]: result for result in report["results"]}
    assert rows["headline"]["measured"] == results["headline"]["output_tok_s"]
    assert (results["headline"]["num_seqs"], results["32 streams"]["num_seqs"]) == (256 // 64, 32)
    assert rows["prefill_model"]["measured"] == pytest.approx(
        100 * results["prefill"]["roofline"]["prefill_s"] / results["prefill"]["best_s"]
    )
    kernels, ceilings = report["kernels"], report["ceilings"]
    assert kernels["decode_0"]["seqs"] == 256 and kernels["decode_900"]["seqs"] < kernels["decode_300"]["seqs"] < 256
    assert kernels["long_context"]["bytes"] == 8 * (32768 // 64) * 2 * 2 * 16 * 2  # K, V, heads, dim, bf16
    assert rows["long_context"]["measured"] == pytest.approx(
        100 * kernels["long_context"]["bytes"] / kernels["long_context"]["seconds"] / ceilings["read_bytes_per_s"]
    )
    assert rows["start_up"]["measured"] == report["startup"]["first_token_s"]
    assert rows["host_not_hidden"]["measured"] == 100 * report["splits"][0]["full_batch"]["idle_share"]


def test_scaling_preempts_in_the_small_cache_and_compares_with_the_first_run(run_mode):
    report = run_mode("--scaling")
    runs, small = report["scaling"], report["small_cache"]
    assert [(run["max_num_seqs"], run["num_requests"]) for run in runs] == [
        (rows // 64, count // 64) for rows, counts in RUNS.items() for count in counts
    ]
    assert all(run["num_preemptions"] == 0 and run["host_us_per_scheduled_sequence"] > 0 for run in runs)
    assert all(run["output_tok_s"] == pytest.approx(run["output_tokens"] / run["seconds"]) for run in runs)
    assert small["num_blocks"] <= small["blocks_needed"] // 2 and small["num_preemptions"] > 0
    assert small["output_tokens"] == runs[0]["output_tokens"]
    rows = {row["key"]: row["measured"] for row in report["rows"]}
    assert rows == {
        "scaling": pytest.approx(100 * min(run["output_tok_s"] for run in runs[1:]) / runs[0]["output_tok_s"]),
        "small_cache": pytest.approx(100 * small["output_tok_s"] / runs[0]["output_tok_s"]),
    }


def test_ranks_are_compared_by_rate_latency_and_what_is_sent(run_mode):
    report = run_mode("--ranks", "1,2")
    one, two = report["ranks"]
    assert [run["ranks"] for run in (one, two)] == [1, 2]
    lines = [line.split() for line in report["printed"].splitlines()]
    share = 100 * two["headline_tok_s"] / (2 * one["headline_tok_s"])
    of_one, of_two = (
        [
            f"{run['ranks']}",
            f"{run['headline_tok_s']:,.1f}",
            f"{efficiency:.1f}",
            "%",
            *(f"{run['stream_ms'][n]:.3f}" for n in ("1", "8", "32")),
            f"{run['plan_bytes_per_step']:,.0f}",
        ]
        for run, efficiency in ((one, 100.0), (two, share))
    )
    # The first is shown alone when it has been measured, and again beside the second.
    assert lines.count(of_one) == 2 and lines.count(of_two) == 1
    for run in (one, two):
        results = {result["workload"]: result for result in run["results"]}
        assert run["headline_tok_s"] == results["headline"]["output_tok_s"] > 0
        assert run["stream_ms"]["32"] == results["32 streams"]["ms_per_token"] > 0
        assert run["sums"] is None  # of a GPU
        assert [(row["key"], row["measured"], row["reached"]) for row in run["rows"]] == [
            ("headline", run["headline_tok_s"], None),  # no goals for a CPU
            ("token_1", run["stream_ms"]["1"], None),
        ]
    assert one["plan_bytes_per_step"] == 0 and 100 < two["plan_bytes_per_step"] < 1000


def test_efficiency_is_of_as_many_engines_of_the_first_number_of_ranks():
    run = {"headline_tok_s": 100.0, "stream_ms": {1: 1.0, 8: 2.0, 32: 3.0}, "plan_bytes_per_step": 0.0}
    lines = rank_lines([run | {"ranks": 2}, run | {"ranks": 4, "headline_tok_s": 150.0}])
    assert "100.0 %" in lines[2] and "75.0 %" in lines[3]


def test_sums_are_shown_beside_what_their_bytes_take_on_the_link():
    took = {"rows": 8, "hidden": 1000, "microseconds": 3.0}
    large = took | {"rows": 2000}
    times = [{"method": "ours, fused + norm", **took}, {"method": "NCCL + norm", **took, "microseconds": 9.0}]
    times += [{"method": "ours, fused + norm", **large}, {"method": "NCCL + norm", **large, "microseconds": 9.0}]
    rates = {"all_reduce": 9e9, "copy engine": 1e9, "storing kernel": 2e9}
    lines = sum_lines({"ranks": 2, "times": times, "errors": [], "bandwidth": rates})
    assert lines[2].split() == ["8", "x", "1000", "16,000", "6.00", "16.00"]
    assert lines[3].split() == ["2000", "x", "1000", "4,000,000", "18.00", "4000.00"]  # as the model does it: by NCCL
    assert len(lines) == 4
    assert "rank 1" in sum_lines({"ranks": 2, "times": [], "errors": ["rank 1, NCCL: lost"], "bandwidth": {}})[0]


def test_ablation_runs_every_variant_and_its_output_can_be_read_again(run_mode, tmp_path):
    report = run_mode("--ablate")
    present = [v.name for v in VARIANTS if importlib.util.find_spec(v.module)]
    assert [variant["variant"] for variant in report["ablation"]] == present and len(present) >= 5
    for variant in report["ablation"]:
        assert [result["workload"] for result in variant["results"]] == ["headline", "1 stream"]
        assert all(result["output_tok_s"] > 0 for result in variant["results"])
    saved = tmp_path / "saved.txt"
    saved.write_text(report.pop("printed"))
    assert read_report(saved) == report
    again = run_script("bench.py", "--ablate", "--from-json", str(saved), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert len(again.stdout.splitlines()) > len(present) and again.stdout in saved.read_text()


def test_ablation_chart_is_a_png_of_both_workloads(tmp_path):
    pytest.importorskip("matplotlib")
    results = [{"workload": name, "output_tok_s": rate} for name, rate in (("headline", 21000.0), ("1 stream", 900.0))]
    report = {
        "model": "tiny",
        "machine": {"cpu": "a CPU"},
        "ablation": [{"variant": name, "results": results} for name in ("everything on", "overlap off")],
    }
    draw_chart(report, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG") and (
        tmp_path / "chart.png"
    ).stat().st_size > 5000


def test_chart_that_cannot_be_drawn_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed
    with pytest.raises(ImportError, match=r"pip install 'nano-vllm\[bench\]'"):
        check_chart(tmp_path / "chart.png")
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(__spec__=object()))
    check_chart(tmp_path / "chart.png")
    for path in (tmp_path / "absent" / "chart.png", tmp_path / "chart.pdf"):
        with pytest.raises(ValueError, match="chart"):
            check_chart(path)


@pytest.mark.parametrize("content", ["", "no JSON\n", '{"results": []}\n', '{"ablation": []}\n', "[1]"])
def test_report_of_no_ablation_is_refused(tmp_path, content):
    (tmp_path / "saved.txt").write_text(content)
    with pytest.raises(ValueError, match="saved.txt"):
        read_report(tmp_path / "saved.txt")


@pytest.mark.parametrize(
    "args, error",
    [
        ("--all --streams 1", "--streams"),
        ("--scaling --num-seqs 4 --engine vllm", "--num-seqs, --engine"),
        ("--all --ablate", "not allowed with"),
        ("--shrink 2", "--shrink"),
        ("--all --shrink 65", "--shrink 65"),
        ("--all --chart x.png", "--ablate"),
        ("--ranks 1,2 --streams 1", "--ranks has workloads and an engine of its own: it takes no --streams"),
        ("--ranks 1,2 --tensor-parallel-size 2", "--tensor-parallel-size"),
        ("--ranks 0", "--ranks"),
        ("--scaling --ranks 1", "not allowed with"),
    ],
)
def test_options_that_a_mode_does_not_take_are_refused(monkeypatch, capsys, args, error):
    monkeypatch.setattr(sys, "argv", ["bench.py", *args.split()])
    with pytest.raises(SystemExit):
        bench.parse_args()
    assert error in capsys.readouterr().err.partition("error: ")[2]


def test_goals_are_those_of_the_device_the_model_the_ranks_and_the_full_size():
    options = EngineOptions(
        model_dir=SHAPES / "qwen3-0.6b", load_format="dummy", device="cuda", dtype="auto", max_model_len=4096
    )
    setting = Setting(options=options, config=read_config(options.model_dir), temperature=0.6, seed=0, repeat=2)
    of_8b = replace(options, model_dir=SHAPES / "qwen3-8b")
    large = replace(setting, options=of_8b, config=read_config(of_8b.model_dir))

    def on_ranks(setting: Setting, size: int) -> Setting:
        return replace(setting, options=replace(setting.options, tensor_parallel_size=size))

    h100, h200 = {"gpu": "NVIDIA H100 80GB HBM3"}, {"gpu": "NVIDIA H200"}
    assert goals_for(setting, h100) is GOALS["H100", "qwen3-0.6b", 1]
    assert goals_for(setting, h200) is GOALS["H200", "qwen3-0.6b", 1]
    assert goals_for(on_ranks(large, 4), h200) is GOALS["H200", "qwen3-8b", 4]
    assert goals_for(setting, {"gpu": "NVIDIA GH200 480GB"}) == goals_for(setting, {"cpu": "AMD EPYC"}) == {}
    assert goals_for(replace(setting, shrink=2), h200) == goals_for(large, h100) == {}
    assert goals_for(on_ranks(setting, 2), h200) == goals_for(on_ranks(large, 2), h200) == {}
    assert all(goals.keys() <= ROWS.keys() and (SHAPES / shape).is_dir() for (_, shape, _), goals in GOALS.items())


def test_rows_are_judged_by_floor_and_target():
    goals = {"headline": (100, 200), "start_up": (20, 10), "scaling": (100, None)}

    def reached(**measured: float) -> list[str | None]:
        return [row["reached"] for row in judge(measured, goals)]

    assert reached(headline=99.9) == reached(start_up=20.1) == reached(scaling=99.9) == ["nothing"]
    assert (
        reached(headline=100.0)
        == reached(headline=199.0)
        == reached(start_up=20.0)
        == reached(scaling=1e3)
        == ["floor"]
    )
    assert reached(headline=200.0) == reached(start_up=10.0) == ["target"]
    assert reached(streams_1=1.0) == [None]
    assert reached(start_up=30.0, headline=150.0) == ["floor", "nothing"]  # in the table's order
    printed = "\n".join(goal_lines(judge({"headline": 99.9, "start_up": 5.0, "streams_1": 7.0}, goals)))
    assert printed.count("NOT MET") == printed.count("target met") == 1 and "<= 20" in printed and ">= 100" in printed


def test_decode_lengths_are_of_those_alive():
    workload = Workload("w", [[0] * 3, [0] * 10, [0] * 5], [4, 2, 9], 0.6)
    assert decode_lengths(workload, 0) == [3, 10, 5]
    assert decode_lengths(workload, 2) == [5, 7]
    assert decode_lengths(workload, 8) == [13]


def test_peak_blocks_equal_those_counted_by_hand():
    # Blocks of 4. The first holds 1, 1, 2, 2, 2, 2 of them as it grows from 3 to 8 tokens; the second begins with 3,
    # for 10 tokens, and gets a fourth for its 13th, at step 3.
    assert peak_blocks(Workload("w", [[0] * 3, [0] * 10], [6, 2], 0.6), 4) == 4
    assert peak_blocks(Workload("w", [[0] * 3, [0] * 10], [6, 6], 0.6), 4) == 2 + 4


def test_pool_gives_every_launch_blocks_of_its_own():
    shape = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    pool = Pool(shape, 640, "cpu")
    tables = pool.tables([33, 5, 16], 16, 4)
    used = [block for table in tables for row, n in zip(table.tolist(), (3, 1, 1), strict=True) for block in row[:n]]
    assert len(used) == len(set(used)) == 20 and max(used) < 40
    assert all(cache.shape == (40, 2, 16, 16) and cache.isfinite().all() for cache in pool.caches(16))
    assert shape.token_bytes == 2 * 2 * 16 * 4


def test_plain_kernels_compute_what_the_fused_ones_do_and_write_nothing_for_padding():
    from nanovllm.kernels.attention.contract import AttentionSpec, ChunkBatch, KVCache
    from nanovllm.kernels.attention.qk_norm_rope_store import qk_norm_rope_store_reference
    from nanovllm.kernels.linear.gate_mul import gate_mul_reference
    from nanovllm.layers.rotary_embedding import build_cos_sin

    torch.manual_seed(0)
    tokens, heads, kv_heads, dim, block_size = 5, 4, 2, 16, 16
    gate_up = torch.randn(tokens, 48, dtype=torch.bfloat16)
    torch.testing.assert_close(plain_gate_mul(gate_up), gate_mul_reference(gate_up), rtol=0, atol=0)

    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    weights = torch.rand(2, dim) + 0.5
    positions = torch.tensor([9, 4, 0, 0, 0], dtype=torch.int32)
    slots = torch.tensor([41, 20, -1, -1, -1])
    cos_sin = build_cos_sin(dim, 32, {"rope_type": "default", "rope_theta": 1e4})
    unused = torch.empty(0)
    chunks = ChunkBatch(positions, slots, unused, unused, unused, unused)
    for q_weight, k_weight, rope in ((*weights, cos_sin), (None, None, cos_sin), (*weights, None)):
        caches = [torch.full((3, kv_heads, block_size, dim), float("nan")) for _ in range(4)]
        norms = [None if w is None else SimpleNamespace(weight=w, eps=1e-6) for w in (q_weight, k_weight)]
        table = None if rope is None else SimpleNamespace(cos_sin=rope)
        spec = AttentionSpec(heads, kv_heads, dim, 1.0, table, *norms)
        plain = plain_qk_norm_rope_store(qkv, spec, KVCache(*caches[:2]), chunks)
        arguments = (qkv, q_weight, k_weight, 1e-6, positions, cos_sin[:, :0] if rope is None else rope, slots)
        expected = qk_norm_rope_store_reference(*arguments, *caches[2:], heads)
        torch.testing.assert_close(plain[:2], expected[:2], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(caches[:2], caches[2:], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert caches[0].isfinite().sum() == 2 * kv_heads * dim


def test_plain_sampler_is_greedy_at_zero_follows_the_distribution_else_and_leaves_other_rows_alone():
    torch.manual_seed(0)
    draws = 20_000
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(draws + 2, 3).contiguous()
    rows = torch.arange(draws + 2, dtype=torch.int32)
    rows[-1] = -1
    temperature = torch.ones(draws + 2)
    temperature[0] = 0.0
    seq_lens = torch.full((draws + 2,), 2, dtype=torch.int32)
    token_ids = torch.full((draws + 2, 4), -7, dtype=torch.int32)
    out = torch.full((draws + 2,), -7, dtype=torch.int32)
    plain_sample(logits, rows, seq_lens, SimpleNamespace(temperature=temperature), token_ids, out)
    assert (out[0], out[-1]) == (0, 0) and torch.equal(token_ids[:-1, 2], out[:-1])
    token_ids[:-1, 2] = -7
    assert (token_ids == -7).all()  # nothing else was written
    shares = out[1:-1].bincount(minlength=3) / draws
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), rtol=0, atol=0.015)  # four standard deviations


def test_engine_of_plain_kernels_gives_the_same_greedy_tokens_and_is_not_left_behind():
    from nanovllm.layers import attention, layernorm, linear, packed_format, weight_format
    from nanovllm.worker import model_runner

    options = EngineOptions(
        model_dir=SHAPES / "tiny", load_format="dummy", device="cpu", dtype="float32", max_model_len=256,
        block_size=16, num_blocks=64,
    )  # fmt: skip
    workload = Workload("greedy", [[1, 2, 3], list(range(5, 45)), [9] * 7], [20, 12, 30], temperature=0.0)
    places = [
        (layernorm, "rms_norm"), (linear, "add_rms_norm"), (layernorm, "norm_add_rms_norm"),
        (packed_format, "gate_mul"), (weight_format, "skinny_linear"), (attention, "qk_norm_rope_store"),
        (attention, "paged_decode"), (model_runner, "sample"),
    ]  # fmt: skip

    def tokens() -> list[list[int]]:
        engine = make_engine("nanovllm", options)
        outputs = engine.generate(workload)
        engine.close()
        return outputs

    fused, before = tokens(), [getattr(*place) for place in places]
    with plain_kernels():
        inside = [getattr(*place) for place in places]
        plain = tokens()
    assert plain == fused
    assert all(a is not b for a, b in zip(inside, before, strict=True))
    assert [getattr(*place) for place in places] == before


def test_replacing_what_nobody_uses_is_an_error():
    from nanovllm.kernels.norm import rms_norm

    with pytest.raises(RuntimeError, match="rms_norm_triton is used by no module"):
        with replaced({rms_norm.rms_norm_triton: rms_norm.rms_norm_reference}):
            pass


def test_sampling_cost_measures_every_kind_of_request():
    sizes = ["--model", str(SHAPES / "tiny"), "--batch", "3", "--context", "5", "--steps", "2", "--rounds", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.sampling_cost", *sizes],
        capture_output=True,
        text=True,
        cwd=SHAPES.parents[1],
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert set(report["seconds_per_step"]) == set(CASES) == set(report["percent_more"])
    assert all(len(times) == 2 and min(times) > 0 for times in report["seconds_per_step"].values())
    assert report["percent_more"][PLAIN] == 0
