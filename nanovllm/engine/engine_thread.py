"""One thread that owns an engine, and others that ask it for things.

Whatever touches the engine runs here, between two steps: others leave a command and go on. With nothing to do the
thread sleeps on a condition. It waits for nobody: a listener is called here and has to return at once.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from nanovllm.engine.processor import Processor
from nanovllm.engine.request import Progress, Request

logger = logging.getLogger(__name__)

Listener = Callable[[list[Progress] | BaseException], None]


class EngineThread:
    """Runs a `Processor`. Its methods may be called from any thread.

    Attributes:
        error: what has ended the thread, if it is dead although nobody closed it.
        ended: done when the thread does nothing any more.
        is_paused: no steps are done; commands are.
    """

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.error: BaseException | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._listeners: dict[Request, Listener] = {}
        self._wakeup = threading.Condition()
        self._is_closing = False
        self.is_paused = False
        self.ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="nanovllm-engine", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether it takes requests."""
        return not self._is_closing and not self.ended.done()

    def submit(self, request: Request, listener: Listener) -> None:
        """Let a request run. Its listener gets its progress whenever there is more of it; the last says finished.

        If it cannot run, or the engine fails under way, the listener gets the error, and that is the last.

        Raises:
            RuntimeError: the engine is closed.
        """

        def add() -> None:
            try:
                self.processor.add(request)
                self._listeners[request] = listener
            except BaseException as error:
                listener(error)

        with self._wakeup:  # so that nothing comes in behind the closing
            is_posted = self.is_running and self._post(add)
        if not is_posted:
            raise RuntimeError("the engine is closed" if self.error is None else f"the engine is dead: {self.error!r}")

    def abort(self, request: Request) -> None:
        """End a request before its time. Its listener is told so, unless it has ended already."""
        self._post(lambda: self._abort([request]))

    def abort_ids(self, request_ids: Any) -> Future[None]:
        """The same by id; the future is done when the requests' blocks are free."""
        return self.call(lambda: self._abort(self.processor.find(request_ids)))

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function between two steps."""
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        if not self._post(run):
            future.set_exception(RuntimeError("the engine is closed"))
        return future

    def close(self, drain: bool = False) -> None:
        """Take no more requests, and let those that run end, or abort them. `ended` says when it is done."""
        with self._wakeup:
            self._is_closing = True
            self._wakeup.notify()
            if not drain:
                self._post(lambda: self._abort(list(self._listeners)))

    def join(self) -> None:
        """Wait for the end."""
        if threading.current_thread() is not self._thread:  # which may be where garbage is collected
            self._thread.join()

    def _post(self, command: Callable[[], None]) -> bool:
        """Have a command run between two steps. False if the thread has ended."""
        with self._wakeup:
            if not self.ended.done():
                self._commands.append(command)
                self._wakeup.notify()
            return not self.ended.done()

    def _run(self) -> None:
        try:
            while self._wait():
                while self._commands:
                    self._commands.popleft()()
                if self._has_steps_to_do():
                    self._step()
        except BaseException as error:
            logger.exception("the engine's thread has died")
            self._die(error)

    def _die(self, error: BaseException) -> None:
        """Tell everyone, also those whose commands have not been run yet."""
        self.error = error
        with self._wakeup:
            self.ended.set_result(None)  # no more come
        for command in self._commands:
            with suppress(BaseException):
                command()
        self._fail(error)

    def _wait(self) -> bool:
        """Until there is something to do. False: there never will be."""
        with self._wakeup:
            while not self._commands and not self._has_steps_to_do():
                if self._is_closing:
                    self.ended.set_result(None)  # with the lock held, so that no command is left behind
                    return False
                self._wakeup.wait()
        return True

    def _has_steps_to_do(self) -> bool:
        """Closing, a pause counts no more: those that drain must come to their end."""
        return self.processor.engine.has_unfinished_requests and (not self.is_paused or self._is_closing)

    def _step(self) -> None:
        try:
            for request in self.processor.step():
                self._tell(request)
        except BaseException as error:  # the engine has put itself in order, and serves the next request
            self.processor.abort(list(self._listeners))
            self._fail(error)

    def _abort(self, requests: list[Request]) -> None:
        self.processor.abort(requests)
        for request in requests:
            if request in self._listeners:
                self._tell(request)

    def _tell(self, request: Request) -> None:
        listener = self._listeners[request]
        if request.is_finished:
            del self._listeners[request]
        listener(request.progress())

    def _fail(self, error: BaseException) -> None:
        listeners = list(self._listeners.values())
        self._listeners.clear()
        for listener in listeners:
            failure = RuntimeError(f"the engine failed, and with it this request: {error!r}")
            failure.__cause__ = error
            listener(failure)
