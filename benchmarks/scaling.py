"""`bench.py --scaling`: the headline's mix with more requests, with more rows, and with a cache that is far too small.

Neither more requests nor more rows must lower the tokens per second. The small cache has a quarter of the blocks that
the requests need at their peak, so that sequences wait and the scheduler preempts others; its rate shows what that
costs. Every run is instrumented, so that its rate and its host time come from the same run. The two events a step cost
microseconds; a step takes milliseconds.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.ceilings import Ceilings
from benchmarks.engines import make_engine
from benchmarks.machine import describe_machine
from benchmarks.report import table_lines
from benchmarks.runs import measure_split
from benchmarks.setting import Setting
from benchmarks.targets import goal_lines, goals_for, judge
from benchmarks.workloads import PRESETS, Workload

HEADLINE = PRESETS["headline"]
BASE_ROWS = 256  # the headline's number of requests; all rates are compared with the rate in so many rows
# max_num_seqs -> numbers of requests. 4,096 of them take a minute and a half on an H100, so not all combinations.
RUNS = {BASE_ROWS: (256, 1024, 4096), 512: (1024,), 1024: (1024, 4096)}
CACHE_SHARE = 4  # the small cache has one block in so many of the peak


@dataclass(slots=True)
class ScalingRun:
    """The best run of one workload on one engine."""

    num_requests: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    output_tokens: int
    seconds: float
    output_tok_s: float
    percent_of_roofline: float
    host_us_per_scheduled_sequence: float
    device_idle_share: float
    num_preemptions: int


def run(setting: Setting) -> dict[str, Any]:
    """Measure every configuration. Prints the figures, and returns them for the JSON."""
    ceilings = setting.measure_ceilings()
    runs: list[ScalingRun] = []
    for max_num_seqs, counts in RUNS.items():
        runs += measure(setting, max_num_seqs, counts, ceilings)
    base = runs[0]
    workload = setting.draw("headline", HEADLINE)
    need = peak_blocks(workload, base.block_size)
    longest = max(map(sum, zip(workload.input_lens, workload.max_tokens, strict=True)))
    num_blocks = max(need // CACHE_SHARE, -(-longest // base.block_size))
    cache = {
        "num_blocks": num_blocks,
        "max_model_len": min(setting.options.max_model_len, num_blocks * base.block_size),
    }
    print(f"small cache: {num_blocks:,} of the {need:,} blocks that {base.num_requests:,} requests hold at their peak")
    small = measure(setting, BASE_ROWS, (HEADLINE.num_seqs,), ceilings, **cache)[0]

    measured = {
        "scaling": 100 * min(other.output_tok_s for other in runs[1:]) / base.output_tok_s,
        "small_cache": 100 * small.output_tok_s / base.output_tok_s,
    }
    rows = judge(measured, goals_for(setting, describe_machine(setting.options.device)))
    print(*run_lines([*runs, small]), *goal_lines(rows), sep="\n")
    return {
        "ceilings": asdict(ceilings),
        "scaling": [asdict(run) for run in runs],
        "small_cache": {**asdict(small), "blocks_needed": need},
        "rows": rows,
    }


def measure(
    setting: Setting, max_num_seqs: int, counts: tuple[int, ...], ceilings: Ceilings, **options: int
) -> list[ScalingRun]:
    """Run an engine with `max_num_seqs` rows and these options on each number of requests in `counts`.

    The headline itself runs `repeat` times and its best run counts, since all others are compared with it. The larger
    workloads, which together take minutes, run once.
    """
    rows = max(1, max_num_seqs // setting.shrink)
    engine = make_engine("nanovllm", replace(setting.options, max_num_seqs=rows, **options))
    # Compiles the kernels that prompts need; capturing the decode steps' graphs has compiled only the others.
    engine.generate(setting.draw("warm-up", replace(HEADLINE, min_output=2, max_output=32)))
    runner = engine.llm.engine.runner
    runs = []
    for count in counts:
        workload = setting.draw("requests", replace(HEADLINE, num_seqs=count))
        repeat = setting.repeat if count == HEADLINE.num_seqs else 1
        split = min((measure_split(engine, workload) for _ in range(repeat)), key=lambda split: split["wall_s"])
        runs.append(
            ScalingRun(
                num_requests=len(workload.prompts),
                max_num_seqs=rows,
                num_blocks=runner.num_blocks,
                block_size=runner.block_size,
                output_tokens=workload.num_output_tokens,
                seconds=split["wall_s"],
                output_tok_s=workload.num_output_tokens / split["wall_s"],
                percent_of_roofline=100 * setting.bound(workload, ceilings, rows).total_s / split["wall_s"],
                host_us_per_scheduled_sequence=split["host_us_per_scheduled_sequence"],
                device_idle_share=split["device_idle_share"],
                num_preemptions=split["num_preemptions"],
            )
        )
        print(f"{len(workload.prompts):,} requests in {rows:,} rows: {runs[-1].output_tok_s:,.1f} tok/s", flush=True)
    del runner
    engine.close()
    return runs


def peak_blocks(workload: Workload, block_size: int) -> int:
    """The most blocks that the requests hold at once if all of them run from the first step on."""
    inputs, outputs = np.array(workload.input_lens), np.array(workload.max_tokens)
    held = -(-(inputs + np.arange(max(outputs))[:, None]) // block_size)  # [steps, requests]
    return int((held * (outputs > np.arange(max(outputs))[:, None])).sum(axis=1).max())


def run_lines(runs: list[ScalingRun]) -> list[str]:
    header = ["requests", "max_num_seqs", "blocks", "tok/s", "of the roofline", "host us/seq", "idle", "preempted"]
    cells = [
        [
            f"{run.num_requests:,}",
            f"{run.max_num_seqs:,}",
            f"{run.num_blocks:,}",
            f"{run.output_tok_s:,.1f}",
            f"{run.percent_of_roofline:.1f} %",
            f"{run.host_us_per_scheduled_sequence:.2f}",
            f"{100 * run.device_idle_share:.2f} %",
            f"{run.num_preemptions:,}",
        ]
        for run in runs
    ]
    return table_lines(header, cells)
