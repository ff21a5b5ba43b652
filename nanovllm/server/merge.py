"""Several streams read as one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from nanovllm.server.state import cancelled

T = TypeVar("T")


async def merged(streams: list[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """The items of all streams as they come, with their stream's number. Closes all streams at the end.

    Raises the first error of a stream, which ends the others.
    """
    if len(streams) == 1:  # without a task for each item
        async for item in streams[0]:
            yield 0, item
        return
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                yield i, item
                waiting[asyncio.ensure_future(anext(streams[i]))] = i
    finally:
        if waiting:
            await cancelled(*waiting)
        for stream in streams:
            await stream.aclose()
