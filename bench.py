"""Benchmark nano-vLLM, vLLM or transformers on equal requests, and compare the speed with the hardware's limit.

    python bench.py                                       the headline workload: 256 requests, 133,966 output tokens
    python bench.py --streams 1,8,32                      latency of few streams, 128 tokens in and 512 out
    python bench.py --shape gemma-3-4b --workload headline --streams 1,8,32    both, of another model's shape
    python bench.py --workload cpu-a --compare transformers    two engines, whose runs alternate
    python bench.py --model DIR --engine vllm             a real checkpoint, another engine
    python bench.py --shape qwen3-8b --tensor-parallel-size 2    two devices, against the roofline of both

Without `--model` the benchmark makes a model of `--shape` with random weights: speed does not depend on their values.
It prints every run; the best run against the roofline (benchmarks/roofline.py), whose ceilings it measures in the same
process; and where the time of one more, instrumented run went (benchmarks/step_timing.py). The last line has all of it
as JSON. Four more modes print a table before that line:

    python bench.py --all                                 every goal of benchmarks/targets.py, measured and judged
    python bench.py --scaling                             more requests, more rows, and a quarter of the cache they need
    python bench.py --ranks 1,2 --shape qwen3-8b          what several devices gain, and what all-reduces cost
    python bench.py --ablate [--chart FILE.png]           the headline with one optimization off at a time
    python bench.py --ablate --from-json FILE --chart FILE.png     the chart of an earlier run's output

These modes have their own workloads. `--shrink N` makes them N times smaller, to try a mode out.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from benchmarks import ablation, all_rows, ranks, scaling
from benchmarks.engines import ENGINES, EngineOptions, make_engine
from benchmarks.experts_hit import count_experts_hit
from benchmarks.machine import describe_machine, describe_versions, seconds_since_process_start
from benchmarks.model_shape import read_config
from benchmarks.report import comparison_line, result_lines, split_lines, startup_line
from benchmarks.runs import compare, measure_split, run_alternating, warm_up
from benchmarks.setting import SHAPES, Setting
from benchmarks.workloads import PRESETS, LengthMix, few_streams
from nanovllm.worker.resolve import resolve_device

MODES: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "all": all_rows.run,
    "scaling": scaling.run,
    "ablate": ablation.run,
}


def main() -> None:
    args = parse_args()
    if args.from_json:
        report = ablation.read_report(args.from_json)
        print(*ablation.ablation_lines(report["ablation"]), sep="\n")
    else:
        setting = make_setting(args)
        if args.ranks:
            report = ranks.run(setting, args.ranks)
        else:
            report = MODES[args.mode](setting) if args.mode else measure(setting, args)
        report = describe(setting) | report
        print(json.dumps(report))
    if args.chart:
        ablation.draw_chart(report, args.chart)


def describe(setting: Setting) -> dict[str, Any]:
    """The options, the machine and the versions, for the JSON."""
    options = setting.options
    return {
        "benchmark": "nano-vllm",
        "model": options.model_dir.name,
        "options": {**asdict(options), "model_dir": str(options.model_dir)},
        "temperature": setting.temperature,
        "seed": setting.seed,
        "shrink": setting.shrink,
        "machine": describe_machine(options.device),
        "versions": describe_versions(),
    }


def measure(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Time, compare and split up every workload. Prints the figures, and returns them for the JSON."""
    workloads = [setting.draw(name, mix) for name, mix in workload_mixes(args).items()]
    engines = [make_engine(args.engine, setting.options)]
    startup = {"engine_ready_s": seconds_since_process_start()}
    warm_up(engines[0], workloads[0], num_tokens=1)
    startup["first_token_s"] = seconds_since_process_start()
    print(startup_line(startup), flush=True)
    if args.compare:
        engines.append(make_engine(args.compare, setting.options))
    ceilings = setting.measure_ceilings()
    for engine in engines:
        warm_up(engine, workloads[0], num_tokens=16)
    if engines[0].name == "nanovllm" and setting.options.tensor_parallel_size == 1:
        experts_hit = count_experts_hit(engines[0], setting.config["vocab_size"], setting.temperature)
        setting = replace(setting, experts_hit=experts_hit)
        if experts_hit:
            print("experts hit in a layer: " + ", ".join(f"{hit:.1f} by {n}" for n, hit in experts_hit), flush=True)
    results, comparisons, splits = [], [], []
    for workload in workloads:
        for result in run_alternating(engines, workload, setting.repeat, setting.bound(workload, ceilings)):
            print(*result_lines(result), sep="\n", flush=True)
            results.append(result)
        if args.compare:
            comparisons.append(compare(*results[-2:]))
            print(comparison_line(comparisons[-1]), flush=True)
        if engines[0].name == "nanovllm" and not args.no_split:
            splits.append(measure_split(engines[0], workload))
            print(*split_lines(splits[-1]), sep="\n", flush=True)
    for engine in engines:
        engine.close()
    return {
        "startup": startup,
        "ceilings": asdict(ceilings),
        "experts_hit": setting.experts_hit,
        "results": [asdict(result) for result in results],
        "comparisons": comparisons,
        "splits": splits,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", type=Path, help="a checkpoint's directory")
    add("--shape", choices=sorted(p.name for p in SHAPES.iterdir()), help="random weights of this shape (qwen3-0.6b)")
    add("--load-format", choices=["auto", "dummy"], help="dummy: random weights, the default for --shape")
    add("--engine", choices=ENGINES, default="nanovllm")
    add("--compare", choices=ENGINES, help="a second engine, loaded beside the first; their runs alternate")
    modes = parser.add_mutually_exclusive_group()
    for mode in MODES:
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help="see above")
    modes.add_argument("--ranks", type=numbers, metavar="N,N", help="numbers of ranks, as in 1,2,4; see above")
    add("--shrink", type=int, default=1, help="in these modes: divide every number of requests and tokens by this")
    add("--chart", type=Path, help="with --ablate: draw this PNG, with matplotlib")
    add("--from-json", type=Path, help="with --ablate: read an earlier run's output, measure nothing")
    workload = parser.add_argument_group("workload, unless a mode has its own")
    own = [workload.add_argument("--workload", choices=sorted(PRESETS), help="default: headline")]
    own.append(workload.add_argument("--streams", type=numbers, help="latency mode: numbers of streams, as in 1,8,32"))
    for name in (f.name for f in fields(LengthMix) if f.type is int):
        option = "--" + name.replace("_", "-")
        own.append(workload.add_argument(option, type=int, help="replaces the workload's own value"))
    add("--temperature", type=float, default=0.6)
    add("--seed", type=int, default=0, help="for the workload's lengths and ids")
    add("--repeat", type=int, default=2, help="timed runs; the best counts")
    add("--no-split", action="store_true", help="skip the instrumented run")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    add("--max-model-len", type=int, default=4096)
    add("--enforce-eager", action="store_true")
    add("--no-prefix-caching", action="store_true")
    add("--block-size", type=int)
    add("--num-blocks", type=int, help="blocks of the KV cache")
    add("--max-num-seqs", type=int)
    add("--max-num-batched-tokens", type=int)
    add("--gpu-memory-utilization", type=float, default=0.9, help="for each engine")
    add("--tensor-parallel-size", type=int, default=1, help="number of ranks that share the model, one device each")
    add("--enable-expert-parallel", action="store_true", help="the ranks share experts, whole ones")
    args = parser.parse_args()
    if args.model and args.shape:
        parser.error("--model has its own shape: give --model or --shape, not both")
    if args.repeat < 1:
        parser.error(f"--repeat {args.repeat} must be at least 1")
    mode = "ranks" if args.ranks else args.mode
    if mode:
        given = [a.option_strings[0] for a in own if getattr(args, a.dest) is not None]
        given += ["--compare"] * bool(args.compare) + ["--engine"] * (args.engine != "nanovllm")
        if given:
            parser.error(f"--{mode} has workloads and an engine of its own: it takes no {', '.join(given)}")
    elif args.shrink != 1:
        parser.error("--shrink is for --all, --scaling, --ranks and --ablate")
    if not 1 <= args.shrink <= 64:
        parser.error(f"--shrink {args.shrink} must be in [1, 64]")
    if (args.chart or args.from_json) and args.mode != "ablate":
        parser.error("--chart and --from-json are for --ablate")
    if args.mode == "ablate" and args.tensor_parallel_size > 1:
        parser.error("--ablate changes the code of one process, so it takes no --tensor-parallel-size")
    if args.ranks and args.tensor_parallel_size > 1:
        parser.error("--ranks says how many ranks there are, so it takes no --tensor-parallel-size")
    if args.chart:
        try:
            ablation.check_chart(args.chart)
        except (ImportError, ValueError) as error:
            parser.error(f"--chart: {error}")
    args.load_format = args.load_format or ("auto" if args.model else "dummy")
    args.model = args.model or SHAPES / (args.shape or "qwen3-0.6b")
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model} is not a directory with a config.json")
    return args


