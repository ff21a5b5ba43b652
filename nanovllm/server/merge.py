"""Several streams read as one."""

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

from nanovllm.server.state import cancelled

T = TypeVar("T")


def merged(streams: list[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """The items of all streams as they come. A single stream is itself, which saves a task for each item.

    The first error of a stream is raised, and ends the others. At the end all streams are closed.
    """
    return streams[0] if len(streams) == 1 else _merged(streams)


async def _merged(streams: list[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    waiting = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                yield item
                waiting[asyncio.ensure_future(anext(stream))] = stream
    finally:
        if waiting:
            await cancelled(*waiting)
        for stream in streams:
            await stream.aclose()
