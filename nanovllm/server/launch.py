"""Starts a server in this process, and ends it: a first signal drains it, a second ends it at once."""

import asyncio
import logging
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from nanovllm.remote.engines import Engines
from nanovllm.server.app import make_app
from nanovllm.server.http_protocol import bounded_protocol
from nanovllm.server.settings import ServerSettings
from nanovllm.server.state import ServerState

logger = logging.getLogger(__name__)
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
    data_parallel_size: int = 1,
) -> None:
    """Start engines and serve them until SIGINT or SIGTERM. When they serve, a line on stdout says where.

    Args:
        options: of each engine, see `nanovllm.config.Config`.
        listener: closed at the end.
        ssl: `ssl_keyfile`, `ssl_certfile`, … as `uvicorn.Config` has them.

    Raises: as `Engines`.
    """
    with listener, asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        engines = Engines(model, options, data_parallel_size, logging.getLogger().getEffectiveLevel())
        runner.run(_serve(engines, settings, listener, ssl or {}))


async def _serve(engines: Engines, settings: ServerSettings, listener: socket.socket, ssl: dict[str, str]) -> None:
    async with engines:
        app = make_app(engines, settings)
        state: ServerState = app.state.server
        announce(state.names[0], listener, bool(ssl))
        await DrainingServer(uvicorn_config(app, settings, ssl), state).serve(sockets=[listener])


def uvicorn_config(app: Any, settings: ServerSettings, ssl: dict[str, str]) -> uvicorn.Config:
    """How an ASGI application is served."""
    return uvicorn.Config(
        app, http=bounded_protocol(settings.limits), ws="none", lifespan="off", access_log=False,
        log_level="warning", server_header=False, timeout_graceful_shutdown=1, **ssl,
    )  # fmt: skip


def announce(name: str, listener: socket.socket, is_https: bool) -> None:
    host, port = listener.getsockname()[:2]
    logger.info("serving %s on %s://%s:%d", name, "https" if is_https else "http", host, port)
    print(f"nano-vLLM serves {name} on {host}:{port}", flush=True)


class DrainingServer(uvicorn.Server):
    """A uvicorn server that finishes its requests before it ends. Meanwhile it refuses new ones with status 503."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
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
        if self._state.page is not None:
            self._state.page.let_go()
        try:
            async with asyncio.timeout(self._state.settings.drain_timeout_s):
                while self._state.num_active:
                    self._state.became_idle.clear()
                    await self._state.became_idle.wait()
        except TimeoutError:
            logger.warning("%d completions are cut off", self._state.num_active)
        if self._state.page is not None:
            self._state.page.feed.end()
        self.should_exit = True
