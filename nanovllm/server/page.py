"""The page that shows the engine at work: its files, its live trace, and with --teach the levers that steer the engine.

The page itself is in `server/page/`, static files without a build step. What it shows is made by `server/feed.py`.
"""

import asyncio
import logging
import mimetypes
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import Field

from nanovllm.errors import EngineDeadError
from nanovllm.remote.engine import RemoteEngine
from nanovllm.remote.messages import Pace
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.server.errors import ApiError
from nanovllm.server.feed import Feed
from nanovllm.server.openai_fields import Fields
from nanovllm.server.sse import stream
from nanovllm.server.state import ServerState, state_of
from nanovllm.trace.scenes import TEXT, SceneRequest, scene

logger = logging.getLogger(__name__)
FILES = Path(__file__).parent / "page"
PING = b": ping\n\n"
LONGEST_DELAY_MS = 10_000
router = APIRouter(include_in_schema=False)


class Page:
    """One a server: its feed, and the requests of its scenes. Of one event loop."""

    def __init__(self, state: ServerState) -> None:
        self.state, self.has_levers = state, state.settings.teach
        self.engine: RemoteEngine = state.llm.all[0]
        self.feed = Feed(self.engine, state.names[0], self.has_levers, len(state.llm.all))
        self._running: set[asyncio.Task[None]] = set()
        self._num_started = 0

    def report(self) -> dict[str, Any]:
        pace = self.engine.pace
        return {
            "teach": self.has_levers,
            "paused": pace.is_paused,
            "delay_ms": round(1000 * pace.delay_s),
            "model": self.state.names[0],
            "viewers": self.feed.num_viewers,
            "engines": len(self.state.llm.all),
        }

    def require_levers(self) -> None:
        """Raises ApiError on an engine that was not started for it."""
        if not self.has_levers:
            raise ApiError(403, "this engine serves others, too: `nanovllm serve --teach` starts one to play with")

    async def play(self, name: str) -> int:
        """Start the requests of a scene. Returns their number. Raises as `scene` and `ServerState.enter`."""
        text_ids = await self.state.llm.encode_prompt(TEXT)
        if self.engine.facts is None:
            raise EngineDeadError("the engine does not serve")
        requests = scene(name, text_ids, self.engine.facts.shape)
        self.state.enter(len(requests))
        for request in requests:
            self._num_started += 1
            task = asyncio.ensure_future(self._run(request, f"scene-{self._num_started}"))
            self._running.add(task)
            task.add_done_callback(self._end)
        return len(requests)

    async def _run(self, request: SceneRequest, request_id: str) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        async for _ in self.state.run({"prompt_token_ids": request.token_ids}, params, request_id):
            pass

    def _end(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self.state.leave(1)
        if not task.cancelled() and (error := task.exception()):
            logger.warning("a request of a scene has failed: %s", error)

    def let_go(self) -> None:
        """Let the engine run at its own pace: a paused one would never come to its end."""
        self.engine.set_pace(Pace())

    async def clear(self) -> None:
        """Abort the requests of all scenes, and empty the prefix cache."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self.engine.forget_cache()


def add_page(app: FastAPI, state: ServerState) -> None:
    """Give the application its page at /, below /page its files and endpoints."""
    mimetypes.add_type("text/javascript", ".js")  # a system's own table may call it something that browsers refuse
    state.page = Page(state)
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=FILES))


def _page(request: Request) -> Page:
    return state_of(request).page


@router.get("/")
async def index() -> FileResponse:
    return FileResponse(FILES / "index.html")


@router.get("/page/trace")
async def trace(request: Request) -> Response:
    """The trace from now on, as server-sent events, until the viewer leaves."""
    feed = _page(request).feed
    viewer = feed.join()
    return await stream(request, feed.events(viewer), partial(feed.leave, viewer), PING)


@router.get("/page/state")
async def report(request: Request) -> dict[str, Any]:
    return _page(request).report()


class ControlFields(Fields):
    """The body of /page/control."""

    action: Literal["pause", "resume", "step", "slow"]
    delay_ms: int = Field(default=0, ge=0, le=LONGEST_DELAY_MS)  # from step to step; only "slow" has one


@router.post("/page/control")
async def control(fields: ControlFields, request: Request) -> dict[str, Any]:
    """Pause the engine; let it go on; let it do one step, and pause; set the time between steps."""
    page = _page(request)
    page.require_levers()
    pace = page.engine.pace
    match fields.action:
        case "pause":
            pace = pace._replace(is_paused=True)
        case "resume":
            pace = pace._replace(is_paused=False)
        case "step":
            pace = pace._replace(is_paused=True, num_steps=1)
        case "slow":
            pace = pace._replace(delay_s=fields.delay_ms / 1000)
    page.engine.set_pace(pace)
    return page.report()


class SceneFields(Fields):
    """The body of /page/scene."""

    scene: str


@router.post("/page/scene")
async def play(fields: SceneFields, request: Request) -> dict[str, int]:
    """Start the requests of a scene."""
    page = _page(request)
    page.require_levers()
    return {"requests": await page.play(fields.scene)}


@router.post("/page/clear")
async def clear(request: Request) -> dict[str, Any]:
    """Abort all scenes, and empty the prefix cache."""
    page = _page(request)
    page.require_levers()
    await page.clear()
    return page.report()
