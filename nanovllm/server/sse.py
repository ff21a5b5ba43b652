"""Server-sent events: a response that is written as the answer comes, and ends the request when its client leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from pydantic_core import PydanticSerializationError, to_json
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.server.errors import encode_error
from nanovllm.server.state import cancelled, gone, unless_gone

DONE = b"data: [DONE]\n\n"
FIRST_EVENT_S = 5.0  # an error before this has a status of its own; later it comes as an event of the stream


def _encode(data: Any) -> bytes:
    try:
        return to_json(data)
    except PydanticSerializationError:  # half a surrogate pair, which a request's JSON may spell and an answer repeats
        return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(data: Any, name: str | None = None) -> bytes:
    """An event with JSON as its data."""
    text = _encode(data)
    return b"data: %b\n\n" % text if name is None else b"event: %b\ndata: %b\n\n" % (name.encode(), text)


def error_event(error: BaseException, path: str) -> bytes:
    """An error that comes after a stream has begun, as the API of this path tells of it."""
    name = b"event: error\n" if path.startswith(("/v1/messages", "/v1/responses")) else b""
    return b"%bdata: %b\n\n" % (name, encode_error(error, path))


class Chunks:
    """Events of OpenAI's streams, which differ in their choices: the rest is encoded once."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body
        self._head = b'data: %b,"choices":[' % _encode(body)[:-1]

    def of(self, choice: dict[str, Any], usage: dict[str, Any]) -> bytes:
        """An event with one choice. `usage`: what `Usage.of_chunk` gives."""
        if usage:
            return event(self._body | {"choices": [choice]} | usage)
        return b"%b%b]}\n\n" % (self._head, _encode(choice))

    def end(self, usage: dict[str, Any]) -> bytes:
        """The last event, with the whole usage and without choices."""
        return event(self._body | {"choices": [], "usage": usage})


async def stream(
    request: Request,
    events: AsyncGenerator[bytes],
    end: Callable[[], None],
    ping: bytes | None = None,
    ping_s: float = 10.0,
) -> "EventStream":
    """The response, once the first event is there. Raises what `events` raises before it.

    Args:
        events: whole events; it is closed at the end, however that comes. end: called then, once.
        ping: sent every `ping_s` seconds, unless there was an event meanwhile.
    """
    first = asyncio.ensure_future(anext(events))
    try:
        await unless_gone(request, asyncio.wait({first}, timeout=FIRST_EVENT_S))
        if first.done():
            first.result()
    except BaseException:
        await cancelled(first)
        await events.aclose()
        end()
        raise
    return EventStream(first, events, end, ping, ping_s)


class EventStream(Response):
    """Writes the events. If the client leaves, it closes their generator, which aborts the request."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: "asyncio.Future[bytes]",
        events: AsyncGenerator[bytes],
        end: Callable[[], None],
        ping: bytes | None,
        ping_s: float,
    ) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._first, self._events, self._end, self._ping, self._ping_s = first, events, end, ping, ping_s
        self._num_sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        write = asyncio.ensure_future(self._write(scope["path"], send))
        watch = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({write, watch}, return_when=asyncio.FIRST_COMPLETED)
            if write.done():
                write.result()
        finally:
            await cancelled(write, watch, self._first)
            await self._events.aclose()
            self._end()

    async def _write(self, path: str, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pings = asyncio.ensure_future(self._write_pings(send))
        try:
            one = await self._first
            while True:  # without a generator for the first and the others, which costs something for each token
                await send({"type": "http.response.body", "body": one, "more_body": True})
                self._num_sent += 1
                one = await anext(self._events)
        except StopAsyncIteration:
            pass
        except OSError:
            return  # the client has left
        except Exception as error:
            await send({"type": "http.response.body", "body": error_event(error, path), "more_body": True})
        finally:
            await cancelled(pings)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write_pings(self, send: Any) -> None:
        """Beside the events, so that no token needs a task or a timer of its own."""
        while self._ping is not None:
            num_sent = self._num_sent
            await asyncio.sleep(self._ping_s)
            if num_sent == self._num_sent:
                try:
                    await send({"type": "http.response.body", "body": self._ping, "more_body": True})
                except OSError:
                    return  # the client has left
