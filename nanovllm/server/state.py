"""What the endpoints of a server share: the engine, the settings, and how many requests there are."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from nanovllm.engine.prompts import Prompt
from nanovllm.outputs import RequestOutput
from nanovllm.remote.engines import Engines
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.errors import ApiError
from nanovllm.server.metrics import Metrics
from nanovllm.server.openai_fields import SamplingFields
from nanovllm.server.settings import Limits, ServerSettings

if TYPE_CHECKING:
    from nanovllm.server.page import Page

T = TypeVar("T")


class ServerState:
    """One a server. Only the event loop uses it.

    Attributes:
        num_active: completions that were let in and have not ended.
        is_draining: the server was told to end, and takes no more requests.
        page: what shows the engine; None if it is left out.
    """

    def __init__(self, llm: Engines, settings: ServerSettings) -> None:
        self.llm, self.settings = llm, settings
        self.names = settings.served_model_names or [llm.config.model]
        self.max_model_len = llm.max_model_len
        self.created = self.now()
        self.metrics = Metrics(llm, self.names[0])
        self.num_active = 0
        self.is_draining = False
        self.page: Page | None = None
        self.became_idle = asyncio.Event()
        self._most_active = llm.max_num_seqs + settings.limits.queue

    @property
    def limits(self) -> Limits:
        return self.settings.limits

    @staticmethod
    def now() -> int:
        return int(time.time())

    def check_model(self, name: str | None) -> None:
        """Raises ApiError unless this server has the model. None is its only model."""
        if name is not None and name not in self.names:
            raise ApiError(404, f"The model `{name:.200}` does not exist.", "model", "model_not_found")

    def check_limit(self, name: str, value: int, most: int) -> None:
        """Raises ApiError if a request asks for more than the server allows."""
        if value > most:
            raise ApiError(400, f"{name}: {value} is more than this server allows, {most}", name)

    def check_sampling(self, fields: SamplingFields) -> None:
        """`check_limit` of what a body may ask any number of."""
        self.check_limit("n", fields.n or 1, self.limits.n)
        for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
            self.check_limit(name, getattr(fields, name, None) or 0, self.limits.logprobs)
        self.check_limit("stop", len(fields.stop) if isinstance(fields.stop, list) else 0, self.limits.stop_strings)

    def enter(self, num_completions: int) -> None:
        """Count a request in; `leave` counts it out. Raises ApiError if there are too many, or the server ends."""
        if self.is_draining:
            raise ApiError(503, "the server is about to end", code="draining")
        if self.num_active + num_completions > self._most_active:
            raise ApiError(429, f"{self.num_active} completions run or wait; try again later", code="queue_full")
        self.num_active += num_completions

    def leave(self, num_completions: int) -> None:
        self.num_active -= num_completions
        if self.num_active == 0:
            self.became_idle.set()

    async def run(self, prompt: Prompt, params: SamplingParams, request_id: str) -> AsyncGenerator[RequestOutput]:
        """The outputs of one prompt, measured."""
        request = await self.llm.submit(prompt, params, request_id)
        watch, is_finished = self.metrics.watch(request.engine_index), False
        try:
            while not is_finished:
                output = await request.next_output()
                watch.see(output)
                is_finished = output.finished
                yield output
        finally:
            watch.end()
            self.llm.leave(request)


def state_of(request: Request) -> ServerState:
    return request.app.state.server


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """Wait for an answer, and cancel it when the client leaves. Raises ApiError then, which nobody reads."""
    task = asyncio.ensure_future(answer)
    watch = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(400, "the client has left")
        return task.result()
    finally:
        await cancelled(task, watch)


async def gone(receive: Any) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait until they have ended. An error of one that had ended already is its reader's."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
