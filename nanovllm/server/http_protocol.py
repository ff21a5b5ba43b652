"""uvicorn's HTTP protocol with a bound on the headers: so many bytes, and so much time until they are complete."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanovllm.server.settings import Limits


def bounded_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """The class for `uvicorn.Config(http=…)`."""

    class BoundedProtocol(HttpToolsProtocol):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._num_bytes: int | None = 0  # of headers that are not complete yet; None: they are
            self._deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._begin()

        def on_headers_complete(self) -> None:
            self._end()
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._num_bytes is not None and not self.transport.is_closing():
                self._num_bytes += len(data)
                if self._num_bytes > limits.header_bytes:
                    self._refuse(b"431 Request Header Fields Too Large")

        def _begin(self) -> None:
            self._end()
            self._num_bytes = 0
            self._deadline = self.loop.call_later(limits.body_timeout_s, self._refuse, b"408 Request Timeout")

        def _end(self) -> None:
            self._num_bytes = None
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _refuse(self, status: bytes) -> None:
            self._end()
            self.transport.write(b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status)
            self.transport.close()

    return BoundedProtocol
