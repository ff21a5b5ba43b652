"""HTTP to an engine's private socket: one connection a request, so that closing it is what aborts the request."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import httptools

MOST_AT_ONCE = 64 << 10  # bytes of an answer that are read ahead of its reader
# What is between two hops, and what the front writes itself.
_OF_A_HOP = {
    b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"date",
    b"proxy-authenticate", b"proxy-authorization", b"x-request-id",
}  # fmt: skip
Headers = Iterable[tuple[bytes, bytes]]


class EngineLostError(Exception):
    """The engine has ended before its answer has."""


class Connection:
    """A connection to an engine. Make it with `connect`; it serves one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(
        self, method: str, target: bytes, headers: Headers, request_id: str, body: bytes = b""
    ) -> AsyncGenerator[dict[str, Any]]:
        """Send a request, and yield its answer as messages of ASGI, each with what has come since the last.

        Raises EngineLostError if it ends early.
        """
        lines = [b"%b: %b" % header for header in headers if header[0] not in (*_OF_A_HOP, b"content-length")]
        own = b"connection: close\r\nx-request-id: %b\r\ncontent-length: %d" % (request_id.encode(), len(body))
        head = b"\r\n".join([b"%b %b HTTP/1.1" % (method.encode(), target), *lines, own])
        self._writer.write(b"%b\r\n\r\n%b" % (head, body))
        answer = _Answer(is_bodiless=method == "HEAD")
        parser, has_begun = httptools.HttpResponseParser(answer), False
        while not answer.is_over:
            try:
                data = await self._reader.read(MOST_AT_ONCE)
            except ConnectionError as error:
                raise EngineLostError("the engine has ended") from error
            if not data:
                raise EngineLostError("the engine has ended")
            parser.feed_data(data)
            if answer.is_begun and not has_begun:
                has_begun = True
                yield {"type": "http.response.start", "status": parser.get_status_code(), "headers": answer.headers}
            if answer.pieces or answer.is_over:
                body = b"".join(answer.pieces)
                answer.pieces.clear()
                yield {"type": "http.response.body", "body": body, "more_body": not answer.is_over}

    def close(self) -> None:
        """The engine aborts the request, unless it is answered."""
        self._writer.transport.abort()


async def connect(address: str | None) -> Connection | None:
    """None if the engine has ended."""
    if address is None:
        return None
    try:
        return Connection(*await asyncio.open_unix_connection(address, limit=MOST_AT_ONCE))
    except OSError:
        return None


class _Answer:
    """What httptools has found in the bytes so far."""

    def __init__(self, is_bodiless: bool) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.is_begun = self.is_over = False
        self._is_bodiless = is_bodiless

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() not in _OF_A_HOP:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.is_begun, self.is_over = True, self._is_bodiless

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)

    def on_message_complete(self) -> None:
        self.is_over = True
