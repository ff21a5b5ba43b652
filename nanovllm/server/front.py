"""The front of several engines: one port, which hands each request on to an engine, and its answer back.

It reads requests as a server of one engine does (`guard.py`), parses a body once, to see where it belongs
(`affinity.py`), and looks into no answer. A client that leaves closes the connection to the engine, which aborts.
"""

import asyncio
import json
import socket
from collections.abc import Coroutine, Iterable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.middleware.cors import CORSMiddleware

from nanovllm.server.affinity import beginning, choose
from nanovllm.server.data_parallel import Engine, Engines
from nanovllm.server.engine_client import Connection, EngineLostError, connect
from nanovllm.server.errors import ApiError
from nanovllm.server.guard import Guard, Receive, Send
from nanovllm.server.launch import DrainingServer, announce, uvicorn_config
from nanovllm.server.response_store import engine_of
from nanovllm.server.settings import ServerSettings
from nanovllm.server.sse import error_event
from nanovllm.server.state import cancelled, gone

Scope = MutableMapping[str, Any]
_RESPONSES = "/v1/responses/"


def serve_engines(
    size: int,
    model: str,
    options: dict[str, Any],
    settings: ServerSettings,
    listener: socket.socket,
    ssl: dict[str, str] | None = None,
) -> None:
    """Start `size` engines and serve them on one port until SIGINT or SIGTERM. Arguments are as of `launch.serve`.

    Raises: as `Engines`.
    """
    with listener:
        engines = Engines(size, model, options, settings)
        _FrontServer(Front(engines, settings), engines, listener, ssl).run(sockets=[listener])


class Front:
    """The ASGI application. It stands behind a Guard, and is what a `DrainingServer` drains.

    Attributes:
        num_active: POST requests that were let in and have not ended.
    """

    def __init__(self, engines: Engines, settings: ServerSettings) -> None:
        self.settings = settings
        self.engines, self._facts = engines.all, engines.facts
        self.metrics = FrontMetrics(self.engines)
        self.num_active, self.is_draining, self.became_idle = 0, False, asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, is_post = scope["path"], scope["method"] == "POST"
        if path in ("/health", "/ping") and scope["method"] == "GET":
            return await self._answer_health(send)
        if path == "/metrics" and scope["method"] == "GET":
            return await self._answer_metrics(send)
        body = (await receive())["body"]  # whole: Guard has read it
        if is_post:
            self._let_in()
        try:
            await self._hand_on(scope, body, _json(body) if is_post else None, receive, send)
        finally:
            self.num_active -= is_post
            if self.num_active == 0:
                self.became_idle.set()

    def _let_in(self) -> None:
        """Raises ApiError if there are too many requests, or the server ends. Engines count completions besides."""
        if self.is_draining:
            raise ApiError(503, "the server is about to end", code="draining")
        most = len(self.engines) * self._facts["max_num_seqs"] + self.settings.limits.queue
        if self.num_active >= most:
            raise ApiError(429, f"{self.num_active} requests run or wait; try again later", code="queue_full")
        self.num_active += 1

    async def _hand_on(self, scope: Scope, body: bytes, parsed: Any, receive: Receive, send: Send) -> None:
        """Give a request to the engine where it belongs. Raises ApiError if that does not serve, or ends early."""
        first, holder = beginning(parsed), self._holder(scope["path"], parsed)
        loads = [engine.num_active if engine.address and holder in (None, engine) else None for engine in self.engines]
        while (index := choose(first, loads)) is not None:
            engine = self.engines[index]
            engine.num_active += 1
            try:
                connection = await connect(engine.address)
                if connection is not None:
                    return await _unless_gone(connection, _relay(connection, scope, body, send), receive)
                loads[index] = None  # it has just ended, and its keeper does not know yet
            finally:
                engine.num_active -= 1
        raise ApiError(503, "the engine is being started again", code="engine_lost")

    def _holder(self, path: str, body: Any) -> Engine | None:
        """The engine that has the response which the request names; None if it names none, or none that can be."""
        name = body.get("previous_response_id") if isinstance(body, dict) else None
        if path.startswith(_RESPONSES):
            name = path[len(_RESPONSES) :].partition("/")[0]
        index = engine_of(name) if isinstance(name, str) else None
        return self.engines[index] if index is not None and index < len(self.engines) else None

    async def _answer_health(self, send: Send) -> None:
        if not any(engine.address for engine in self.engines):
            raise ApiError(503, "no engine serves", code="engine_lost")
        await _answer(send, b"")

    async def _answer_metrics(self, send: Send) -> None:
        texts = await asyncio.gather(*(_metrics_of(engine.address) for engine in self.engines))
        await _answer(send, merge_metrics([self.metrics.text(), *texts]))


