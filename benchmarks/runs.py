"""Times runs of a workload: the engines take turns at the same requests."""

from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

from benchmarks.engines import BenchmarkedEngine
from benchmarks.roofline import Roofline
from benchmarks.workloads import Workload


@dataclass(slots=True)
class Result:
    """One engine's timed runs of one workload. Rates are the best run's."""

    workload: str
    engine: str
    num_seqs: int
    input_tokens: int
    output_tokens: int
    longest_output: int
    runs_s: list[float] = field(default_factory=list)
    best_s: float = 0.0
    output_tok_s: float = 0.0
    ms_per_token: float = 0.0  # the run's time over the longest request's output tokens
    roofline: dict[str, Any] = field(default_factory=dict)
    percent_of_roofline: float = 0.0
    plan_bytes_per_step: float = 0.0  # bytes that rank 0 sends to each follower for a step's plan


def run_alternating(engines: list[BenchmarkedEngine], workload: Workload, repeat: int, bound: Roofline) -> list[Result]:
    """Time `repeat` runs of each engine. The engines alternate, so that a noisy machine disturbs all alike.

    `bound` is the workload's roofline.
    """
    results = [
        Result(
            workload=workload.name,
            engine=engine.name,
            num_seqs=len(workload.prompts),
            input_tokens=workload.num_input_tokens,
            output_tokens=workload.num_output_tokens,
            longest_output=max(workload.max_tokens),
            roofline=asdict(bound),
        )
        for engine in engines
    ]
    sent = [_plan_bytes(engine) for engine in engines]
    for _ in range(repeat):
        for engine, result in zip(engines, results, strict=True):
            result.runs_s.append(timed_run(engine, workload))
    for engine, result, (bytes_before, steps_before) in zip(engines, results, sent, strict=True):
        num_bytes, num_steps = _plan_bytes(engine)
        result.plan_bytes_per_step = (num_bytes - bytes_before) / max(1, num_steps - steps_before)
    for result in results:
        result.best_s = min(result.runs_s)
        result.output_tok_s = result.output_tokens / result.best_s
        result.ms_per_token = 1e3 * result.best_s / result.longest_output
        result.percent_of_roofline = 100 * bound.total_s / result.best_s
    return results


def _plan_bytes(engine: BenchmarkedEngine) -> tuple[float, int]:
    """(bytes that rank 0 has sent to each follower, steps) so far; zeros for engines other than nano-vLLM."""
    if engine.name != "nanovllm":
        return 0.0, 0
    followers = engine.llm.engine.followers
    return followers.bytes_sent / max(1, followers.size - 1), engine.llm.stats().num_steps


def timed_run(engine: BenchmarkedEngine, workload: Workload) -> float:
    """Seconds from the prompts to the last token. Raises RuntimeError unless every request got all its tokens."""
    engine.reset()
    start = perf_counter()
    outputs = engine.generate(workload)
    elapsed_s = perf_counter() - start
    _check_lengths(engine, workload, outputs)
    return elapsed_s


def _check_lengths(engine: BenchmarkedEngine, workload: Workload, outputs: list[list[int]]) -> None:
    if [len(token_ids) for token_ids in outputs] != workload.max_tokens:
        num_tokens = sum(map(len, outputs))
        raise RuntimeError(f"{engine.name} gave {num_tokens} tokens where {workload.num_output_tokens} were asked for")


def warm_up(engine: BenchmarkedEngine, workload: Workload, num_tokens: int) -> None:
    """Generate `num_tokens` tokens for the start of the workload's first prompt."""
    engine.generate(Workload("warm-up", [workload.prompts[0][:64]], [num_tokens], workload.temperature))


def compare(ours: Result, theirs: Result) -> dict[str, Any]:
    """How many times as fast `ours` is as `theirs`, by their best runs and by each pair of neighbouring runs."""
    return {
        "workload": ours.workload,
        "engines": [ours.engine, theirs.engine],
        "ratio": theirs.best_s / ours.best_s,
        "ratio_by_run": [b / a for a, b in zip(ours.runs_s, theirs.runs_s, strict=True)],
    }


def measure_split(engine: BenchmarkedEngine, workload: Workload) -> dict[str, Any]:
    """Do one more run, instrumented, and return where its time goes. Works for nano-vLLM only, whose methods it wraps.

    Raises RuntimeError unless every request got all its tokens.
    """
    from benchmarks.step_timing import StepRecorder

    engine.reset()
    num_preemptions = engine.llm.stats().num_preemptions
    with StepRecorder(engine.llm.engine) as recorder:
        outputs = engine.generate(workload)
    _check_lengths(engine, workload, outputs)
    num_preemptions = engine.llm.stats().num_preemptions - num_preemptions
    return {"workload": workload.name, **recorder.summary(), "num_preemptions": num_preemptions}
