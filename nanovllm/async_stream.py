"""Between the engine's thread and the tasks that read: streams, the event loops they wake, and whose turn it is.

A stream keeps the latest of what the engine's thread has said, which counts all that there is; the output is built
when it is taken. So the engine's thread does the same few things for a token whether anybody reads or not.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from nanovllm.engine.request import Progress, is_last
from nanovllm.sampling_params import RequestOutputKind


class LoopWaker:
    """An event loop that reads streams, and how the engine's thread wakes it: once for all that a step has brought."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._to_wake: deque[Stream] = deque()
        self._is_called = False

    def wake(self, stream: "Stream") -> None:
        """Called in the engine's thread."""
        self._to_wake.append(stream)
        if not self._is_called:
            self._is_called = True
            try:
                self.loop.call_soon_threadsafe(self._wake_all)
            except RuntimeError:
                pass  # the loop has been closed over its tasks: nobody reads any more

    def _wake_all(self) -> None:
        self._is_called = False  # before looking: whoever comes after that calls again
        while self._to_wake:
            self._to_wake.popleft().wake()


class Stream:
    """The way of one request's news from the engine's thread to the task that reads them.

    Attributes:
        must_abort: somebody has asked for it before the engine was given the request.
        has_entered: done when the engine has been given the request, cancelled if it never will be.
        abandon: ends the request, once the engine has been given it.
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
        """Whether its event loop was closed over the task that reads it, which therefore never comes to its end."""
        return self.waker.loop.is_closed()

    async def entered_or_gone(self) -> None:
        """Wait until the engine has been given the request, or never will be."""
        if not self.is_abandoned:
            await asyncio.wait([asyncio.wrap_future(self.has_entered)])

    def put(self, item: list[Progress] | BaseException) -> None:
        """Called in the engine's thread. What has not been taken yet is replaced."""
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
        self._is_announced = False  # before the event: what is put after that is announced again
        self._has_news.set()

    async def take(self) -> list[Progress]:
        """The latest progress, when there is one that has not been taken. Raises the request's error."""
        while not self._latest:
            self._has_news.clear()
            await self._has_news.wait()
        item = self._latest.popleft()
        if isinstance(item, BaseException):
            raise item
        return item


class FairSemaphore:
    """Lets so many streams in at once, and the others in the order in which they came, whatever loops they are of."""

    def __init__(self, most: int | None) -> None:
        self._most = float("inf") if most is None else most
        self._lock = threading.Lock()
        self._inside: set[Stream] = set()
        self._outside: dict[Stream, Future[None]] = {}

    async def enter(self, stream: Stream) -> None:
        """Wait for the stream's turn. Call `leave` at any time thereafter, also if this is cancelled."""
        turn: Future[None] = Future()
        with self._lock:
            self._outside[stream] = turn
            self._let_in()
        await asyncio.wrap_future(turn)

    def leave(self, stream: Stream) -> None:
        """Give the turn to the next. May be called in any thread, and again."""
        with self._lock:
            self._outside.pop(stream, None)
            self._inside.discard(stream)
            self._let_in()

    def _let_in(self) -> None:
        if len(self._inside) >= self._most:  # a loop that was closed over its tasks keeps no turn
            self._inside = {stream for stream in self._inside if not stream.is_abandoned}
        while self._outside and len(self._inside) < self._most:
            stream = next(iter(self._outside))
            turn = self._outside.pop(stream)
            if not stream.is_abandoned and turn.set_running_or_notify_cancel():
                self._inside.add(stream)
                turn.set_result(None)
