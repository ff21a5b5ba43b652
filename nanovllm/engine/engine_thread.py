"""One thread that owns an engine, and others that ask it for things.

Whatever touches the engine runs here, between two steps: others leave a command and go on. With nothing to do the
thread sleeps on a condition. It waits for nobody: a listener is called here and has to return at once.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from nanovllm.engine.forks import FORKED
from nanovllm.engine.request import Progress, Request
from nanovllm.engine.text_engine import TextEngine
from nanovllm.errors import EngineDeadError

logger = logging.getLogger(__name__)

Listener = Callable[[list[Progress] | BaseException], None]


class EngineThread:
    """Runs a `TextEngine`, from `start` on. Its methods may be called from any thread.

    In a child that was forked off the thread's process there is no such thread: what would ask it for something raises
    EngineDeadError, and closing does nothing.

    Attributes:
        text_engine: None when its memory has been given back.
        ended: done when the thread does nothing any more.
        is_paused: no steps are done; commands are.
    """

    def __init__(self, text_engine: TextEngine) -> None:
        self.text_engine: TextEngine | None = text_engine
        self._death: BaseException | None = None  # what has ended the thread, although nobody closed it
        self._pid = os.getpid()
        self._commands: deque[Callable[[], None]] = deque()
        self._listeners: dict[Request, Listener] = {}
        self._wakeup = threading.Condition()
        self._is_closing = False
        self.is_paused = False
        self._ignores_pauses = False
        self.ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="nanovllm-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is a child that was forked off the thread's process."""
        return os.getpid() != self._pid

    @property
    def error(self) -> EngineDeadError | None:
        """Why nothing is served any more, although nobody closed it. The one truth of the engine's health."""
        if self.is_elsewhere:
            return EngineDeadError(FORKED)
        if self._death is not None:
            error = EngineDeadError(f"the engine is dead: {self._death!r}")
            error.__cause__ = self._death
            return error
        text_engine = self.text_engine
        return None if text_engine is None or self._is_closing else text_engine.engine.error

    @property
    def is_running(self) -> bool:
        """Whether it takes requests."""
        return not self._is_closing and not self.ended.done() and self.error is None

    def check(self) -> None:
        """Raises EngineDeadError if it takes no requests."""
        if not self.is_running:
            raise self.error or EngineDeadError("the engine is closed")

    def submit(self, request: Request, listener: Listener) -> None:
        """Let a request run. Its listener gets its progress whenever there is more of it; the last says finished.

        If it cannot run, or the engine fails under way, the listener gets the error, and that is the last.

        A listener that raises loses its request, and nobody else's.

        Raises:
            EngineDeadError: the engine is closed, or has failed for good.
        """

        def add() -> None:
            try:
                self.text_engine.add(request)
                self._listeners[request] = listener
            except BaseException as error:
                _say(listener, error)

        self.check()
        with self._wakeup:  # so that nothing comes in behind the closing
            is_posted = self.is_running and self._post(add)
        if not is_posted:
            self.check()

    def abort(self, request: Request) -> None:
        """End a request before its time. Its listener is told so, unless it has ended already."""
        if not self.is_elsewhere:
            self._post(lambda: self._abort([request]))

    def abort_ids(self, request_ids: Any) -> Future[None]:
        """The same by id; the future is done when the requests' blocks are free."""
        return self.call(lambda: self._abort(self.text_engine.find(request_ids)))

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function between two steps."""
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        if self.is_elsewhere:
            raise EngineDeadError(FORKED)
        if not self._post(run):
            future.set_exception(self.error or EngineDeadError("the engine is closed"))
        return future

    def end_pauses(self) -> None:
        """No pause counts from now on: the requests that are to end before it closes must come to their end."""
        with self._wakeup:
            self._ignores_pauses = True
            self._wakeup.notify()

    def close(self, drain: bool = False) -> None:
        """Take no more requests, and let those that run end, or abort them. `ended` says when it is done."""
        if self.is_elsewhere:
            return
        self.end_pauses()
        with self._wakeup:
            self._is_closing = True
            self._wakeup.notify()
            if not drain:
                self._post(lambda: self._abort(list(self._listeners)))

    def join(self) -> None:
        """Wait for the end."""
        has_started = self._thread.ident is not None
        # The current thread may be where garbage is collected.
        if has_started and not self.is_elsewhere and threading.current_thread() is not self._thread:
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
        self._death = error
        with self._wakeup:
            self.ended.set_result(None)  # no more come
        for command in self._commands:
            try:
                command()
            except BaseException:
                logger.exception("a command to an engine's thread that has died")
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
        return self.text_engine.engine.has_unfinished_requests and (not self.is_paused or self._ignores_pauses)

    def _step(self) -> None:
        try:
            for request in self.text_engine.step():
                self._tell(request)
        except BaseException as error:  # the engine has put itself in order, and serves the next if it can
            self.text_engine.abort(list(self._listeners))
            self._fail(error)

    def _abort(self, requests: list[Request]) -> None:
        self.text_engine.abort(requests)
        for request in requests:
            if request in self._listeners:
                self._tell(request)

    def _tell(self, request: Request) -> None:
        listener = self._listeners[request]
        if request.is_finished:
            del self._listeners[request]
        if not _say(listener, request.progress()) and not request.is_finished:
            del self._listeners[request]
            self.text_engine.abort([request])

    def _fail(self, error: BaseException) -> None:
        listeners = list(self._listeners.values())
        self._listeners.clear()
        kind = RuntimeError if self.error is None else EngineDeadError
        for listener in listeners:
            failure = kind(f"the engine failed, and with it this request: {error!r}")
            failure.__cause__ = error
            _say(listener, failure)


def _say(listener: Listener, item: list[Progress] | BaseException) -> bool:
    """Whether the listener has taken it."""
    try:
        listener(item)
    except Exception:
        logger.exception("a listener has failed")
        return False
    return True
