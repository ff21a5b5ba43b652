"""What every request passes first: an id, the API key, a body of bounded size, depth and time, and a line in the log.

Plain ASGI, since a middleware of Starlette's own kind would cost each streamed token a task switch.
"""

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from uuid import uuid4

from nanovllm.server.errors import ApiError, as_api_error, error_body, error_headers
from nanovllm.server.settings import ServerSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

access = logging.getLogger("nanovllm.access")
OPEN_PATHS = {"/health", "/ping", "/version", "/metrics"}  # for probes, which have no key
# A browser opens the page's files without a key, and sends it with what they ask for.
KEYED_PAGE_PATHS = {"/page/trace", "/page/state", "/page/control", "/page/scene", "/page/clear"}
_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_BRACKET_OR_STRING = re.compile(rb'[\[{\]}]|"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


class Guard:
    """Wraps the application. Puts `request_id` into the scope's state, and each body into one message."""

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _ID.fullmatch(given) else uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        began, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            try:
                self._check_key(scope, headers)
                replay = await self._read_body(headers, receive)
                await self._app(scope, replay, send_with_id)
            except ApiError as error:
                await _send_error(error, scope["path"], send_with_id)
            except Exception as error:
                if status:  # the response has begun: all that is left is to cut it off
                    raise
                await _send_error(as_api_error(error), scope["path"], send_with_id)
        finally:
            access.info(
                '%s "%s %s" %d %.1f ms %s', scope["client"][0] if scope.get("client") else "-", scope["method"],
                _printable(scope["path"]), status, (time.perf_counter() - began) * 1000, request_id.decode(),
            )  # fmt: skip

    def _check_key(self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes]) -> None:
        """Raises ApiError unless the request has one of the keys. Takes the same time whatever it has."""
        if not self._keys or scope["method"] == "OPTIONS" or is_open(scope["method"], scope["path"]):
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if not any([hmac.compare_digest(key, ours) for ours in self._keys]):
            raise ApiError(401, "Incorrect API key provided", code="invalid_api_key")

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Read the whole body. Raises ApiError if it is too large, too deep or too slow."""
        limits = self._settings.limits
        too_large = ApiError(413, f"the body has more than {limits.body_bytes} bytes")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limits.body_bytes:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client has left before its request was complete")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limits.body_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {limits.body_timeout_s} seconds") from None
        body = b"".join(parts)
        check_depth(body, limits.json_depth)
        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()  # which says when the client has left
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no key."""
    if path in OPEN_PATHS:
        return True
    is_of_page = path == "/" or path.startswith("/page/")
    return method in ("GET", "HEAD") and is_of_page and path.rstrip("/") not in KEYED_PAGE_PATHS


def check_depth(body: bytes, most: int) -> None:
    """Raises ApiError if JSON is nested deeper than `most`: before it is parsed, which would exhaust the stack."""
    depth = 0
    for piece in _BRACKET_OR_STRING.finditer(body):
        first = piece[0][:1]
        if first in b"[{":
            depth += 1
            if depth > most:
                raise ApiError(400, f"the body is nested more than {most} levels deep")
        elif first in b"]}":
            depth -= 1


async def _send_error(error: ApiError, path: str, send: Send) -> None:
    body = json.dumps(error_body(error, path)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not wanted
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _printable(path: str) -> str:
    return path[:200].encode("unicode_escape").decode()
