"""HTTPS with the certificate that the command is given, and browsers' pages from the origins it is given."""

import asyncio
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from scripted import TextSide
from typer.testing import CliRunner

from nanovllm.cli import app as command
from nanovllm.server import launch
from nanovllm.server.app import make_app
from nanovllm.server.settings import ServerSettings

PAGE = "https://page.example"


def asked_of_the_server(monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """What the command hands on to the server for these options: settings, ssl."""
    calls: list[Any] = []
    monkeypatch.setattr(launch, "serve", lambda *given: calls.append(given))
    result = CliRunner().invoke(command, ["serve", "some/model", "--port", "0", "--no-page", *options])
    assert result.exit_code == 0, result.output
    (_, _, settings, listener, certificate, _) = calls[0]
    listener.close()
    return settings, certificate


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not installed")
    folder = tmp_path_factory.mktemp("tls")
    files = {"ssl_keyfile": str(folder / "key.pem"), "ssl_certfile": str(folder / "cert.pem")}
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", files["ssl_keyfile"], "-out", files["ssl_certfile"]],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


@pytest.fixture
def https_port(certificate: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    options = ["--ssl-keyfile", certificate["ssl_keyfile"], "--ssl-certfile", certificate["ssl_certfile"]]
    settings, given = asked_of_the_server(monkeypatch, *options)
    listener = launch.listen("127.0.0.1", 0)
    server = uvicorn.Server(launch.uvicorn_config(make_app(TextSide(), settings), settings, given))  # type: ignore
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()
    listener.close()


def test_https_serves_the_given_certificate_and_no_plain_http(https_port: int, certificate: dict[str, str]) -> None:
    trust = ssl.create_default_context(cafile=certificate["ssl_certfile"])
    assert httpx.get(f"https://127.0.0.1:{https_port}/version", verify=trust).status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://127.0.0.1:{https_port}/version")
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://127.0.0.1:{https_port}/version")


@pytest.mark.parametrize("option", ["--ssl-keyfile", "--ssl-certfile"])
def test_one_of_key_and_certificate_alone_is_refused(option: str) -> None:
    result = CliRunner().invoke(command, ["serve", "some/model", option, "file.pem"])
    assert result.exit_code == 2 and "need each other" in result.output


def test_pages_from_allowed_origins_alone_may_call(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = asked_of_the_server(monkeypatch, "--allowed-origin", PAGE, "--api-key", "k")
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = "access-control-allow-origin"

    async def call(settings: ServerSettings, method: str, origin: str, headers: dict[str, str]) -> httpx.Response:
        transport = httpx.ASGITransport(make_app(TextSide(), settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, "/v1/completions", headers={"origin": origin, **headers})

    asked = asyncio.run(call(settings, "OPTIONS", PAGE, preflight))
    assert asked.status_code == 200 and asked.headers[allowed] == PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"]
    refused = asyncio.run(call(settings, "POST", PAGE, {}))
    assert refused.status_code == 401 and refused.headers[allowed] == PAGE, "the page must be able to read the error"
    assert allowed not in asyncio.run(call(settings, "OPTIONS", "https://other.example", preflight)).headers
    assert allowed not in asyncio.run(call(ServerSettings(page=False), "OPTIONS", PAGE, preflight)).headers


def test_the_command_starts_as_many_engines_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(launch, "serve", lambda *given: sizes.append(given[-1]))
    for options in ([], ["-dp", "1"], ["--data-parallel-size", "3"], ["--data_parallel_size=2"]):
        assert CliRunner().invoke(command, ["serve", "some/model", "--port", "0", *options]).exit_code == 0
    assert sizes == [1, 1, 3, 2]
