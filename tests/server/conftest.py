"""A real server process, on the small model of the repository, and the clients that its users have."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_process import KEY, TEMPLATE, Server

from nanovllm import demo_model


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that most tests share."""
    log = tmp_path_factory.mktemp("server") / "log"
    engine = "--device cpu --dtype float32 --num-kvcache-blocks 128 --max-num-seqs 16".split()
    names = ["--served-model-name", "demo", "--served-model-name", "other-name", "--api-key", KEY]
    command = ["-m", "nanovllm", "serve", str(demo_model()), "--port", "0", "--chat-template", TEMPLATE]
    server = Server(log, [*command, *names, *engine])
    yield server
    assert server.stop() == 0, server.log.read_text()[-3000:]
    assert "Traceback" not in server.log.read_text(), server.log.read_text()[-6000:]


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Servers of the test's own."""
    made: list[Server] = []

    def make(**options: Any) -> Server:
        made.append(Server.made(tmp_path / f"log{len(made)}", **options))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


@pytest.fixture(scope="session")
def scripted_server() -> Iterator[Any]:
    from scripted import ScriptedServer

    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture
def scripted(scripted_server: Any) -> Any:
    """A server in this process, which says what the test tells it to (`scripted.py`)."""
    scripted_server.say("Hello.")
    return scripted_server
