"""The live trace of an engine, for any number of viewers: one writer, and a queue of bounded length for each viewer.

A viewer that falls behind loses what waits for it, and gets a gap and then the whole state, so it never costs more than
its queue. When the engine ends, viewers get `{"kind": "lost"}`, and a new head and the whole state of the engine that
is started in its place. While nobody looks, the engine makes no traces. The texts of other clients' requests are
nobody's business: only an engine that was started to be looked at shows them.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from nanovllm.engine.step_trace import StepTrace
from nanovllm.errors import EngineDeadError
from nanovllm.remote.engine import RemoteEngine
from nanovllm.server.sse import event
from nanovllm.trace.writer import Object, TraceWriter, head

MOST_STEPS = 512  # that wait for a viewer


class Viewer:
    """What one viewer has yet to get: steps as (number, events), the oldest first."""

    def __init__(self) -> None:
        self.head: Object | None = None  # that it has got
        self.steps: deque[tuple[int, bytes]] = deque()
        self.has_news = asyncio.Event()
        self.is_behind = True  # so it begins with the whole state


class Feed:
    """Of one event loop.

    Args:
        is_teaching: trace every step, whatever it costs, with the texts of all requests.
        num_engines: of the server; the feed is of the first.
    """

    def __init__(self, engine: RemoteEngine, model: str, is_teaching: bool, num_engines: int) -> None:
        self._engine, self._model, self._is_teaching, self._num_engines = engine, model, is_teaching, num_engines
        self._viewers: set[Viewer] = set()
        self._writer = TraceWriter()
        self._head: Object = {}
        self._is_ended = self._is_lost = False

    @property
    def num_viewers(self) -> int:
        return len(self._viewers)

    def join(self) -> Viewer:
        """Add a viewer; `leave` it. Raises EngineDeadError while the engine does not serve."""
        if self._engine.facts is None:
            raise EngineDeadError("the engine does not serve")
        if not self._viewers or self._is_lost:
            self._begin()
        if not self._viewers:
            self._engine.watch(self._take, self._is_teaching)
        viewer = Viewer()
        self._viewers.add(viewer)
        viewer.has_news.set()
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Forget a viewer. With the last one the traces end."""
        self._viewers.discard(viewer)
        if not self._viewers:
            self._engine.watch(None)

    def end(self) -> None:
        """End all viewers' events."""
        self._is_ended = True
        for viewer in self._viewers:
            viewer.has_news.set()

    async def events(self, viewer: Viewer) -> AsyncGenerator[bytes]:
        """The head, and then what comes, until the feed ends."""
        n = 0  # of the last step that the viewer got
        while not self._is_ended:
            await viewer.has_news.wait()
            viewer.has_news.clear()
            if self._is_lost:
                yield event({"kind": "lost"})
                continue
            if viewer.head is not self._head:
                viewer.head, n = self._head, 0
                yield event(self._head)
            state = self._writer.full(max(0, self._writer.n - n - 1) if n else 0) if viewer.is_behind else []
            if state and viewer.head is self._head:
                viewer.is_behind, n = False, self._writer.n
                yield _events(state)
            while viewer.steps:
                n, one = viewer.steps.popleft()
                yield one

    def _begin(self) -> None:
        """Begin a trace with what the engine is now."""
        self._writer, self._is_lost = TraceWriter(), False
        engine = self._engine
        self._head = head(engine.facts.shape, self._model, self._num_engines, engine.num_restarts)

    def _take(self, trace: StepTrace | None) -> None:
        if trace is None:
            self._is_lost = True
            for viewer in self._viewers:
                viewer.steps.clear()
                viewer.is_behind = True
                viewer.has_news.set()
            return
        if self._is_lost:
            self._begin()
        if not trace.is_full and self._writer.n == 0:
            return  # it was on its way when the last viewer left
        objects = self._writer.objects(trace)
        step = (self._writer.n, _events(objects))
        for viewer in self._viewers:
            if len(viewer.steps) == MOST_STEPS:
                viewer.steps.clear()
                viewer.is_behind = True
            if not viewer.is_behind:
                viewer.steps.append(step)
            viewer.has_news.set()


def _events(objects: list[Object]) -> bytes:
    return b"".join(map(event, objects))
