"""`bench.py --ranks 1,2,4`: how much faster the model runs on several ranks, and what a layer's two all-reduces cost.

For each number of ranks an engine runs the headline and few streams. Its efficiency is the headline's rate per rank,
relative to that of the first number of ranks. Then, on CUDA and after the engine has closed, benchmarks/all_reduce.py
times the all-reduces of the engine's decode steps, with their norms, and the link's bandwidth. After each number of
ranks the mode prints a table of all results so far.
"""

from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks import all_reduce
from benchmarks.ceilings import Ceilings
from benchmarks.engines import make_engine
from benchmarks.machine import describe_machine
from benchmarks.report import result_lines, table_lines
from benchmarks.runs import run_alternating, warm_up
from benchmarks.setting import Setting
from benchmarks.targets import goal_lines, goals_for, judge
from benchmarks.workloads import PRESETS, few_streams
from nanovllm.kernels.norm.all_reduce import one_shot_limit

STREAMS = (1, 8, 32)
ROWS = (*STREAMS, PRESETS["headline"].num_seqs)  # of the messages that decode steps all-reduce
SUMS_PER_LAYER = 2
SUMS_SECONDS = 60  # to measure all-reduces; most of it the processes take to start


def run(setting: Setting, sizes: list[int]) -> dict[str, Any]:
    """Measure every number of ranks. Prints the figures, and returns them for the JSON.

    Raises ValueError at once if there are too few devices.
    """
    if setting.options.device == "cuda" and max(sizes) > torch.cuda.device_count():
        raise ValueError(
            f"--ranks {max(sizes)} must be at most the number of CUDA devices, {torch.cuda.device_count()}"
        )
    ceilings = setting.measure_ceilings()
    runs: list[dict[str, Any]] = []
    for size in sizes:
        options = replace(setting.options, tensor_parallel_size=size)
        own = replace(setting, options=options)
        runs.append({"ranks": size, "sums": None, **run_engine(own, ceilings)})
        measured = {"headline": runs[-1]["headline_tok_s"], "token_1": runs[-1]["stream_ms"][1]}
        runs[-1]["rows"] = judge(measured, goals_for(own, describe_machine(options.device)))
        print(*goal_lines(runs[-1]["rows"]), *rank_lines(runs), sep="\n", flush=True)
        if size > 1 and options.device == "cuda":
            hidden_sizes = (setting.config["hidden_size"],)
            runs[-1]["sums"] = all_reduce.collect(size, SUMS_SECONDS, ROWS, hidden_sizes, with_torch=False)
            print(*sum_lines(runs[-1]["sums"]), sep="\n", flush=True)
    return {"ceilings": asdict(ceilings), "ranks": runs}


def run_engine(setting: Setting, ceilings: Ceilings) -> dict[str, Any]:
    """Run one engine on all workloads. Returns the headline's rate, milliseconds a token by streams, and the runs."""
    headline = setting.draw("headline", PRESETS["headline"])
    streams = [setting.draw(f"{n} stream{'s' * (n > 1)}", few_streams(n), all_seqs=True) for n in STREAMS]
    engine = make_engine("nanovllm", setting.options)
    warm_up(engine, headline, num_tokens=16)
    results = []
    for workload in (*streams, headline):
        results += run_alternating([engine], workload, setting.repeat, setting.bound(workload, ceilings))
        print(*result_lines(results[-1]), sep="\n", flush=True)
    engine.close()
    return {
        "headline_tok_s": results[-1].output_tok_s,
        "stream_ms": {n: result.ms_per_token for n, result in zip(STREAMS, results, strict=False)},
        "plan_bytes_per_step": results[-1].plan_bytes_per_step,
        "results": [asdict(result) for result in results],
    }


def rank_lines(runs: list[dict[str, Any]]) -> list[str]:
    """A table with a line for each number of ranks."""
    base = runs[0]["headline_tok_s"] / runs[0]["ranks"]
    latencies = [f"{n} stream{'s' * (n > 1)}, ms" for n in STREAMS]
    header = ["ranks", "headline tok/s", "efficiency", *latencies, "bytes to a rank a step"]
    cells = [
        [
            str(run["ranks"]),
            f"{run['headline_tok_s']:,.1f}",
            f"{100 * run['headline_tok_s'] / run['ranks'] / base:.1f} %",
            *(f"{run['stream_ms'][n]:.3f}" for n in STREAMS),
            f"{run['plan_bytes_per_step']:,.0f}",
        ]
        for run in runs
    ]
    return table_lines(header, cells)


def sum_lines(sums: dict[str, Any]) -> list[str]:
    """A table: microseconds that a layer's all-reduces take with their norms, and that their bytes take on the link."""
    rate = all_reduce.link_rate(sums)
    cells = []
    for entry in sums["times"]:
        num_bytes = all_reduce.message_bytes(entry["rows"], entry["hidden"])
        is_small = num_bytes <= one_shot_limit(sums["ranks"])
        if entry["method"] == ("ours, fused + norm" if is_small else "NCCL + norm"):  # the method that the model uses
            floor = f"{1e6 * SUMS_PER_LAYER * num_bytes / rate:.2f}" if rate else "-"
            took = f"{SUMS_PER_LAYER * entry['microseconds']:.2f}"
            cells.append([f"{entry['rows']} x {entry['hidden']}", f"{num_bytes:,}", took, floor])
    if not cells:
        return [f"no all-reduce was measured: {'; '.join(sums['errors'])}"]
    return table_lines(["sum", "bytes", f"us a layer ({SUMS_PER_LAYER} sums)", "bytes / link"], cells)
