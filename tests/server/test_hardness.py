"""Whatever a client sends, or stops to send, it gets an error of its own, and the server goes on with the others."""

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn
from leftovers import are_gone, children_of
from server_process import KEY, Server

from nanovllm import demo_model
from nanovllm.server.launch import DrainingServer, listen
from nanovllm.server.settings import ServerSettings

ENDLESS = {"model": "demo", "prompt": "x", "max_tokens": 2000, "ignore_eos": True, "temperature": 0, "stream": True}
HEAD = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"


def raw(server: Server, data: bytes) -> bytes:
    """What comes back for these bytes, until the server closes or has answered."""
    with server.connect() as connection:
        connection.sendall(data)
        connection.settimeout(10)
        return connection.recv(4096)


def status(answer: bytes) -> int:
    return int(answer.split()[1])


class TestGarbage:
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"nonsense",
            b"[]",
            b'"text"',
            b"null",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"\x00" * 100,
            b"\xff\xfe{}",
            b'{"model": "demo", "prompt": "\\ud800"}',
            b'{"model": "demo", "prompt": {"a": 1}}',
            b'{"model": "demo", "prompt": [1, "a"]}',
            b'{"model": "demo", "prompt": "x", "temperature": NaN}',
            b'{"model": "demo", "prompt": "x", "max_tokens": 1e400}',
            b'{"model": "demo", "prompt": "x", "seed": 99999999999999999999999}',
            b'{"model": "demo", "prompt": "x", "stop": [""]}',
            b'{"model": 5, "prompt": "x"}',
            b'{"model": "demo", "prompt": "x", "logit_bias": {"a": 1}}',
            b'{"model": "demo", "prompt": [-1]}',
            b'{"model": "demo", "prompt": "x", "prompt_logprobs": 100000}',
        ],
        ids=lambda body: repr(body[:40]),
    )
    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
    def test_is_a_client_error_in_the_apis_shape(self, http: httpx.Client, path: str, body: bytes) -> None:
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["message"] and "Traceback" not in answer.text

    @pytest.mark.parametrize("headers", [{}, {"content-type": "application/x-www-form-urlencoded"}])
    def test_without_jsons_content_type_is_told_so(self, http: httpx.Client, headers: dict[str, str]) -> None:
        for path in ("/v1/completions", "/v1/messages"):
            answer = http.post(path, content=b'{"model": "demo", "prompt": "x"}', headers=headers)
            assert answer.status_code == 415 and "content-type: application/json" in answer.json()["error"]["message"]

    def test_nul_and_odd_characters_are_text_like_any_other(self, http: httpx.Client) -> None:
        body = {"model": "demo", "prompt": "a\0b\u2028\U0001f600", "max_tokens": 1}
        assert http.post("/v1/completions", json=body).status_code == 200

    def test_unknown_paths_and_methods(self, http: httpx.Client) -> None:
        assert http.get("/v1/nothing").status_code == 404 and "error" in http.get("/v1/nothing").json()
        assert http.get("/v1/completions").status_code == 405
        assert http.request("DELETE", "/v1/models").status_code == 405

    @pytest.mark.parametrize(
        "data",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01",  # TLS to a plain port
            b"GET\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\ncontent-length: many\r\n\r\n",
            b"GET /%ff%00 HTTP/1.1\r\nhost: x\r\n\r\n",
            b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        ],
    )
    def test_no_http_is_a_client_error(self, server: Server, data: bytes) -> None:
        assert 400 <= status(raw(server, data)) < 500

    def test_random_bytes(self, server: Server) -> None:
        rng = random.Random(0)
        for _ in range(30):
            with server.connect() as connection:
                connection.sendall(rng.randbytes(rng.randint(1, 3000)))
        assert httpx.get(f"{server.url}/health").status_code == 200