def guarded(front: Front) -> Any:
    """The front with what stands before it, as `make_app` has it."""
    origins, app = front.settings.allowed_origins, Guard(front, front.settings)
    return CORSMiddleware(app, origins, allow_methods=["*"], allow_headers=["*"]) if origins else app


async def _unless_gone(connection: Connection, relay: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Relay an answer until it ends or the client leaves, and close the connection."""
    task, watch = asyncio.ensure_future(relay), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        await cancelled(task, watch)
        connection.close()


async def _relay(connection: Connection, scope: Scope, body: bytes, send: Send) -> None:
    """Write the engine's answer as it comes. If the engine ends in the middle of a stream, an event says so."""
    query = scope["query_string"]
    target = scope["raw_path"] + (b"?" + query if query else b"")
    start = None
    try:
        async for message in connection.ask(
            scope["method"], target, scope["headers"], scope["state"]["request_id"], body
        ):
            start = start or message
            await send(message)
    except OSError:
        return  # the client has left
    except EngineLostError:
        error = ApiError(503, "the engine has ended before its answer was complete", code="engine_lost")
        if start is None:
            raise error from None
        if dict(start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):
            await send({"type": "http.response.body", "body": error_event(error, scope["path"]), "more_body": False})
        # Any other answer stays incomplete, and uvicorn closes the connection.


async def _metrics_of(address: str | None) -> str:
    """An engine's metrics; empty if it does not serve, or ends meanwhile."""
    connection = await connect(address)
    if connection is None:
        return ""
    try:
        messages = connection.ask("GET", b"/metrics", [(b"host", b"engine")], "metrics")
        return b"".join([message.get("body", b"") async for message in messages]).decode()
    except EngineLostError:
        return ""
    finally:
        connection.close()


def merge_metrics(texts: Iterable[str]) -> bytes:
    """Several expositions as one: Prometheus wants the samples of a metric together, and its HELP and TYPE once."""
    samples_of: dict[str, list[str]] = {}  # by line of HELP or TYPE
    samples: list[str] = []
    for text in texts:
        for line in text.splitlines():
            if line.startswith("#"):
                samples = samples_of.setdefault(line, [])
            else:
                samples.append(line)
    return "".join(f"{line}\n" for head, samples in samples_of.items() for line in (head, *samples)).encode()


class FrontMetrics:
    """What the front itself counts."""

    def __init__(self, engines: list[Engine]) -> None:
        self._engines = engines
        self._registry = CollectorRegistry()
        self._registry.register(self)
        lag = Histogram("nanovllm:event_loop_lag_seconds", "How late timers are.", ["engine"], registry=self._registry)
        self.see_loop_lag = lag.labels("front").observe

    def collect(self) -> Iterable[Metric]:
        """`prometheus_client` calls this."""
        serves = GaugeMetricFamily("nanovllm:engine_up", "Whether the engine serves.", labels=["engine"])
        restarts = CounterMetricFamily("nanovllm:engine_restarts", "How often it was started again.", labels=["engine"])
        for engine in self._engines:
            serves.add_metric([str(engine.index)], engine.address is not None)
            restarts.add_metric([str(engine.index)], engine.num_restarts)
        return [serves, restarts]

    def text(self) -> str:
        return generate_latest(self._registry).decode()


class _FrontServer(DrainingServer):
    """Serves once all engines do, and ends them when its own requests have ended."""

    def __init__(self, front: Front, engines: Engines, listener: socket.socket, ssl: dict[str, str] | None) -> None:
        super().__init__(uvicorn_config(guarded(front), front.settings, ssl), front)
        self._engines, self._listener, self._ssl = engines, listener, ssl

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        async with self._engines:
            announce(self._engines.facts["name"], self._listener, self._ssl)
            await super().serve(sockets)
            self._engines.end_at_once = self.force_exit


async def _answer(send: Send, body: bytes) -> None:
    headers = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _json(body: bytes) -> Any:
    """What the body says; None if it is no JSON: then any engine says so to the client."""
    try:
        return json.loads(body)
    except ValueError:
        return None
