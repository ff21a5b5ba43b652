"""A server as the page expects it, over the scheduler of `sample_trace.py`, in a thread of its own."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sample_trace
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import nanovllm

PAGE = Path(nanovllm.__file__).parent / "server" / "page"
STEP_S = 0.005  # of a free-running engine
ANSWER = ["A block ", "holds ", "keys ", "and ", "values. ", "你好"]


class Stub:
    """What the page has asked for is in `posts`; `viewers` is the number of open feeds."""

    def __init__(self, teach: bool = True, key: str = "", num_blocks: int = 40) -> None:
        self.teach, self.key, self.num_blocks = teach, key, num_blocks
        self.url, self.viewers, self.paused, self.delay_ms = "", 0, False, 0
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.engine = sample_trace.Engine(num_blocks)
        self.queues: list[asyncio.Queue[dict[str, Any]]] = []

    def tell(self, *objects: dict[str, Any]) -> None:
        for queue in self.queues:
            for item in objects:
                queue.put_nowait(item)

    def app(self) -> Starlette:
        routes = [
            Route("/", lambda _: FileResponse(PAGE / "index.html")),
            Route("/page/trace", self.trace),
            Route("/page/state", self.state),
            Route("/page/control", self.control, methods=["POST"]),
            Route("/page/scene", self.scene, methods=["POST"]),
            Route("/page/clear", self.clear, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/end", self.end),
            Route("/start", self.start),
            Route("/favicon.ico", lambda _: Response(status_code=204)),
            Mount("/page", StaticFiles(directory=PAGE)),
        ]
        return Starlette(routes=routes)

    def refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "wrong API key"}}, status_code=401)
        return None

    def state_now(self) -> JSONResponse:
        state = {"teach": self.teach, "paused": self.paused, "delay_ms": self.delay_ms}
        return JSONResponse({**state, "model": "demo", "viewers": self.viewers})

    async def state(self, request: Request) -> Response:
        return self.refusal(request) or self.state_now()

    async def trace(self, request: Request) -> Response:
        return self.refusal(request) or StreamingResponse(self.feed(), media_type="text/event-stream")

    async def feed(self) -> AsyncIterator[str]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.queues.append(queue)
        self.viewers += 1
        try:
            yield f"data: {json.dumps(sample_trace.head(self.num_blocks))}\n\n: a ping\n\n"
            while True:
                yield f"data: {json.dumps(await queue.get(), ensure_ascii=False)}\n\n"
        finally:
            self.queues.remove(queue)
            self.viewers -= 1

    async def control(self, request: Request) -> Response:
        body = await request.json()
        self.posts.append(("control", body))
        if body["action"] == "step":
            self.paused = True
            self.tell(self.engine.step())
        elif body["action"] == "slow":
            self.delay_ms = body["delay_ms"]
        else:
            self.paused = body["action"] == "pause"
        return self.state_now()

    async def scene(self, request: Request) -> Response:
        self.posts.append(("scene", await request.json()))
        self.tell(*[self.engine.add(60, 20, prefix=48) for _ in range(10)])
        self.tell(self.engine.step(full=True))
        return JSONResponse({"requests": 10})

    async def clear(self, request: Request) -> Response:
        self.posts.append(("clear", {}))
        return JSONResponse({"error": {"message": "nothing to clear"}}, status_code=400)

    async def end(self, request: Request) -> Response:
        """The engine ends, as far as viewers see."""
        self.tell({"kind": "lost"})
        return Response(status_code=204)

    async def start(self, request: Request) -> Response:
        """Another engine comes in its place."""
        self.engine = sample_trace.Engine(self.num_blocks)
        self.tell(sample_trace.head(self.num_blocks, restarts=1), self.engine.step(full=True))
        return Response(status_code=204)

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.posts.append(("chat", body))
        return self.refusal(request) or StreamingResponse(self.answer(body), media_type="text/event-stream")

    async def answer(self, body: dict[str, Any]) -> AsyncIterator[str]:
        prompt = body["messages"][-1]["content"]
        self.tell(self.engine.add(40, len(ANSWER), prompt=f"<user>{prompt}"))
        for piece in ANSWER:
            self.tell(self.engine.step())
            yield f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n"
            await asyncio.sleep(STEP_S)
        self.tell(self.engine.step())
        yield "data: [DONE]\n\n"


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """Serves on a free port of this machine until the block ends."""
    config = uvicorn.Config(stub.app(), port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the stub server did not start")
        stub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        yield stub
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
