"""The front of several engines, in this process: what it answers without an engine, and how engines are started."""

import asyncio
import json
import os
import signal
import socket
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.server import data_parallel, engine_process
from nanovllm.server.data_parallel import Engine, Engines, devices_of_engines, private_listener
from nanovllm.server.front import Front, guarded, merge_metrics
from nanovllm.server.response_store import engine_of, make_response_id
from nanovllm.server.settings import Limits, ServerSettings


def front_of(*engines: Engine) -> Front:
    settings = ServerSettings(limits=Limits(queue=1, body_bytes=1000))
    return Front(SimpleNamespace(all=list(engines), facts={"max_num_seqs": 2}), settings)  # type: ignore[arg-type]


async def send(front: Front, method: str, path: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded(front)), base_url="http://front") as client:
        return await client.request(method, path, **options)


def ask(method: str, path: str, prepare: Any = lambda front: None, **options: Any) -> httpx.Response:
    """The answer of a front with two engines, neither of which serves."""
    front = front_of(Engine(0), Engine(1))
    prepare(front)
    return asyncio.run(send(front, method, path, **options))


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'f\r\ndata: {"a":1}\n\n\r\n'


class FakeEngine:
    """Answers each request with the same bytes, and then ends.

        async with FakeEngine(answer) as address:

    Attributes:
        seen: the requests' bytes.
    """

    def __init__(self, answer: bytes) -> None:
        self.seen, self._answer = b"", answer

    async def __aenter__(self) -> str:
        listener, self._handle = private_listener()
        self._server = await asyncio.start_unix_server(self._serve, sock=listener)
        return f"/proc/self/fd/{self._handle}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen += await reader.read(1 << 16)
        writer.write(self._answer)
        writer.close()

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        os.close(self._handle)


def ask_engine(engine: FakeEngine, method: str, path: str, **options: Any) -> httpx.Response:
    """The answer of a front with this engine, beside one that has ended without the front's knowledge."""

    async def call() -> httpx.Response:
        async with engine as address:
            front = front_of(Engine(0, "/nobody/listens/here"), Engine(1, address))
            answer = await send(front, method, path, **options)
            assert front.num_active == 0 and [engine.num_active for engine in front.engines] == [0, 0]
            return answer

    return asyncio.run(call())