class TestBounds:
    def test_a_huge_body_is_refused_before_it_is_read(self, server: Server) -> None:
        assert status(raw(server, f"{HEAD}content-length: 9999999999\r\n\r\n".encode())) == 413

    def test_each_holds_and_a_second_signal_ends_at_once(self, make_server: Callable[..., Server]) -> None:
        limits = {"body_bytes": 10_000, "body_timeout_s": 1, "header_bytes": 5000, "queue": 1}
        server = make_server(options={"max_num_seqs": 1}, limits=limits)
        self._bodies_without_a_length_end(server)
        self._half_requests_end(server)
        self._endless_headers_end(server)
        self._a_full_queue_says_when_to_come_again(server)
        stream = iter(server.client().completions.create(**as_openai(ENDLESS)))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0 and are_gone([server.process.pid])

    def _bodies_without_a_length_end(self, server: Server) -> None:
        with server.connect() as connection:
            connection.sendall(f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode())
            for _ in range(11):
                connection.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
            assert status(connection.recv(4096)) == 413

    def _half_requests_end(self, server: Server) -> None:
        """Headers or a body that stop end after the time limit, several at once."""
        with ExitStack() as open_ones:
            began, connections = time.monotonic(), []
            for sent in ("", HEAD, f"{HEAD}content-length: 100\r\n\r\n{{"):
                connections.append(open_ones.enter_context(server.connect()))
                connections[-1].sendall(sent.encode())
                connections[-1].settimeout(10)
            for connection in connections:
                assert status(connection.recv(4096)) == 408
                assert 0.8 < time.monotonic() - began < 5

    def _endless_headers_end(self, server: Server) -> None:
        for header in (b"a: b\r\n", b"a" * 100):
            with server.connect() as connection:
                connection.settimeout(10)
                connection.sendall(b"GET /health HTTP/1.1\r\n")
                with pytest.raises(OSError):
                    for _ in range(10_000):
                        connection.sendall(header)
                    raise AssertionError("it takes headers without end")
        assert httpx.get(f"{server.url}/health").status_code == 200

    def _a_full_queue_says_when_to_come_again(self, server: Server) -> None:
        streams = [server.client().completions.create(**as_openai(ENDLESS)) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            server.client().completions.create(model="demo", prompt="x")
        assert caught.value.response.headers["retry-after"]
        for stream in streams:
            stream.close()
        assert server.is_idle()
        assert server.client().completions.create(model="demo", prompt="x", max_tokens=1).choices


class TestClientsThatLeave:
    @pytest.mark.parametrize("stream", [False, True])
    def test_take_their_requests_with_them(self, server: Server, stream: bool) -> None:
        body = json.dumps(ENDLESS | {"stream": stream, "n": 2, "temperature": 1})
        with server.connect() as connection:
            connection.sendall(f"{HEAD}content-length: {len(body)}\r\n\r\n{body}".encode())
            wait_for(lambda: server.metric("vllm:num_requests_running") == 2)
            if stream:
                assert connection.recv(100)
        assert server.is_idle(), "it computes for nobody"

    def test_before_the_request_is_complete(self, server: Server) -> None:
        for part in ("", HEAD[:30], HEAD, f"{HEAD}content-length: 50\r\n\r\n{{"):
            with server.connect() as connection:
                connection.sendall(part.encode())
        assert server.is_idle()

    def test_a_reader_that_stops_holds_up_nobody(self, server: Server, client: openai.OpenAI) -> None:
        body = json.dumps(ENDLESS)
        with server.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(f"{HEAD}content-length: {len(body)}\r\n\r\n{body}".encode())
            for _ in range(5):
                assert client.completions.create(model="demo", prompt="x", max_tokens=5).choices
        assert server.is_idle()


class TestEnd:
    def test_a_signal_drains_and_refuses(self, make_server: Callable[..., Server]) -> None:
        server = make_server()
        stream = iter(server.client().completions.create(**as_openai(ENDLESS | {"max_tokens": 150})))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.InternalServerError) as caught:
            wait_for(lambda: not server.client().completions.create(model="demo", prompt="x", max_tokens=1))
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length", "it must finish what it has begun"
        assert server.process.wait(10) == 0

    def test_a_drain_has_an_end(self) -> None:
        state = SimpleNamespace(
            is_draining=False, num_active=3, became_idle=asyncio.Event(), settings=ServerSettings(drain_timeout_s=0.05),
            page=None, metrics=SimpleNamespace(see_loop_lag=lambda lag: None),
        )  # fmt: skip
        server = DrainingServer(uvicorn.Config(lambda: None), state)

        async def drain() -> None:
            server.handle_exit(signal.SIGINT, None)
            while not await server.on_tick(1):
                await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(drain(), 5))

    def test_a_port_in_use_is_named(self, server: Server) -> None:
        with pytest.raises(OSError, match=str(server.port)):
            listen("127.0.0.1", server.port)


def test_many_clients_at_once_each_get_their_own_answer(server: Server) -> None:
    """Half of them leave. The others' answers are those that they would get alone."""
    client = server.client(max_retries=5)
    alone = {i: ask(client, i) for i in range(8)}
    wrong: list[int] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(6):
            i = rng.randrange(8)
            if rng.random() < 0.5:
                with client.completions.create(**question(i), stream=True) as stream:
                    for _, _ in zip(range(rng.randint(0, 5)), stream, strict=False):
                        pass
            elif ask(client, i) != alone[i]:
                wrong.append(i)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and server.is_idle()


def question(i: int) -> dict:
    return {"model": "demo", "prompt": f"def f{i}(", "max_tokens": 16, "seed": i, "extra_body": {"ignore_eos": True}}


def ask(client: openai.OpenAI, i: int) -> str:
    chunks = client.completions.create(**question(i), stream=True)
    return "".join(chunk.choices[0].text for chunk in chunks)


def as_openai(body: dict) -> dict:
    return {**{k: v for k, v in body.items() if k != "ignore_eos"}, "extra_body": {"ignore_eos": True}}


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_during_the_start_ends_it_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nanovllm", "serve", str(demo_model()), "--port", "0", "--device", "cpu"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while not (engines := children_of(process.pid, "remote.process")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and are_gone(list(engines))
    assert "Traceback" not in (tmp_path / "log").read_text()
