"""Starts a server in this process, and ends it: a first signal drains it, a second ends it at once."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import uvicorn

from nanovllm.async_llm import AsyncLLM
from nanovllm.server.app import make_app
from nanovllm.server.http_protocol import bounded_protocol
from nanovllm.server.settings import ServerSettings
from nanovllm.server.state import ServerState

logger = logging.getLogger(__name__)
# How long the engine's thread waits for Python's lock while the event loop has work. Python's own 5 ms are a step.
SWITCH_INTERVAL_S = 0.0002
TICK_S = 0.1


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises OSError, naming the address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error


def serve(
    model: str,
    options: dict[str, Any],
    settings: ServerSettings,
    listener: socket.socket,
    ssl: dict[str, str] | None = None,
    ready: Callable[[ServerState], None] | None = None,
) -> None:
    """Make an engine and serve it until SIGINT or SIGTERM.

    Args:
        options: of the engine, see `nanovllm.config.Config`.
        listener: closed at the end.
        ssl: `ssl_keyfile`, `ssl_certfile`, … as `uvicorn.Config` has them.
        ready: called once the engine is made; by default a line on stdout says where it serves.

    Raises: as `AsyncLLM`.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with listener:
        llm = AsyncLLM(model, **options)
        try:
            app = make_app(llm, settings)
            state: ServerState = app.state.server
            if ready is None:
                announce(state.names[0], listener, ssl)
            else:
                ready(state)
            DrainingServer(uvicorn_config(app, settings, ssl), state).run(sockets=[listener])
        finally:
            llm.close()


def uvicorn_config(app: Any, settings: ServerSettings, ssl: dict[str, str] | None) -> uvicorn.Config:
    """How an ASGI application is served."""
    return uvicorn.Config(
        app, http=bounded_protocol(settings.limits), ws="none", lifespan="off", access_log=False,
        log_level="warning", server_header=False, timeout_graceful_shutdown=1, **(ssl or {}),
    )  # fmt: skip


def announce(name: str, listener: socket.socket, ssl: dict[str, str] | None) -> None:
    host, port = listener.getsockname()[:2]
    logger.info("serving %s on %s://%s:%d", name, "https" if ssl else "http", host, port)
    print(f"nano-vLLM serves {name} on {host}:{port}", flush=True)


class Drainable(Protocol):
    """What a server knows of the requests it has let in: `ServerState`, or the front of several engines."""

    settings: ServerSettings
    metrics: Any  # has `see_loop_lag(seconds)`
    num_active: int
    is_draining: bool
    became_idle: asyncio.Event


class DrainingServer(uvicorn.Server):
    """A uvicorn server that finishes its requests before it ends. Meanwhile it refuses new ones with status 503."""

    def __init__(self, config: uvicorn.Config, state: Drainable) -> None:
        super().__init__(config)
        self._state = state
        self._drain: asyncio.Task[None] | None = None
        self._last_tick: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread, between two bytecodes of whatever runs."""
        if self._state.is_draining:
            self.should_exit = self.force_exit = True
            return
        self._state.is_draining = True
        logger.warning("%s: no new requests; %d completions left", signal.Signals(sig).name, self._state.num_active)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this every TICK_S."""
        now = asyncio.get_running_loop().time()
        if self._last_tick is not None:
            self._state.metrics.see_loop_lag(max(0.0, now - self._last_tick - TICK_S))
        self._last_tick = now
        if self._state.is_draining and self._drain is None:
            self._drain = asyncio.ensure_future(self._wait_until_idle())
        return await super().on_tick(counter)

    async def _wait_until_idle(self) -> None:
        try:
            async with asyncio.timeout(self._state.settings.drain_timeout_s):
                while self._state.num_active:
                    self._state.became_idle.clear()
                    await self._state.became_idle.wait()
        except TimeoutError:
            logger.warning("%d completions are cut off", self._state.num_active)
        self.should_exit = True
