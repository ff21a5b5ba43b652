"""The goals as data: for each row of the table the floor, the least that the engine should reach, and the target.

A goal holds for a device, a model's shape in bfloat16, a number of ranks, and workloads of full size. `bench.py`
measures a row without a goal, but does not judge it.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.model_shape import model_shape
from benchmarks.report import table_lines
from benchmarks.setting import SHAPES, Setting


@dataclass(slots=True, frozen=True)
class Row:
    """A row of the table. `at_most`: smaller is better."""

    name: str
    unit: str
    at_most: bool = False


ROWS = {
    "headline": Row("headline: 256 requests of 100..1024 + 100..1024 tokens", "tok/s"),
    "headline_roofline": Row("headline, of the roofline of this run", "%"),
    "host_not_hidden": Row("host time not hidden, decode steps at batch near 256", "%", at_most=True),
    "device_idle": Row("device idle, the whole headline", "%", at_most=True),
    "streams_1": Row("1 stream, prompt 128, output 512", "tok/s"),
    "streams_8": Row("8 streams", "tok/s"),
    "streams_32": Row("32 streams", "tok/s"),
    "token_1": Row("a token of 1 stream", "ms", at_most=True),
    "decode_0": Row("paged decode kernel, the headline's lengths at step 0", "TB/s"),
    "decode_300": Row("paged decode kernel, step 300", "TB/s"),
    "decode_600": Row("paged decode kernel, step 600", "TB/s"),
    "decode_900": Row("paged decode kernel, step 900", "TB/s"),
    "prefill_attention": Row("prefill of 64 x 2,048: attention kernel, of the matmul rate", "%"),
    "prefill_model": Row("prefill of 64 x 2,048: whole model, of the matmul rate", "%"),
    "long_context": Row("decode kernel at 8 x 32k, of the read bandwidth", "%"),
    "start_up": Row("process start to first token, graphs included", "s", at_most=True),
    "scaling": Row("more requests or rows: least rate, of 256 requests in 256 rows", "%"),
    "small_cache": Row("a quarter of the cache's need: rate, of the unpressured", "%"),
}

# (a word of the device's name, shape, number of ranks) -> row -> (floor, target); None: no such goal.
GOALS: dict[tuple[str, str, int], dict[str, tuple[float | None, float | None]]] = {
    ("H100", "qwen3-0.6b", 1): {
        "headline": (21_500, 24_000),
        "headline_roofline": (80, 90),
        "host_not_hidden": (3, 1),
        "streams_1": (1_000, 1_300),
        "streams_8": (7_200, 9_500),
        "streams_32": (20_000, 26_000),
        "decode_0": (2.85, 2.95),
        "decode_300": (2.85, 2.95),
        "decode_600": (2.75, 2.9),
        "decode_900": (2.5, 2.75),
        "prefill_attention": (45, 60),
        "prefill_model": (45, 60),
        "long_context": (85, 92),
        "start_up": (20, 10),
        "scaling": (100, None),
        "small_cache": (80, None),
    },
    ("H200", "qwen3-0.6b", 1): {"headline": (28_000, 33_000)},
    ("H200", "qwen3-8b", 1): {"headline": (10_000, 11_500), "token_1": (4.4, 3.8)},
    ("H200", "qwen3-8b", 4): {"headline": (21_000, 26_000), "token_1": (2.2, 1.5)},
}


def goals_for(setting: Setting, machine: dict[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """The goals for a run in this setting on this machine (from `describe_machine`); {} if there are none."""
    words, num_ranks = machine.get("gpu", "").split(), setting.options.tensor_parallel_size
    for (device, shape, ranks), goals in GOALS.items():
        is_same_model = setting.shape == model_shape(SHAPES / shape, bytes_per_element=2)
        if device in words and is_same_model and ranks == num_ranks and setting.shrink == 1:
            return goals
    return {}


def judge(
    measured: dict[str, float], goals: dict[str, tuple[float | None, float | None]]
) -> list[dict[str, str | float | None]]:
    """Compare each measured row with its goal; a dict a row, in the table's order.

    Its "reached" is "target", "floor" or "nothing", or None if the row has no goal.
    """
    rows = []
    for key, row in ROWS.items():
        if key not in measured:
            continue
        value, (floor, target) = measured[key], goals.get(key, (None, None))
        reached = None if floor is None and target is None else "nothing"
        for name, goal in (("floor", floor), ("target", target)):
            if goal is not None and (value <= goal if row.at_most else value >= goal):
                reached = name
        rows.append(
            {
                "key": key,
                "row": row.name,
                "unit": row.unit,
                "measured": value,
                "floor": floor,
                "target": target,
                "reached": reached,
            }
        )
    return rows


def goal_lines(judged: list[dict[str, Any]]) -> list[str]:
    """`judge`'s rows as a table of text."""
    names = {None: "", "nothing": "NOT MET", "floor": "floor met", "target": "target met"}
    cells = []
    for row in judged:
        sign = "<= " if ROWS[row["key"]].at_most else ">= "
        goals = ["" if row[name] is None else f"{sign}{row[name]:,}" for name in ("floor", "target")]
        cells.append([row["row"], _short(row["measured"]), row["unit"], *goals, names[row["reached"]]])
    return table_lines(["row", "measured", "", "floor", "target", ""], cells)


def _short(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"
