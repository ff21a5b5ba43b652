"""Measures where a run's time goes: a recorder wraps the engine's methods for one run, then restores them.

On CUDA the recorder puts an event before and after each step's work on the engine's stream. Between steps the device
waits for the host. All other work of the host is hidden, since the device is busy meanwhile:

    host time = the run's time - the host's waiting for tokens
    not hidden = the device's idle time = the run's time - the time between each step's two events
    hidden = host time - not hidden

A step's first event follows the copy and the scatter that bring its changes to the device, so their few microseconds
count as idle. From then on the device counts as busy until the step ends; its waits *within* a step, in which the host
launches an eager prefill's kernels one by one, show only in a profiler. On the CPU, host and device take turns on the
same cores, the clock replaces the events, and nothing is hidden. The events cost some microseconds a step, so
`bench.py` reports the tok/s of other runs.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch

Mark = Any  # a CUDA event, or seconds
FULL_BATCH = 15 / 16  # of the largest decode batch: a step with at least so many sequences counts as one at full batch


@dataclass(slots=True)
class StepTiming:
    """One step. `begin` and `end` bracket the device's work."""

    num_seqs: int
    num_decodes: int
    num_tokens: int
    begin: Mark
    end: Mark = None
    host_s: float = 0.0  # host time of the `engine.step()` call that launched it


class StepRecorder:
    """Records an engine's steps: `with StepRecorder(llm.engine) as recorder: …`, and afterwards `summary()`."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.is_cuda: bool = engine.runner.is_cuda
        self.steps: list[StepTiming] = []
        self.wall_s = 0.0
        self._waited_s = 0.0

    def __enter__(self) -> "StepRecorder":
        runner, batch = self.engine.runner, self.engine.runner.batch
        self._wrapped = [(self.engine, "step"), (runner, "launch"), (batch, "apply")]
        self._step, self._launch, self._apply = self.engine.step, runner.launch, batch.apply
        self.engine.step, runner.launch, batch.apply = self._timed_step, self._timed_launch, self._timed_apply
        self._entered = self._mark()
        self._start = perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.wall_s = perf_counter() - self._start
        for owner, name in self._wrapped:
            delattr(owner, name)  # uncovers the class's own method
        if self.is_cuda:
            torch.cuda.synchronize()

    def _timed_step(self) -> Any:
        num_launched, waited_s, start = len(self.steps), self._waited_s, perf_counter()
        finished = self._step()
        elapsed_s = perf_counter() - start - (self._waited_s - waited_s)
        if len(self.steps) > num_launched:
            step = self.steps[-1]
            step.host_s = elapsed_s if self.is_cuda else elapsed_s - self._seconds(step.begin, step.end)
        elif self.steps:
            self.steps[-1].host_s += elapsed_s
        return finished

    def _timed_launch(self, plan: Any) -> "_TimedHandle":
        handle = self._launch(plan)
        self.steps[-1].end = self._mark()
        return _TimedHandle(handle, self)

    def _timed_apply(self, plan: Any, *args: Any) -> None:
        self._apply(plan, *args)
        self.steps.append(StepTiming(len(plan.rows), plan.num_decodes, plan.num_tokens, self._mark()))

    def _mark(self) -> Mark:
        if not self.is_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Mark, end: Mark) -> float:
        return start.elapsed_time(end) / 1e3 if self.is_cuda else end - start

    def summary(self) -> dict[str, Any]:
        """Split the run's seconds into decode-only steps and steps with prefill, and the host's into hidden and not.

        `full_batch` has the decode-only steps whose number of sequences comes near the largest (`FULL_BATCH`).
        """
        ends = [self._entered, *(step.end for step in self.steps)]
        timings = [
            (step, self._seconds(step.begin, step.end), self._seconds(previous_end, step.begin))
            for step, previous_end in zip(self.steps, ends, strict=False)
        ]
        decodes = [timing for timing in timings if timing[0].num_decodes == timing[0].num_seqs]
        least = FULL_BATCH * max((step.num_seqs for step, _, _ in decodes), default=0)
        decode, full_batch = _sum_up(decodes), _sum_up(timing for timing in decodes if timing[0].num_seqs >= least)
        prefill = _sum_up(timing for timing in timings if timing[0].num_decodes < timing[0].num_seqs)
        busy_s = decode.busy_s + prefill.busy_s
        idle_s = max(0.0, self.wall_s - busy_s)
        host_s = self.wall_s - self._waited_s - (0.0 if self.is_cuda else busy_s)
        return {
            "wall_s": self.wall_s,
            "decode": asdict(decode),
            "prefill": asdict(prefill),
            "full_batch": asdict(full_batch),
            "device_busy_s": busy_s,
            "device_idle_share": idle_s / self.wall_s,
            "host_s": host_s,
            "host_hidden_s": max(0.0, host_s - idle_s),
            "host_not_hidden_s": idle_s,
            "host_us_per_scheduled_sequence": 1e6 * host_s / max(1, decode.num_seqs + prefill.num_seqs),
        }


class _TimedHandle:
    """A step's handle that adds the host's waiting for tokens to the recorder's."""

    def __init__(self, handle: Any, recorder: StepRecorder) -> None:
        self._handle, self._recorder = handle, recorder

    def tokens(self) -> list[int]:
        start = perf_counter()
        tokens = self._handle.tokens()
        self._recorder._waited_s += perf_counter() - start
        return tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


@dataclass(slots=True)
class StepSums:
    """Sums over several steps. `busy_s`: the device works; `idle_s`: the device waits before a step; `host_s`: the host
    works in `engine.step()`, its waiting for tokens left out.
    """

    num_steps: int = 0
    num_seqs: int = 0  # sequences, summed over the steps
    num_tokens: int = 0
    busy_s: float = 0.0
    idle_s: float = 0.0
    host_s: float = 0.0
    ms_per_step: float = 0.0
    idle_share: float = 0.0  # idle_s / (busy_s + idle_s): the device waits for the host


def _sum_up(timings: Iterable[tuple[StepTiming, float, float]]) -> StepSums:
    sums = StepSums()
    for step, busy_s, idle_s in timings:
        sums.num_steps += 1
        sums.num_seqs += step.num_seqs
        sums.num_tokens += step.num_tokens
        sums.busy_s += busy_s
        sums.idle_s += idle_s
        sums.host_s += step.host_s
    if sums.num_steps:
        sums.ms_per_step = 1e3 * (sums.busy_s + sums.idle_s) / sums.num_steps
        sums.idle_share = sums.idle_s / (sums.busy_s + sums.idle_s)
    return sums