class TestAnEngine:
    def test_gets_the_request_as_it_came(self) -> None:
        engine = FakeEngine(b"HTTP/1.1 201 Made\r\nx-a: b\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi")
        answer = ask_engine(engine, "PUT", "/a%2Fb?c=d%20e", content=b"body", headers={"x-request-id": "me", "te": "x"})
        assert (answer.status_code, answer.content, answer.headers["x-a"]) == (201, b"hi", "b")
        assert "connection" not in answer.headers
        head, _, body = engine.seen.partition(b"\r\n\r\n")
        assert head.startswith(b"PUT /a%2Fb?c=d%20e HTTP/1.1\r\n") and body == b"body"
        lines = head.lower().split(b"\r\n")[1:]
        assert {b"content-length: 4", b"x-request-id: me", b"host: front", b"connection: close"} <= set(lines)
        assert len({line.partition(b":")[0] for line in lines}) == len(lines) and not any(b"te:" in li for li in lines)

    @pytest.mark.parametrize(
        ("path", "name"),
        [("/v1/chat/completions", b""), ("/v1/messages", b"event: error\n"), ("/v1/responses", b"event: error\n")],
    )
    def test_that_ends_in_a_stream_leaves_an_error_event(self, path: str, name: bytes) -> None:
        answer = ask_engine(FakeEngine(STREAM + EVENT), "POST", path, json={})
        first, last = answer.content.strip().split(b"\n\n")
        assert first == b'data: {"a":1}' and last.startswith(name + b"data: ")
        assert "engine has ended" in json.loads(last.removeprefix(name + b"data: "))["error"]["message"]

    @pytest.mark.parametrize("answer", [b"", STREAM[:30]])
    def test_that_ends_before_its_answer_is_a_503(self, answer: bytes) -> None:
        answer = ask_engine(FakeEngine(answer), "POST", "/v1/completions", json={})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_lost"

    def test_that_ends_in_an_answer_without_events_leaves_it_incomplete(self) -> None:
        half = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{1"
        messages: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def keep(message: Any) -> None:
            messages.append(message)

        async def call() -> None:
            async with FakeEngine(half) as address:
                scope = {
                    "type": "http",
                    "method": "GET",
                    "path": "/x",
                    "raw_path": b"/x",
                    "query_string": b"",
                    "headers": [],
                }
                receives = iter([receive, asyncio.Event().wait])
                await guarded(front_of(Engine(0, address)))(scope, lambda: next(receives)(), keep)

        asyncio.run(call())  # uvicorn then closes the connection
        assert [message["type"] for message in messages] == ["http.response.start", "http.response.body"]
        assert messages[1]["body"] == b"{1" and messages[1]["more_body"]


class TestWithoutAnEngine:
    def test_health_is_503_and_metrics_say_which(self) -> None:
        assert ask("GET", "/health").status_code == 503
        assert 'nanovllm:engine_up{engine="1"} 0.0' in ask("GET", "/metrics").text

    def test_a_request_gets_503_in_its_apis_shape(self) -> None:
        answer = ask("POST", "/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_lost"
        assert answer.headers["retry-after"]
        assert ask("POST", "/v1/messages", json={}).json()["error"]["type"] == "overloaded_error"

    def test_the_bounds_are_those_of_the_settings_in_all(self) -> None:
        assert ask("POST", "/v1/completions", content=b" " * 1001).status_code == 413
        for active, status in ((4, 503), (5, 429)):  # 2 engines with max_num_seqs=2, and queue=1
            answer = ask("POST", "/v1/completions", lambda front: setattr(front, "num_active", active), json={})  # noqa: B023
            assert answer.status_code == status

    def test_a_front_that_drains_lets_nothing_in(self) -> None:
        answer = ask("POST", "/v1/completions", lambda front: setattr(front, "is_draining", True), json={})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"


def test_merged_metrics_have_each_metric_once_with_all_samples() -> None:
    texts = [
        f'# HELP a A.\n# TYPE a gauge\na{{engine="{i}"}} {i}\n# HELP b B.\n# TYPE b gauge\nb{{engine="{i}"}} 5\n'
        for i in (0, 1)
    ]  # noqa: E501
    found = list(text_string_to_metric_families(merge_metrics([*texts, ""]).decode()))
    assert [family.name for family in found] == ["a", "b"]
    assert [[sample.value for sample in family.samples] for family in found] == [[0, 1], [5, 5]]


@pytest.mark.parametrize("index", [0, 1, 255])
def test_the_id_of_a_response_says_which_engine_has_it(index: int) -> None:
    assert engine_of(make_response_id(index)) == index


@pytest.mark.parametrize("name", ["", "resp_1", "resp_" + "g" * 32, "msg_" + "0" * 32])
def test_an_id_that_no_engine_made_has_no_engine(name: str) -> None:
    assert engine_of(name) is None


class TestDevices:
    def test_each_engine_has_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert devices_of_engines(2, {"tensor_parallel_size": 2}) == [
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            {"CUDA_VISIBLE_DEVICES": "2,3"},
        ]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-5a,3,1")
        assert [env["CUDA_VISIBLE_DEVICES"] for env in devices_of_engines(3, {})] == ["7", "GPU-5a", "3"]

    def test_too_few_are_refused_with_their_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        with pytest.raises(ValueError, match="data_parallel_size=2 with tensor_parallel_size=2 needs 4 devices; 3 are"):
            devices_of_engines(2, {"tensor_parallel_size": 2})

    def test_a_cpu_has_none(self) -> None:
        assert devices_of_engines(2, {"device": "cpu"}) == [{}, {}]


def test_engines_that_do_not_start_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel, "PROGRAM", "raise SystemExit({parent} * 0 + 3)")
    engines = Engines(2, "model", {"device": "cpu"}, ServerSettings())

    async def start() -> None:
        async with engines:
            raise AssertionError("none serves")

    with pytest.raises(ChildProcessError, match=r"engine \d has ended before all engines served"):
        asyncio.run(start())
    assert all(engine.process.returncode is not None for engine in engines.all)


def test_an_engine_that_has_failed_for_good_ends_its_process_by_draining(monkeypatch: pytest.MonkeyPatch) -> None:
    state, sent = SimpleNamespace(llm=SimpleNamespace(errored=True), is_draining=False), []
    front, lifeline = socket.socketpair()

    def kill(pid: int, signum: int) -> None:
        sent.append(signum)
        state.is_draining = True
        front.close()

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(engine_process, "TICK_S", 0.01)
    monkeypatch.setattr(engine_process, "os", SimpleNamespace(kill=kill, getpid=lambda: 1, _exit=end))
    with lifeline, pytest.raises(SystemExit, match="1"):  # once the front has ended
        engine_process.watch(lifeline, state)  # type: ignore[arg-type]
    assert sent == [signal.SIGTERM]


@pytest.mark.parametrize("size", [0, 1, 257])
def test_a_number_of_engines_that_is_out_of_bounds_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"data_parallel_size={size} must be"):
        Engines(size, "model", {"device": "cpu"}, ServerSettings())
