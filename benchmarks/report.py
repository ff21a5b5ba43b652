"""Formats a benchmark's figures as lines of text; programs read the same figures in the JSON line."""

from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.runs import Result


def startup_line(startup: dict[str, float]) -> str:
    ready_s, first_token_s = startup["engine_ready_s"], startup["first_token_s"]
    return f"start-up: engine ready after {ready_s:.1f} s of process time, first token after {first_token_s:.1f} s"


def ceilings_line(ceilings: Ceilings, dtype: str) -> str:
    return (
        f"ceilings: read {ceilings.read_bytes_per_s / 1e9:,.1f} GB/s, "
        f"copy {ceilings.copy_bytes_per_s / 1e9:,.1f} GB/s (read + write), "
        f"{dtype} matmul {ceilings.matmul_flops_per_s / 1e12:,.2f} TFLOP/s"
    )


def result_lines(result: Result) -> list[str]:
    bound = result.roofline
    runs = ", ".join(f"{seconds:.3f} s ({result.output_tokens / seconds:,.1f} tok/s)" for seconds in result.runs_s)
    lines = [
        f"{result.workload}, {result.engine}: {result.num_seqs:,} requests, "
        f"{result.input_tokens:,} input and {result.output_tokens:,} output tokens",
        f"  runs      {runs}",
        f"  best      {result.output_tok_s:,.1f} output tok/s in {result.best_s:.3f} s, "
        f"{result.ms_per_token:.3f} ms per token of the longest request",
        f"  roofline  {result.percent_of_roofline:.1f} % of {result.output_tokens / bound['total_s']:,.1f} tok/s "
        f"({bound['total_s']:.3f} s: prefill {bound['prefill_s']:.3f}, decode {bound['decode_s']:.3f}; "
        f"reading weights {bound['weight_read_s']:.3f}, KV {bound['kv_read_s']:.3f})",
    ]
    if result.plan_bytes_per_step:
        lines.append(f"  ranks     rank 0 sends {result.plan_bytes_per_step:,.0f} bytes a step to each other")
    return lines


def comparison_line(comparison: dict[str, Any]) -> str:
    ours, theirs = comparison["engines"]
    by_run = ", ".join(f"{ratio:.2f}" for ratio in comparison["ratio_by_run"])
    return f"{comparison['workload']}: {ours} is {comparison['ratio']:.2f}x as fast as {theirs} (run by run: {by_run})"


def split_lines(split: dict[str, Any]) -> list[str]:
    """An instrumented run's time by kind of step, and the host's share of it."""
    names = {"decode": "decode", "prefill": "with prefill"}
    lines = [f"{split['workload']}, instrumented run: {split['wall_s']:.3f} s"]
    for kind, name in names.items():
        sums = split[kind]
        lines.append(
            f"  {name:<13} {sums['num_steps']:,} steps of {sums['ms_per_step']:.3f} ms, {sums['num_tokens']:,} tokens: "
            f"{sums['busy_s']:.3f} s busy, {sums['idle_s']:.3f} s idle before them"
        )
    lines.append(
        f"  host          {split['host_hidden_s']:.3f} s hidden behind the device, "
        f"{split['host_not_hidden_s']:.3f} s not ({split['host_us_per_scheduled_sequence']:.1f} µs per sequence and "
        f"step); device idle {100 * split['device_idle_share']:.2f} %"
    )
    return lines


def table_lines(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table whose first column is flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
