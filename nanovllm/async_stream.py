"""Carries progress from the engine's thread to the tasks that read it, wakes their event loops, and queues requests.

A stream keeps only the latest `Progress`, which counts all tokens so far; the reader builds the output when it takes
it. So the engine's thread does the same little work for each token, whether a task reads or not.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from nanovllm.engine.request import Progress, is_last
from nanovllm.sampling_params import RequestOutputKind

REST = 1.0  # times as long as its work an event loop rests
LEAST_REST_S = 0.001  # timers are no finer


class LoopWaker:
    """Lets the engine's thread wake an event loop: once for all streams that a step has news for.

    The loop and the engine's thread share Python's lock. So after its work for many streams the loop rests, in
    proportion to what that took; their news come together when it wakes. Few streams rest for no time at all.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._to_wake: deque[Stream] = deque()
        self._is_called = False

    def wake(self, stream: "Stream") -> None:
        """The engine's thread calls this."""
        self._to_wake.append(stream)
        if not self._is_called:
            self._is_called = True
            try:
                self.loop.call_soon_threadsafe(self._wake_all)
            except RuntimeError:
                pass  # the loop was closed while its tasks ran: no task reads any more

    def _wake_all(self) -> None:
        began = self.loop.time()
        while self._to_wake:
            self._to_wake.popleft().wake()
        self.loop.call_soon(self._rest, began)  # behind the tasks that were woken

    def _rest(self, began: float) -> None:
        rest = REST * (self.loop.time() - began)
        if rest < LEAST_REST_S:
            self._end_rest()
        else:
            self.loop.call_later(rest, self._end_rest)

    def _end_rest(self) -> None:
        self._is_called = False  # first, so that a stream added from here on schedules another call
        if self._to_wake:
            self._is_called = True
            self._wake_all()


class Stream:
    """Carries one request's progress from the engine's thread to the task that reads it.

    Attributes:
        must_abort: `abort` was called before the engine had the request.
        has_entered: done when the engine has the request, cancelled if it will never have it.
        abandon: aborts the request; None until the engine has it.
    """

    def __init__(self, waker: LoopWaker, semaphore: "FairSemaphore", output_kind: RequestOutputKind) -> None:
        self.must_abort = False
        self.has_entered: Future[None] = Future()
        self.abandon: Callable[[], None] | None = None
        self.waker = waker
        self._semaphore = semaphore
        self._is_final_only = output_kind is RequestOutputKind.FINAL_ONLY
        self._latest: deque[list[Progress] | BaseException] = deque(maxlen=1)  # append and popleft are atomic
        self._has_news = asyncio.Event()
        self._is_announced = False
        self._has_begun = False

    @property
    def is_abandoned(self) -> bool:
        """Whether its event loop was closed while the reading task ran, which therefore never ends."""
        return self.waker.loop.is_closed()

    async def entered_or_gone(self) -> None:
        """Wait until the engine has the request, or will never have it."""
        if not self.is_abandoned:
            await asyncio.wait([asyncio.wrap_future(self.has_entered)])

    def put(self, item: list[Progress] | BaseException) -> None:
        """The engine's thread calls this. The item replaces one that the reader has not taken yet."""
        if not self._has_begun:
            self._has_begun = True
            self._semaphore.leave(self)
        if self.is_abandoned and self.abandon is not None:
            self.abandon()
            self.abandon = None
        if self._is_final_only and not isinstance(item, BaseException) and not is_last(item):
            return
        self._latest.append(item)
        if not self._is_announced:
            self._is_announced = True
            self.waker.wake(self)

    def wake(self) -> None:
        self._is_announced = False  # first, so that an item put during this call is announced again
        self._has_news.set()

    async def take(self) -> list[Progress]:
        """Wait for a new progress and return the latest. Raises the request's error."""
        while not self._latest:
            self._has_news.clear()
            await self._has_news.wait()
        item = self._latest.popleft()
        if isinstance(item, BaseException):
            raise item
        return item


class FairSemaphore:
    """Lets at most so many streams in at once, in their order of arrival, also when their event loops differ."""

    def __init__(self, most: int | None) -> None:
        self._most = float("inf") if most is None else most
        self._lock = threading.Lock()
        self._inside: set[Stream] = set()
        self._outside: dict[Stream, Future[None]] = {}

    async def enter(self, stream: Stream) -> None:
        """Wait for the stream's turn. Call `leave` afterwards, also if this is cancelled."""
        turn: Future[None] = Future()
        with self._lock:
            self._outside[stream] = turn
            self._let_in()
        await asyncio.wrap_future(turn)

    def leave(self, stream: Stream) -> None:
        """Give the turn to the next stream. Any thread may call this, also again."""
        with self._lock:
            self._outside.pop(stream, None)
            self._inside.discard(stream)
            self._let_in()

    def _let_in(self) -> None:
        if len(self._inside) >= self._most:  # streams of a closed loop never leave by themselves
            self._inside = {stream for stream in self._inside if not stream.is_abandoned}
        while self._outside and len(self._inside) < self._most:
            stream = next(iter(self._outside))
            turn = self._outside.pop(stream)
            if not stream.is_abandoned and turn.set_running_or_notify_cancel():
                self._inside.add(stream)
                turn.set_result(None)
