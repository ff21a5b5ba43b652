"""`bench.py --all`: measures every row of the table of goals (benchmarks/targets.py) in one process.

One engine serves all rows that need an engine. After it has closed, the mode times the attention kernels alone, on a
cache of the same layout and with the launch parameters that the engine uses.
"""

from dataclasses import asdict
from typing import Any

from benchmarks.attention_timing import (
    AttentionShape,
    Pool,
    decode_lengths,
    prefill_flops,
    time_decode,
    time_prefill,
)
from benchmarks.ceilings import Ceilings
from benchmarks.engines import make_engine
from benchmarks.machine import describe_machine, seconds_since_process_start
from benchmarks.model_shape import attention_heads
from benchmarks.report import result_lines, split_lines, startup_line
from benchmarks.runs import measure_split, run_alternating, warm_up
from benchmarks.setting import Setting
from benchmarks.targets import goal_lines, goals_for, judge
from benchmarks.workloads import PRESETS, LengthMix, few_streams, shrunk

STREAMS = (1, 8, 32)
STEPS = (0, 300, 600, 900)  # the headline's steps at which the mode times the decode kernel
PREFILL = LengthMix(num_seqs=64, min_input=2048, max_input=2048, min_output=1, max_output=1)
LONG_CONTEXT = [32_768] * 8


def run(setting: Setting) -> dict[str, Any]:
    """Measure every row. Prints the figures, and returns the rows with the measurements behind them for the JSON."""
    report, block_size = run_engine(setting)
    kernels = time_kernels(setting, block_size)
    measured = report.pop("measured") | kernel_rows(kernels, Ceilings(**report["ceilings"]))
    rows = judge(measured, goals_for(setting, describe_machine(setting.options.device)))
    print(*goal_lines(rows), sep="\n")
    return {**report, "kernels": kernels, "rows": rows}


def run_engine(setting: Setting) -> tuple[dict[str, Any], int]:
    """Measure the rows that need an engine: start-up, streams, the headline and its split, prompts without outputs.

    Returns the report and the engine's block size.
    """
    headline = setting.draw("headline", PRESETS["headline"])
    engine = make_engine("nanovllm", setting.options)
    startup = {"engine_ready_s": seconds_since_process_start()}
    warm_up(engine, headline, num_tokens=1)
    startup["first_token_s"] = seconds_since_process_start()
    print(startup_line(startup), flush=True)
    ceilings = setting.measure_ceilings()
    warm_up(engine, headline, num_tokens=16)

    streams = [setting.draw(f"{n} stream{'s' * (n > 1)}", few_streams(n), all_seqs=True) for n in STREAMS]
    prefill = setting.draw("prefill", PREFILL)
    results = {}
    for workload in (*streams, headline, prefill):
        bound = setting.bound(workload, ceilings)
        results[workload.name] = run_alternating([engine], workload, setting.repeat, bound)[0]
        print(*result_lines(results[workload.name]), sep="\n", flush=True)
    split = measure_split(engine, headline)
    print(*split_lines(split), sep="\n", flush=True)
    block_size = engine.llm.engine.runner.block_size
    engine.close()

    measured = {
        "headline": results["headline"].output_tok_s,
        "headline_roofline": results["headline"].percent_of_roofline,
        "host_not_hidden": 100 * split["full_batch"]["idle_share"],
        "device_idle": 100 * split["device_idle_share"],
        **{f"streams_{n}": results[w.name].output_tok_s for n, w in zip(STREAMS, streams, strict=True)},
        "token_1": results[streams[0].name].ms_per_token,
        "prefill_model": results[prefill.name].percent_of_roofline,  # no outputs: prefill's FLOPs at matmul rate
        "start_up": startup["first_token_s"],
    }
    report = {
        "startup": startup,
        "ceilings": asdict(ceilings),
        "results": [asdict(result) for result in results.values()],
        "splits": [split],
        "measured": measured,
    }
    return report, block_size


def time_kernels(setting: Setting, block_size: int) -> dict[str, dict[str, float]]:
    """For each row: a launch's sequences and seconds, and the bytes it must read or the FLOPs it must compute."""
    heads, kv_heads, head_dim = attention_heads(setting.config)
    num_ranks = setting.options.tensor_parallel_size
    shape = AttentionShape(heads // num_ranks, max(1, kv_heads // num_ranks), head_dim, setting.dtype)  # a rank's
    shrink, device = setting.shrink, setting.options.device
    mix = setting.draw("headline", PRESETS["headline"], all_seqs=True)
    contexts = {f"decode_{step}": decode_lengths(mix, step // shrink) for step in STEPS}
    contexts["long_context"] = [length // shrink for length in LONG_CONTEXT]
    prompts = shrunk(PREFILL, shrink)
    sizes = [Pool.tokens_for(shape, lengths, block_size, device) for lengths in contexts.values()]
    pool = Pool(shape, max(*sizes, prompts.num_seqs * (prompts.max_input + block_size)), device)

    kernels = {}
    for row, lengths in contexts.items():
        num_bytes = sum(lengths) * shape.token_bytes
        kernels[row] = {"seqs": len(lengths), "bytes": num_bytes, "seconds": time_decode(pool, lengths, block_size)}
    size = (prompts.num_seqs, prompts.max_input)
    flops, seconds = prefill_flops(shape.num_heads, shape.head_dim, *size), time_prefill(pool, *size, block_size)
    kernels["prefill_attention"] = {"seqs": prompts.num_seqs, "flops": flops, "seconds": seconds}
    return kernels


def kernel_rows(kernels: dict[str, dict[str, float]], ceilings: Ceilings) -> dict[str, float]:
    """The kernels' rows, in the units of the table."""
    rates = {row: kernel.get("bytes", kernel.get("flops")) / kernel["seconds"] for row, kernel in kernels.items()}
    return {
        **{f"decode_{step}": rates[f"decode_{step}"] / 1e12 for step in STEPS},
        "long_context": 100 * rates["long_context"] / ceilings.read_bytes_per_s,
        "prefill_attention": 100 * rates["prefill_attention"] / ceilings.matmul_flops_per_s,
    }
