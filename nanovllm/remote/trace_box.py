"""Traces of an engine's steps on their way to the client: no more than it takes, and so few that they cost little.

A step that finds the box full, or comes too soon after the last trace, is not traced at all. The next trace tells what
has changed since the last one and how many steps are missing, so nothing has to be kept for a slow client.
"""

import time
from collections import deque

from nanovllm.engine.engine_thread import EngineThread
from nanovllm.engine.step_trace import StepTrace
from nanovllm.engine.text_engine import TextEngine
from nanovllm.remote.messages import ForgetCache, Pace, Watch

MOST_TRACES = 256
LEAST_PAUSE_S = 1 / 30  # from trace to trace, unless every step is wanted: more than an eye can follow
# Of the time of the engine's thread. Pickling costs half as much again, in a thread that shares Python's lock.
LARGEST_SHARE = 0.005


class TraceBox:
    """The engine's thread fills it, the thread that sends empties it."""

    def __init__(self, text_engine: TextEngine, thread: EngineThread) -> None:
        self._text_engine, self._thread = text_engine, thread
        self._traces: deque[StepTrace] = deque()
        self._watch = Watch(False)
        self._next_s = 0.0

    def obey(self, command: Watch | Pace | ForgetCache) -> None:
        """Run a command, in the engine's thread."""
        engine, pacing = self._text_engine.engine, self._thread.pacing
        if isinstance(command, Watch):
            self._switch(command)
        elif isinstance(command, Pace):
            pacing.is_paused, pacing.delay_s = command.is_paused, command.delay_s
            pacing.num_allowed = command.num_steps if engine.has_unfinished_requests else 0
        else:
            engine.reset_prefix_cache()

    def _switch(self, watch: Watch) -> None:
        """Trace from now on, beginning anew; or stop."""
        self._watch, self._next_s = watch, 0.0
        self._traces.clear()
        if self._text_engine.tracer is not None:
            self._text_engine.tracer.end()
        self._text_engine.engine.observer = self._text_engine.tracer = None
        if watch.is_on:
            self._text_engine.tracer_of(self._put).has_texts = watch.is_teaching

    def look(self) -> None:
        """Decide whether the next step is traced. In the engine's thread, after each step and command.

        While no step comes, it traces what commands have changed.
        """
        if not self._watch.is_on:
            return
        engine, has_room = self._text_engine.engine, len(self._traces) < MOST_TRACES
        if has_room and (self._thread.pacing.is_paused or not engine.has_unfinished_requests):
            trace = self._text_engine.tracer_of(self._put).between_steps()
            if trace is not None:
                self._traces.append(trace)
        is_due = self._watch.is_teaching or time.monotonic() >= self._next_s
        engine.observer = self._put if has_room and is_due else None

    def _put(self, trace: StepTrace) -> None:
        self._traces.append(trace)
        cost_s = 0.0 if trace.is_full else self._text_engine.tracer.cost_s  # the whole cache comes only once
        self._next_s = trace.time_s + max(LEAST_PAUSE_S, cost_s / LARGEST_SHARE)

    def __bool__(self) -> bool:
        return bool(self._traces)

    def take(self) -> list[StepTrace]:
        """All that are in it. Any one thread."""
        traces = []
        while self._traces:
            traces.append(self._traces.popleft())
        if len(traces) >= MOST_TRACES:  # what changed since then shows, though no step may come
            self._thread.call(self.look)
        return traces
