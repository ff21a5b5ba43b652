"""The client's end of the socket to an engine's process.

After a message it rests as long as its handling took, tasks that it woke included, and then asks for the next. So at
most half of the event loop's time goes to tokens, and a new request is not kept waiting; and under load the news of
several steps come as one, which costs little more than those of one step. A few streams rest for no time at all.
"""

import asyncio
import pickle
from collections.abc import Callable
from typing import Any

from nanovllm.remote.messages import LENGTH, More, packed

LEAST_REST_S = 0.0005  # a shorter rest is not worth a timer
LONGEST_REST_S = 0.05


class Link(asyncio.Protocol):
    """Calls `take` with each message, in the event loop.

    Attributes:
        ended: done when the process has ended, or `close` was called; has the exception that `take` raised.
    """

    def __init__(self, take: Callable[[Any], None]) -> None:
        self._take = take
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def send(self, message: Any) -> None:
        """Never waits. After the end it does nothing."""
        if not self.ended.done():
            self._transport.write(packed(message))

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        began = self._loop.time()
        self._buffer += data
        start = 0
        while len(self._buffer) >= (body := start + LENGTH.size):
            (length,) = LENGTH.unpack_from(self._buffer, start)
            if len(self._buffer) < body + length:
                break
            start = body + length
            try:
                self._take(pickle.loads(memoryview(self._buffer)[body:start]))
            except Exception as error:
                self.ended.set_exception(error)
                return self.close()
        if start:
            del self._buffer[:start]
            self._loop.call_soon(self._rest, began)  # behind the tasks that were woken

    def _rest(self, began: float) -> None:
        rest = min(self._loop.time() - began, LONGEST_REST_S)
        if rest < LEAST_REST_S:
            self.send(More())
        else:
            self._loop.call_later(rest, self.send, More())

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
