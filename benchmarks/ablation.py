"""`bench.py --ablate`: what each optimization gains: the headline and one stream with one of them off at a time.

Each variant has its own engine. To switch an optimization off, it uses the engine's option if there is one; otherwise
it replaces the engine's code while it measures, since the engine has no switches for benchmarks alone. The headline's
prompts share no prefix, so on the headline the prefix cache shows only its cost.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engines import make_engine
from benchmarks.plain_kernels import plain_kernels, replaced
from benchmarks.report import table_lines
from benchmarks.runs import run_alternating, warm_up
from benchmarks.setting import Setting
from benchmarks.workloads import PRESETS, few_streams


@dataclass(slots=True, frozen=True)
class Variant:
    """An engine with one optimization off. `run` makes and runs it inside `inside`; `prepare` changes its LLMEngine."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    inside: Callable[[], AbstractContextManager] = nullcontext
    prepare: Callable[[Any], object] = lambda engine: None
    module: str = "nanovllm"  # has the optimization; without this module, `run` skips the variant


@contextmanager
def constant(module_name: str, name: str, value: int) -> Iterator[None]:
    """Give a module's constant another value while the body runs."""
    module = importlib.import_module(module_name)
    old = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, old)


def wait_for_each_step(engine: Any) -> None:
    """Make the engine read a step's tokens before it plans the next step."""
    engine.max_behind = 0


def late_launch() -> AbstractContextManager:
    """Make each kernel start only after the kernel before it has ended."""
    early_launch = importlib.import_module(EARLY_LAUNCH).early_launch
    return replaced({early_launch: lambda tensor: {"EARLY": False}})


EARLY_LAUNCH, SKINNY_LINEAR = "nanovllm.kernels.early_launch", "nanovllm.kernels.linear.skinny_linear"
VARIANTS = [
    Variant("everything on"),
    Variant("overlap of host and device off", prepare=wait_for_each_step),
    Variant("CUDA graphs off", options={"enforce_eager": True}),
    Variant("prefix cache off", options={"enable_prefix_caching": False}),
    Variant("fused kernels off: plain PyTorch", inside=plain_kernels),
    Variant(
        "small-batch linear kernel off", inside=partial(constant, SKINNY_LINEAR, "MAX_ROWS", 0), module=SKINNY_LINEAR
    ),
    Variant("early launch off", inside=late_launch, module=EARLY_LAUNCH),
]


def run(setting: Setting) -> dict[str, Any]:
    """Measure every variant whose optimization this engine has. Prints the figures, and returns them for the JSON."""
    headline = setting.draw("headline", PRESETS["headline"])
    stream = setting.draw("1 stream", few_streams(1))
    ceilings = setting.measure_ceilings()
    variants = []
    for variant in VARIANTS:
        if importlib.util.find_spec(variant.module) is None:
            continue
        with variant.inside():
            engine = make_engine("nanovllm", replace(setting.options, **variant.options))
            variant.prepare(engine.llm.engine)
            warm_up(engine, headline, num_tokens=16)
            results = [
                run_alternating([engine], workload, setting.repeat, setting.bound(workload, ceilings))[0]
                for workload in (headline, stream)
            ]
            engine.close()
        variants.append({"variant": variant.name, "results": [asdict(result) for result in results]})
        rates = ", ".join(f"{result.workload} {result.output_tok_s:,.1f} tok/s" for result in results)
        print(f"{variant.name}: {rates}", flush=True)
    print(*ablation_lines(variants), sep="\n")
    return {"ceilings": asdict(ceilings), "ablation": variants}


def ablation_lines(variants: list[dict[str, Any]]) -> list[str]:
    """A table of every variant's rates, also in percent of the first variant's."""
    workloads = [result["workload"] for result in variants[0]["results"]]
    cells = []
    for variant in variants:
        rates = []
        for result, first in zip(variant["results"], variants[0]["results"], strict=True):
            rates += [f"{result['output_tok_s']:,.1f}", f"{100 * result['output_tok_s'] / first['output_tok_s']:.1f} %"]
        cells.append([variant["variant"], *rates])
    return table_lines(["", *(head for name in workloads for head in (f"{name}, tok/s", ""))], cells)


def read_report(path: Path) -> dict[str, Any]:
    """Read the report out of a file with an earlier `bench.py --ablate`'s output, or with its last line alone.

    Raises ValueError if the last line is not the JSON of an ablation.
    """
    lines = path.read_text().strip().splitlines()
    try:
        report = json.loads(lines[-1])
        if report["ablation"]:
            return report
    except (IndexError, KeyError, TypeError, json.JSONDecodeError):
        pass
    raise ValueError(f"{path} does not end in the line of JSON that `bench.py --ablate` prints")


def check_chart(path: Path) -> None:
    """Check, before the benchmark measures, that it can draw the chart. Raises ImportError or ValueError if not."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("a chart needs matplotlib: pip install 'nano-vllm[bench]'")
    if path.suffix != ".png" or not path.parent.is_dir():
        raise ValueError(f"{path} must be the name of a .png file in a directory that exists")


def draw_chart(report: dict[str, Any], path: Path) -> None:
    """Draw tokens per second as horizontal bars into a PNG, with a panel for each workload."""
    from matplotlib.figure import Figure

    variants = report["ablation"]
    names = [variant["variant"] for variant in variants]
    num_panels = len(variants[0]["results"])
    figure = Figure(figsize=(5 + 3.5 * num_panels, 1.2 + 0.42 * len(names)), layout="constrained")
    panels = figure.subplots(1, num_panels, sharey=True, squeeze=False)[0]
    for index, axes in enumerate(panels):
        results = [variant["results"][index] for variant in variants]
        rates = [result["output_tok_s"] for result in results]
        colors = ["#3b6ea5", *["#b8c7d9"] * (len(names) - 1)]
        bars = axes.barh(names, rates, color=colors)
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=4)
        axes.set_title(results[0]["workload"])
        axes.set_xlabel("output tokens per second")
        axes.set_xlim(0, 1.2 * max(rates))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    machine = report["machine"]
    figure.suptitle(f"{report['model']} on {machine.get('gpu', machine['cpu'])}: one optimization off at a time")
    figure.savefig(path, dpi=150)
