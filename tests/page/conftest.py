"""A headless Chromium for the tests of the page, and pages on which any error of the console fails the test."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sample_trace import sample_trace, window_trace
from stub_server import Stub, serving

from tools.make_demo_page import demo_page

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]

WAIT_MS = 15_000  # for what comes in tenths of a second on an idle machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """While it is open, playwright runs an event loop in this thread: so no longer than a file's tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no playwright (pip install playwright)")
    if CHROMIUM is None:
        pytest.skip("there is no chromium (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        playwright.expect.set_options(timeout=WAIT_MS)
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, serve: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(url, allowed="", **of the context)`: a page whose console may have errors with `allowed` in them only.

    Requests that leave this machine are errors too. Pages close before the servers that `serve` has started.
    """
    contexts, errors = [], []

    def open_page(url: str, allowed: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"locale": "en-US", **options})
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()

        def note(text: str) -> None:
            if not allowed or allowed not in text:
                errors.append(text)

        page.on("console", lambda message: note(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: note(str(error)))
        page.on("request", lambda request: note(request.url) if is_outside(request.url) else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def is_outside(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:"))


@pytest.fixture
def serve() -> Iterator[Callable[..., Stub]]:
    """`serve(**of Stub)`: a stub server that runs until the test ends."""
    open_servers = []

    def start(**options: Any) -> Stub:
        server = serving(Stub(**options))
        open_servers.append(server)
        return server.__enter__()

    yield start
    for server in open_servers:
        server.__exit__(None, None, None)


@pytest.fixture(scope="session")
def trace_text() -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in sample_trace())


@pytest.fixture(scope="session")
def window_demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same of a model with sliding windows."""
    path: Path = tmp_path_factory.mktemp("page") / "window.html"
    path.write_text(demo_page("".join(json.dumps(item) + "\n" for item in window_trace())), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="session")
def demo(trace_text: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a self-contained page with the sample trace inside."""
    path: Path = tmp_path_factory.mktemp("page") / "demo.html"
    path.write_text(demo_page(trace_text), encoding="utf-8")
    return path.as_uri()
