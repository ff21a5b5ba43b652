"""The process of one engine: it makes the engine, obeys its client, and sends what the requests get.

Three threads: the main one reads commands and checks prompts, the engine's makes steps, and a third one sends. So the
engine waits neither for the client nor for Python that serves clients. What several steps have brought since the client
last asked goes out as one message.

The process ends when the client does: its socket closes, and on Linux the kernel signals it besides.
"""

import logging
import os
import socket
import sys
import threading
from concurrent.futures import Future
from functools import partial
from io import BufferedReader

from nanovllm.config import Config
from nanovllm.engine.engine_thread import EngineThread
from nanovllm.engine.request import Progress
from nanovllm.engine.stats import StepStats
from nanovllm.engine.step_trace import shape_of
from nanovllm.engine.text_engine import TextEngine
from nanovllm.remote.messages import Abort, Add, Facts, More, Orders, Outgoing, packed, plain, read
from nanovllm.remote.step_watch import StepWatch
from nanovllm.remote.trace_box import TraceBox

logger = logging.getLogger(__name__)
# How long the engine's thread waits for Python's lock while another has work. Python's own 5 ms are a step.
SWITCH_INTERVAL_S = 0.0002
TICK_S = 0.25  # between two looks at statistics that no news have carried, and at the engine's health


def run(fd: int) -> None:
    """The process's main function; `fd` is its end of the socket."""
    link = socket.socket(fileno=fd)
    with link.makefile("rb") as commands:
        orders: Orders = read(commands)
        logging.basicConfig(level=orders.log_level, format=f"%(asctime)s engine {orders.index}: %(message)s")
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            text_engine = TextEngine(Config.from_options(orders.model, orders.options))
        except (TypeError, ValueError, OSError) as error:  # the user's, who sees it as one line
            link.sendall(packed(plain(error)))
            return
        engine, outbox = text_engine.engine, Outbox(link, text_engine)
        facts = Facts(engine.default_sampling, shape_of(engine))
        link.sendall(packed((engine.current_stats(), facts, [])))
        outbox.start()
        try:
            _obey(commands, text_engine, outbox)
        except (EOFError, ConnectionError):
            os._exit(1)  # nothing that it owns outlives it


def _obey(commands: BufferedReader, text_engine: TextEngine, outbox: "Outbox") -> None:
    """Run commands. Raises EOFError or ConnectionError when the client has ended."""
    while True:
        command = read(commands)
        if isinstance(command, More):
            outbox.is_asked.set()
            continue
        if isinstance(command, Abort):
            if outgoing := outbox.running.get(command.key):
                outbox.thread.abort(outgoing.request)
            continue
        if not isinstance(command, Add):
            outbox.thread.call(partial(outbox.traces.obey, command)).add_done_callback(_log_failure)
            continue
        outgoing = Outgoing(command.key)
        try:
            prompt = {"prompt": command.text, "prompt_token_ids": command.token_ids}
            outgoing.request = text_engine.make_request(
                prompt, command.params, request_id=command.request_id, is_streaming=True
            )
            outgoing.request.metrics.arrival_time = command.arrival_time
            outbox.running[command.key] = outgoing
            outbox.thread.submit(outgoing.request, partial(outbox.put, outgoing))
        except Exception as error:
            outbox.put(outgoing, error)
            outbox.flush()


def _log_failure(done: Future[None]) -> None:
    if error := done.exception():
        logger.error("a command of the page has failed", exc_info=error)


class Outbox:
    """What the client does not know yet. A thread sends it.

    Attributes:
        thread: the engine's, which puts and flushes.
        running: requests that have not ended, by their keys.
        is_asked: set while the client waits for news.
        traces: of steps, if the client watches.
    """

    def __init__(self, link: socket.socket, text_engine: TextEngine) -> None:
        self.running: dict[int, Outgoing] = {}
        self.thread = EngineThread(text_engine, after_news=self._after_news)
        self.traces = TraceBox(text_engine, self.thread)
        self._link, self._engine = link, text_engine.engine
        self._lock = threading.Lock()
        self._logged: BaseException | None = None
        self._latest: dict[Outgoing, list[Progress] | BaseException] = {}
        self.is_asked, self._has_news = threading.Event(), threading.Event()

    def start(self) -> None:
        self.thread.start()
        threading.Thread(target=self._run, name="nanovllm-news", daemon=True).start()

    def put(self, outgoing: Outgoing, item: list[Progress] | BaseException) -> None:
        """Any thread. The item replaces one that has not been sent."""
        if isinstance(item, RuntimeError) and item.__cause__ is not self._logged:  # one failure ends many requests
            self._logged = item.__cause__
            logger.error("a step has failed", exc_info=item)
        with self._lock:
            self._latest[outgoing] = item

    def flush(self) -> None:
        """Let the thread send."""
        if self._latest or self.traces:
            self._has_news.set()

    def _after_news(self) -> None:
        """The engine's thread calls this once after each step, rather than for each request."""
        self.traces.look()
        self.flush()

    def _run(self) -> None:
        stats: StepStats | None = None
        watch = StepWatch(self._engine, self.thread.pacing, TICK_S)
        while True:
            self.is_asked.wait()
            is_quiet = not self._has_news.wait(TICK_S)
            self._has_news.clear()
            with self._lock:
                latest, self._latest = self._latest, {}
            last, stats = stats, self._engine.current_stats()
            if latest or self.traces or stats != last:
                self.is_asked.clear()
                self._send(stats, latest)
            if self.thread.error is not None:
                logger.error("the engine has failed for good: %s", self.thread.error)
                os._exit(1)  # the client starts another
            if is_quiet and watch.is_stalled():
                logger.error("a step has not ended for %.0f s: the engine hangs", watch.longest_s)
                os._exit(1)

    def _send(self, stats: StepStats, latest: dict[Outgoing, list[Progress] | BaseException]) -> None:
        news = [outgoing.news(item) for outgoing, item in latest.items()]
        for one, outgoing in zip(news, latest, strict=True):
            if isinstance(one.of, BaseException) or outgoing.request.is_finished:
                self.running.pop(outgoing.key, None)
        try:
            self._link.sendall(packed((stats, news, self.traces.take())))
        except OSError:
            pass  # the client has ended: the main thread sees it, too