def numbers(text: str) -> list[int]:
    """Positive numbers separated by commas."""
    found = [int(number) for number in text.split(",")]
    if min(found) < 1:
        raise ValueError(f"{text!r}: every number must be at least 1")
    return found


def workload_mixes(args: argparse.Namespace) -> dict[str, LengthMix]:
    """The chosen preset, and one mix for each number of streams; length options replace their own."""
    mixes = {}
    if args.workload or not args.streams:
        name = args.workload or "headline"
        mixes[name] = PRESETS[name]
    for n in args.streams or []:
        mixes[f"{n} stream{'s' * (n > 1)}"] = few_streams(n)
    given = {f.name: getattr(args, f.name, None) for f in fields(LengthMix)}
    given = {name: value for name, value in given.items() if value is not None}
    return {name: replace(mix, **given) for name, mix in mixes.items()}


def make_setting(args: argparse.Namespace) -> Setting:
    """The command line's options as the benchmark's own types."""
    config = read_config(args.model)
    options = EngineOptions(
        model_dir=args.model,
        load_format=args.load_format,
        device=resolve_device(args.device),
        dtype=args.dtype,
        max_model_len=min(args.max_model_len, config.get("max_position_embeddings", args.max_model_len)),
        enforce_eager=args.enforce_eager,
        enable_expert_parallel=args.enable_expert_parallel,
        enable_prefix_caching=not args.no_prefix_caching,
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        gpu_memory_utilization=args.gpu_memory_utilization,
        tensor_parallel_size=args.tensor_parallel_size,
    )
    return Setting(
        options=options,
        config=config,
        temperature=args.temperature,
        seed=args.seed,
        repeat=args.repeat,
        shrink=args.shrink,
    )


if __name__ == "__main__":
    main()
