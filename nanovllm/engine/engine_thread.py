"""One thread owns the engine and runs its loop; other threads send it commands.

The thread runs a command between two steps, so nothing else touches the engine. Without steps and commands it sleeps on
a condition. It never waits for a reader: it calls each request's listener itself, and the listener must return at once.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from nanovllm.engine.forks import FORKED
from nanovllm.engine.pacing import Pacing
from nanovllm.engine.request import Progress, Request
from nanovllm.engine.text_engine import TextEngine
from nanovllm.errors import EngineDeadError

logger = logging.getLogger(__name__)

Listener = Callable[[list[Progress] | BaseException], None]


class EngineThread:
    """Runs a `TextEngine` once `start` is called. Any thread may call the methods.

    A forked child has no such thread: there the methods raise EngineDeadError, and closing does nothing.

    Attributes:
        text_engine: None once its memory has been given back.
        ended: done when the thread has ended, or ends without running anything more.
        pacing: when it may do its next step. It runs commands also while it waits for that.
    """

    def __init__(self, text_engine: TextEngine, after_news: Callable[[], None] = lambda: None) -> None:
        """`after_news` is called in the thread when listeners have got what a step or command has brought."""
        self.text_engine: TextEngine | None = text_engine
        self._after_news = after_news
        self._death: BaseException | None = None  # the error that ended the thread, if it was not closed
        self._pid = os.getpid()
        self._commands: deque[Callable[[], None]] = deque()
        self._listeners: dict[Request, Listener] = {}
        self._wakeup = threading.Condition()
        self._is_closing = False
        self.pacing = Pacing()
        self._ignores_pauses = False
        self.ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="nanovllm-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_in_forked_child(self) -> bool:
        """Whether this process is a forked child of the thread's process."""
        return os.getpid() != self._pid

    @property
    def error(self) -> EngineDeadError | None:
        """Why the engine serves nothing any more; None while it does, or once it was closed."""
        if self.is_in_forked_child:
            return EngineDeadError(FORKED)
        if self._death is not None:
            error = EngineDeadError(f"the engine is dead: {self._death!r}")
            error.__cause__ = self._death
            return error
        text_engine = self.text_engine
        return None if text_engine is None or self._is_closing else text_engine.engine.error

    @property
    def is_running(self) -> bool:
        """Whether the engine takes requests."""
        return not self._is_closing and not self.ended.done() and self.error is None

    def check(self) -> None:
        """Raises EngineDeadError if the engine takes no requests."""
        if not self.is_running:
            raise self.error or EngineDeadError("the engine is closed")

    def submit(self, request: Request, listener: Listener) -> None:
        """Run a request. After each step that brings it tokens, its listener gets its progress, until it is finished.

        If the request cannot run, or the engine fails during it, the listener gets the error instead, and then nothing
        more. If the listener raises, its request is aborted, and no other.

        Raises:
            EngineDeadError: the engine is closed, or has failed for good.
        """

        def add() -> None:
            try:
                self.text_engine.add(request)
                self._listeners[request] = listener
            except BaseException as error:
                _deliver(listener, error)

        self.check()
        with self._wakeup:  # so that no request is posted after close()
            is_posted = self.is_running and self._post(add)
        if not is_posted:
            self.check()

    def abort(self, request: Request) -> None:
        """End a request early. Its listener gets a last progress, unless the request has ended already."""
        if not self.is_in_forked_child:
            self._post(lambda: self._abort([request]))

    def abort_ids(self, request_ids: Any) -> Future[None]:
        """The same by id. The future is done when the requests' blocks are free."""
        return self.call(lambda: self._abort(self.text_engine.find(request_ids)))

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function between two steps. The future has its result."""
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        if self.is_in_forked_child:
            raise EngineDeadError(FORKED)
        if not self._post(run):
            future.set_exception(self.error or EngineDeadError("the engine is closed"))
        return future

    def end_pauses(self) -> None:
        """Ignore pauses from now on, so that requests which must end before the engine closes can end."""
        with self._wakeup:
            self._ignores_pauses = True
            self._wakeup.notify()

    def close(self, drain: bool = False) -> None:
        """Take no more requests. Abort the unfinished ones, or with `drain` finish them; then `ended` is done."""
        if self.is_in_forked_child:
            return
        self.end_pauses()
        with self._wakeup:
            self._is_closing = True
            self._wakeup.notify()
            if not drain:
                self._post(lambda: self._abort(list(self._listeners)))

    def join(self) -> None:
        """Wait until the thread has ended."""
        has_started = self._thread.ident is not None
        # Garbage collection may call this within the thread itself, which cannot wait for itself.
        if has_started and not self.is_in_forked_child and threading.current_thread() is not self._thread:
            self._thread.join()

    def _post(self, command: Callable[[], None]) -> bool:
        """Queue a command, to run between two steps. False if the thread has ended."""
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
                if self._seconds_to_step() == 0:
                    self._step()
                    self.pacing.count_step()
                self._after_news()
        except BaseException as error:
            logger.exception("the engine's thread has died")
            self._die(error)
            self._after_news()

    def _die(self, error: BaseException) -> None:
        """Fail all requests, including those whose commands have not run yet."""
        self._death = error
        with self._wakeup:
            self.ended.set_result(None)  # from here on _post refuses commands
        for command in self._commands:
            try:
                command()
            except BaseException:
                logger.exception("a command to an engine's thread that has died")
        self._fail(error)

    def _wait(self) -> bool:
        """Wait for a command or a step to do. False: the engine is closed, and none will come."""
        with self._wakeup:
            while not self._commands and (seconds := self._seconds_to_step()) != 0:
                if self._is_closing:
                    self.ended.set_result(None)  # with the lock held, so that no command is posted after it
                    return False
                self._wakeup.wait(seconds)
        return True

    def _seconds_to_step(self) -> float | None:
        """0: there is a step to do now. None: there is none to do."""
        if not self.text_engine.engine.has_unfinished_requests:
            return None
        return 0.0 if self._ignores_pauses else self.pacing.seconds_to_step()

    def _step(self) -> None:
        try:
            for request in self.text_engine.step():
                self._send_progress(request)
        except BaseException as error:  # the engine has reset itself, and serves the next request if it can
            self.text_engine.abort(list(self._listeners))
            self._fail(error)

    def _abort(self, requests: list[Request]) -> None:
        self.text_engine.abort(requests)
        for request in requests:
            if request in self._listeners:
                self._send_progress(request)

    def _send_progress(self, request: Request) -> None:
        listener = self._listeners[request]
        if request.is_finished:
            del self._listeners[request]
        if not _deliver(listener, request.progress()) and not request.is_finished:
            del self._listeners[request]
            self.text_engine.abort([request])

    def _fail(self, error: BaseException) -> None:
        listeners = list(self._listeners.values())
        self._listeners.clear()
        kind = RuntimeError if self.error is None else EngineDeadError
        for listener in listeners:
            failure = kind(f"the engine failed, and with it this request: {error!r}")
            failure.__cause__ = error
            _deliver(listener, failure)


def _deliver(listener: Listener, item: list[Progress] | BaseException) -> bool:
    """Call the listener. False if it raises."""
    try:
        listener(item)
    except Exception:
        logger.exception("a listener has failed")
        return False
    return True
