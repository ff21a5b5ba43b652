"""Benchmark nano-vLLM, vLLM or transformers on equal requests, and say how near the hardware's limit the run came.

    python bench.py                                       the headline workload: 256 requests, 133,966 output tokens
    python bench.py --streams 1,8,32                      latency of few streams, 128 tokens in and 512 out
    python bench.py --workload cpu-a --compare transformers    both engines, run by run in turn
    python bench.py --model DIR --engine vllm             a real checkpoint, another engine

Without `--model` the weights are random, of the shape of `--shape`: speed does not depend on their values. Printed
are the runs, the best of them against the roofline (see benchmarks/roofline.py) at ceilings measured in the same
process, where the time of a separate, instrumented run went (benchmarks/step_timing.py), and all of it as one line of
JSON, the last.
"""

import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import measure_ceilings
from benchmarks.engines import ENGINES, BenchmarkedEngine, EngineOptions, make_engine
from benchmarks.machine import describe_machine, describe_versions, seconds_since_process_start
from benchmarks.report import ceilings_line, comparison_line, result_lines, split_lines, startup_line
from benchmarks.roofline import model_shape, read_config, roofline
from benchmarks.runs import compare, measure_split, run_alternating, warm_up
from benchmarks.workloads import PRESETS, LengthMix, Workload, draw, few_streams

SHAPES = Path(__file__).parent / "benchmarks" / "shapes"


def main() -> None:
    args = parse_args()
    config = read_config(args.model)
    workloads = make_workloads(args, config["vocab_size"])
    options = engine_options(args, config, workloads)

    engines = [make_engine(args.engine, options)]
    startup = {"engine_ready_s": seconds_since_process_start()}
    warm_up(engines[0], workloads[0], num_tokens=1)
    startup["first_token_s"] = seconds_since_process_start()
    print(startup_line(startup), flush=True)
    if args.compare:
        engines.append(make_engine(args.compare, options))

    report: dict[str, Any] = {
        "benchmark": "nano-vllm",
        "model": args.model.name,
        "options": {**asdict(options), "model_dir": str(options.model_dir)},
        "temperature": args.temperature,
        "seed": args.seed,
        "startup": startup,
        "machine": describe_machine(options.device),
        "versions": describe_versions(),
    }
    report |= measure(args, config, options, engines, workloads)
    for engine in engines:
        engine.close()
    print(json.dumps(report))


def measure(
    args: argparse.Namespace,
    config: dict,
    options: EngineOptions,
    engines: list[BenchmarkedEngine],
    workloads: list[Workload],
) -> dict[str, Any]:
    """The ceilings, then every workload's timed runs, comparison and split: printed, and returned for the JSON."""
    dtype = resolve_dtype(options.dtype, config)
    ceilings = measure_ceilings(options.device, getattr(torch, dtype))
    print(ceilings_line(ceilings, dtype), flush=True)
    shape = model_shape(config, getattr(torch, dtype).itemsize)
    for engine in engines:
        warm_up(engine, workloads[0], num_tokens=16)
    results, comparisons, splits = [], [], []
    for workload in workloads:
        bound = roofline(shape, workload.input_lens, workload.max_tokens, ceilings, options.max_num_seqs)
        for result in run_alternating(engines, workload, args.repeat):
            result.roofline = asdict(bound)
            result.percent_of_roofline = 100 * bound.total_s / result.best_s
            print(*result_lines(result), sep="\n", flush=True)
            results.append(result)
        if args.compare:
            comparisons.append(compare(*results[-2:]))
            print(comparison_line(comparisons[-1]), flush=True)
        if engines[0].name == "nanovllm" and not args.no_split:
            splits.append(measure_split(engines[0], workload))
            print(*split_lines(splits[-1]), sep="\n", flush=True)
    return {
        "ceilings": asdict(ceilings),
        "results": [asdict(result) for result in results],
        "comparisons": comparisons,
        "splits": splits,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", type=Path, help="directory of a checkpoint")
    add("--shape", choices=sorted(p.name for p in SHAPES.iterdir()), help="random weights of this shape (qwen3-0.6b)")
    add("--load-format", choices=["auto", "dummy"], help="dummy: random weights; default for --shape")
    add("--engine", choices=ENGINES, default="nanovllm")
    add(
        "--compare", choices=ENGINES, help="a second engine, loaded beside the first, its runs in turn with the first's"
    )
    add("--workload", choices=sorted(PRESETS), default="headline")
    add("--streams", help="latency mode: numbers of streams, as in 1,8,32")
    for name in (f.name for f in fields(LengthMix) if f.type is int):
        add("--" + name.replace("_", "-"), type=int, help="in place of the workload's own")
    add("--temperature", type=float, default=0.6)
    add("--seed", type=int, default=0, help="of the workload's lengths and ids")
    add("--repeat", type=int, default=2, help="timed runs; the best counts")
    add("--no-split", action="store_true", help="leave out the instrumented run")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    add("--max-model-len", type=int, default=4096)
    add("--enforce-eager", action="store_true")
    add("--no-prefix-caching", action="store_true")
    add("--block-size", type=int)
    add("--num-blocks", type=int, help="blocks of the KV cache")
    add("--max-num-seqs", type=int)
    add("--max-num-batched-tokens", type=int)
    add("--gpu-memory-utilization", type=float, default=0.9, help="of each engine")
    args = parser.parse_args()
    if args.model and args.shape:
        parser.error("--model has a shape of its own: give one of --model and --shape")
    if args.repeat < 1:
        parser.error(f"--repeat {args.repeat} must be at least 1")
    args.load_format = args.load_format or ("auto" if args.model else "dummy")
    args.model = args.model or SHAPES / (args.shape or "qwen3-0.6b")
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model} is not a directory with a config.json")
    return args


def make_workloads(args: argparse.Namespace, vocab_size: int) -> list[Workload]:
    """The chosen preset with the lengths given in place of its own, or one workload for each number of streams."""
    if args.streams:
        counts = [int(n) for n in args.streams.split(",")]
        mixes = {f"{n} stream{'s' * (n > 1)}": few_streams(n) for n in counts}
    else:
        mixes = {args.workload: PRESETS[args.workload]}
    given = {f.name: getattr(args, f.name, None) for f in fields(LengthMix)}
    given = {name: value for name, value in given.items() if value is not None}
    return [draw(name, replace(mix, **given), vocab_size, args.temperature, args.seed) for name, mix in mixes.items()]


def engine_options(args: argparse.Namespace, config: dict, workloads: list[Workload]) -> EngineOptions:
    """Raises ValueError if a request is longer than the model or `--max-model-len` allows."""
    max_model_len = min(args.max_model_len, config.get("max_position_embeddings", args.max_model_len))
    longest = max(len(p) + n for w in workloads for p, n in zip(w.prompts, w.max_tokens, strict=True))
    if longest > max_model_len:
        raise ValueError(
            f"the workload's longest request has {longest} tokens, more than max_model_len={max_model_len}"
        )
    return EngineOptions(
        model_dir=args.model,
        load_format=args.load_format,
        device=resolve_device(args.device),
        dtype=args.dtype,
        max_model_len=max_model_len,
        enforce_eager=args.enforce_eager,
        enable_prefix_caching=not args.no_prefix_caching,
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )


def resolve_device(device: str) -> str:
    """ "auto" is CUDA where there is one."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, config: dict) -> str:
    """ "auto" is what the config.json says, in either spelling, or float32."""
    return dtype if dtype != "auto" else config.get("dtype") or config.get("torch_dtype") or "float32"


if __name__ == "__main__":
    main()
