"""One engine in a process of its own, as its client knows it: started, and started again when it ends.

An engine owns nothing that outlives it. However the client ends, its engines end with it (`remote/process.py`).
"""

import asyncio
import logging
import socket
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

from nanovllm.distributed.interpreter import start_interpreter
from nanovllm.engine.stats import StepStats
from nanovllm.engine.step_trace import StepTrace
from nanovllm.errors import EngineDeadError
from nanovllm.remote.link import Link
from nanovllm.remote.messages import Abort, Add, Facts, ForgetCache, Orders, Pace, Watch
from nanovllm.remote.request import RemoteRequest
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.token_decoder import TokenDecoder

logger = logging.getLogger(__name__)
LONGEST_PAUSE_S = 30.0  # before an engine that does not come up is started again
# What its interpreter runs. Only the client answers signals, which a terminal or a service manager sends to all.
PROGRAM = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
sys.path[:] = {path!r}
from nanovllm.distributed.parent import end_with_parent
end_with_parent({parent})
from nanovllm.remote.process import run
run({fd})
"""


class RemoteEngine:
    """An engine's process and the requests that it has. All of it is of one event loop.

    Attributes:
        facts: None while it does not serve.
        stats: the latest that have come.
        num_restarts: how often it was started again.
        is_ready: set when it has served once.
        pace: how its steps follow each other.
        process: the last one that was started.
    """

    def __init__(self, orders: Orders, devices: dict[str, str]) -> None:
        self.index = orders.index
        self.facts: Facts | None = None
        self.stats = StepStats()
        self.num_restarts = 0
        self.is_ready = asyncio.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self.pace = Pace()
        self._watcher: Callable[[StepTrace | None], None] | None = None
        self._watch = Watch(False)
        self._orders, self._devices = orders, devices
        self._requests: dict[int, RemoteRequest] = {}
        self._next_key = 0
        self._link: Link | None = None
        self._refusal: Exception | None = None

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def add(
        self,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams,
        request_id: str,
        arrival_time: float,
        decoder: TokenDecoder | None,
    ) -> RemoteRequest:
        """Run a request; `leave` it if its reader leaves. Raises EngineDeadError if the engine does not serve."""
        if self.facts is None:
            raise EngineDeadError(f"engine {self.index} does not serve")
        add = Add(self._next_key, text, token_ids, params, request_id, arrival_time)
        self._next_key += 1
        self._link.send(add)
        request = self._requests[add.key] = RemoteRequest(add, self.index, decoder)
        return request

    def leave(self, request: RemoteRequest) -> None:
        """Abort a request, unless it is finished."""
        if self._requests.pop(request.key, None) is not None:
            self._link.send(Abort(request.key))

    def watch(self, watcher: Callable[[StepTrace | None], None] | None, is_teaching: bool = False) -> None:
        """Give the watcher traces of steps, the first of them full; None when the engine has ended, and then those of
        the next one, of which the first is full again. No watcher: no more."""
        self._watcher, self._watch = watcher, Watch(watcher is not None, is_teaching)
        self._send_if_serving(self._watch)

    def set_pace(self, pace: Pace) -> None:
        """Let its steps follow each other so, also after a restart."""
        self.pace = pace._replace(num_steps=0)
        self._send_if_serving(pace)

    def forget_cache(self) -> None:
        """Empty its prefix cache."""
        self._send_if_serving(ForgetCache())

    def _send_if_serving(self, command: Any) -> None:
        if self.facts is not None:
            self._link.send(command)

    async def keep(self) -> None:
        """Start the engine, and again whenever it ends, until this is cancelled.

        Raises what `_live` raises, or ChildProcessError, if the engine ends before it has served once.
        """
        pause_s = 1.0
        while True:
            try:
                reason = await self._live()
            except Exception as error:
                if not self.is_ready.is_set():
                    raise
                logger.exception("engine %d cannot be started or understood", self.index)
                reason = repr(error)
            if not self.is_ready.is_set():
                raise ChildProcessError(f"engine {self.index} has ended before it served: what it wrote stands above")
            logger.error("engine %d has ended (%s), and is started again", self.index, reason or "it served before")
            if reason:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                pause_s = 1.0
            self.num_restarts += 1

    async def _live(self) -> str:
        """One life of the process, until it ends. Returns why it did not serve; empty if it did.

        Raises OSError if it cannot be started, and the error that keeps it from serving for the first time.
        """
        self._refusal = self._link = None
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self.process = start_interpreter(PROGRAM, theirs.fileno(), self._devices)
            make_link = partial(Link, self._take)
            _, self._link = await asyncio.get_running_loop().create_connection(make_link, sock=ours)
            self._link.send(self._orders)
            await self._link.ended
            if self._refusal is not None and not self.is_ready.is_set():
                raise self._refusal
            return "" if self.facts is not None else str(self._refusal or "what it wrote stands above")
        finally:
            self.facts = None
            for request in self._requests.values():
                request.fail(EngineDeadError("the engine has ended before its answer was complete"))
            self._requests.clear()
            if self._watcher is not None:
                self._watcher(None)
            (self._link or ours).close()
            if self.process is not None:
                self.process.kill()  # it owns nothing that needs an end
                await asyncio.to_thread(self.process.wait)

    def _take(self, message: Any) -> None:
        """A message from the process: the error that keeps it from serving, or statistics with facts or news."""
        if isinstance(message, Exception):
            self._refusal = message
            return
        self.stats, content, traces = message
        if isinstance(content, Facts):
            self.facts = content
            self.is_ready.set()
            if self._watch.is_on:
                self._link.send(self._watch)
            if self.pace != Pace():
                self._link.send(self.pace)
            return
        for trace in traces if self._watcher is not None else ():
            self._watcher(trace)
        for news in content:
            if request := self._requests.get(news.key):
                request.take(news)
                if request.is_finished:
                    del self._requests[news.key]
