"""A request's way through an endpoint: let in, answered whole or as a stream, counted out."""

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from nanovllm.server.sse import stream
from nanovllm.server.state import state_of, unless_gone


class Call(Protocol):
    """A request that is understood, and its answer in the form of an API."""

    num_completions: int

    async def answer(self) -> dict[str, Any]:
        """The whole response."""

    def events(self) -> AsyncGenerator[bytes]:
        """The response as events, each with what is new."""


async def respond_to(request: Request, call: Call, is_stream: bool | None, ping: bytes | None = None) -> Response:
    """Answer a call. Raises ApiError if the server takes no more, and what the call raises before its first event.

    Args:
        ping: sent in a stream after each `ping_interval_s` without an event.
    """
    state = state_of(request)
    state.enter(call.num_completions)
    leave = partial(state.leave, call.num_completions)
    if is_stream:
        return await stream(request, call.events(), leave, ping, state.settings.ping_interval_s)
    try:
        return JSONResponse(await unless_gone(request, call.answer()))
    finally:
        leave()
