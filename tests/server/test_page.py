"""The page's endpoints on a real server: what its viewers get, and what they may do."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from leftovers import children_of
from server_process import KEY, Server
from trace_reading import apply, check_format

from nanovllm import demo_model
from nanovllm.config import Config
from nanovllm.server import guard, page
from nanovllm.trace.scenes import TEACHING

KEYED = [("GET", "trace"), ("GET", "state"), ("POST", "control"), ("POST", "scene"), ("POST", "clear")]


class Viewer:
    """Reads the feed in a thread, until `close`."""

    def __init__(self, server: Server) -> None:
        self.seen: list[dict[str, Any]] = []
        self._socket = server.connect()
        self._socket.settimeout(None)
        self._socket.sendall(f"GET /page/trace HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.wait(lambda: self.steps)

    def _read(self) -> None:
        with self._socket.makefile("rb") as lines:  # each chunk has whole events
            for line in lines:
                if line.startswith(b"data: "):
                    self.seen.append(json.loads(line[6:]))

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [thing for thing in self.seen if thing["kind"] == "step"]

    def events(self, what: str) -> list[dict[str, Any]]:
        return [event for step in self.steps for event in step["events"] if event["what"] == what]

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.seen[-1:]
            time.sleep(0.005)

    def wait_for_end(self, number: int) -> None:
        self.wait(lambda: len(self.events("finish")) >= number and not self.steps[-1]["running"])

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture(scope="module")
def teaching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = ["-m", "nanovllm", "serve", str(demo_model()), "--port", "0", "--teach", "--api-key", KEY]
    command += ["--device", "cpu", "--dtype", "float32", "--max-num-seqs", "6", "--served-model-name", "demo"]
    server = Server(tmp_path_factory.mktemp("teach") / "log", command)
    yield server
    viewer = Viewer(server)  # who looks, or has paused the engine, keeps no server alive
    post(server, "control", action="pause")
    post(server, "scene", scene="long")
    assert server.stop() == 0
    assert len(viewer.events("finish")) == 4
    assert "Traceback" not in server.log.read_text(), server.log.read_text()[-4000:]


@pytest.fixture
def calm(teaching: Server) -> Iterator[Server]:
    """The server without scenes, at full speed, with an empty cache."""
    yield teaching
    with teaching.http() as http:
        http.post("/page/clear").raise_for_status()
        http.post("/page/control", json={"action": "slow"})
        http.post("/page/control", json={"action": "resume"})
    assert teaching.is_idle()


@pytest.fixture
def viewer(calm: Server) -> Iterator[Viewer]:
    made = Viewer(calm)
    yield made
    made.close()


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    with server.http() as http:
        return http.post(f"/page/{path}", json=body).raise_for_status().json()


class TestTheFeed:
    def test_begins_with_the_head_and_with_all_blocks(self, viewer: Viewer) -> None:
        head, first = viewer.seen[:2]
        assert head["format"] == "nano-vllm-trace-2" and head["model"] == "demo" and head["engines"] == 1
        # The teaching sizes, but for what the command line said
        sizes = ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens")
        assert [head[name] for name in sizes] == [24, 16, 6, 64]
        assert head["functions"]["Scheduler._preempt_latest"]["source"].startswith("def _preempt_latest(")
        assert first["full"] and first["n"] == 1

    def test_has_the_format_of_a_recorded_trace(self, calm: Server, viewer: Viewer) -> None:
        post(calm, "scene", scene="fill")
        viewer.wait_for_end(6)
        check_format(viewer.seen)

    def test_shows_the_text_of_a_chat_as_it_is_streamed(self, calm: Server, viewer: Viewer) -> None:
        stream = calm.client().completions.create(
            model="demo", prompt="def add(a, b):", max_tokens=10, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].text for chunk in stream)
        viewer.wait_for_end(1)
        (request,) = [thing for thing in viewer.seen if thing["kind"] == "request"]
        assert request["prompt"] == "def add(a, b):" and request["max_tokens"] == 10
        assert "".join(piece for step in viewer.steps for piece in step["tokens"].get("A", [])) == text

    def test_a_second_viewer_sees_at_once_what_is_there(self, calm: Server, viewer: Viewer) -> None:
        post(calm, "control", action="pause")
        post(calm, "scene", scene="shared")
        viewer.wait(lambda: len(viewer.steps[-1]["waiting"]) == 10)
        second = Viewer(calm)
        assert second.steps[0]["full"] and second.steps[0]["waiting"] == viewer.steps[-1]["waiting"]
        assert [thing["request"] for thing in second.seen if thing["kind"] == "request"] == viewer.steps[-1]["waiting"]
        post(calm, "control", action="step")
        second.wait(lambda: len(second.steps) == 2)
        assert second.steps[1]["n"] == second.steps[0]["n"] + 1 and "full" not in second.steps[1]
        second.close()

    def test_knows_its_viewers(self, calm: Server) -> None:
        viewers = [Viewer(calm), Viewer(calm)]
        with calm.http() as http:
            assert http.get("/page/state").json()["viewers"] == 2
            for one in viewers:
                one.close()
            viewers[0].wait(lambda: http.get("/page/state").json()["viewers"] == 0)


class TestTheLevers:
    def test_pause_and_step_do_exactly_one_step(self, calm: Server, viewer: Viewer) -> None:
        assert post(calm, "control", action="pause")["paused"]
        post(calm, "scene", scene="long")
        viewer.wait(lambda: len(viewer.steps[-1]["waiting"]) == 4)
        for number in (1, 2, 3):
            post(calm, "control", action="step")
            viewer.wait(lambda number=number: len([step for step in viewer.steps if step["batch"]]) == number)
        time.sleep(0.1)
        assert len([step for step in viewer.steps if step["batch"]]) == 3
        assert not post(calm, "control", action="resume")["paused"]
        viewer.wait_for_end(4)

    def test_slow_waits_between_steps(self, calm: Server, viewer: Viewer) -> None:
        assert post(calm, "control", action="slow", delay_ms=40)["delay_ms"] == 40
        post(calm, "scene", scene="long")
        viewer.wait(lambda: len([step for step in viewer.steps if step["batch"]]) >= 5)
        times = [step["t"] for step in viewer.steps if step["batch"]]
        assert min(b - a for a, b in zip(times, times[1:], strict=False)) >= 0.04

    @pytest.mark.parametrize(
        ("scene", "event", "at_least"), [("shared", "hit", 5), ("fill", "preempt", 1), ("long", "chunk", 3)]
    )
    def test_a_scene_shows_what_it_promises(
        self, calm: Server, viewer: Viewer, scene: str, event: str, at_least: int
    ) -> None:
        number = post(calm, "scene", scene=scene)["requests"]
        viewer.wait_for_end(number)
        assert len(viewer.events(event)) >= at_least

    def test_clear_aborts_the_scenes_and_empties_the_cache(self, calm: Server, viewer: Viewer) -> None:
        post(calm, "control", action="slow", delay_ms=20)
        post(calm, "scene", scene="fill")
        viewer.wait(lambda: viewer.steps[-1]["running"])
        post(calm, "clear")
        viewer.wait(lambda: len(viewer.events("abort")) == 6)
        viewer.wait(lambda: not viewer.steps[-1]["running"])
        tables, digests = {}, {}
        for step in list(viewer.steps):
            apply(step, tables, digests)
        assert not tables and set(digests.values()) == {""}

    def test_what_is_wrong_is_refused(self, calm: Server) -> None:
        with calm.http() as http:
            for path, body in (
                ("scene", {"scene": "x"}),
                ("scene", {}),
                ("control", {"action": "stop"}),
                ("control", {"action": "slow", "delay_ms": -1}),
                ("control", {"action": "slow", "delay_ms": 10**6}),
                ("control", {"action": "pause", "more": 1}),
            ):
                assert http.post(f"/page/{path}", json=body).status_code == 400, body


class TestAnEngineThatEnds:
    """Kills the engine's process: the server starts another."""

    def test_a_viewer_sees_it_and_then_the_whole_state_of_the_next_one_at_the_old_pace(
        self, make_server: Callable[..., Server]
    ) -> None:
        server = make_server(teach=True, options=TEACHING)
        viewer = Viewer(server)
        post(server, "control", action="slow", delay_ms=30)
        post(server, "scene", scene="fill")
        viewer.wait(lambda: viewer.steps[-1]["running"])
        post(server, "control", action="pause")
        (pid,) = children_of(server.process.pid, "remote.process")
        os.kill(pid, signal.SIGKILL)
        viewer.wait(lambda: {"kind": "lost"} in viewer.seen)
        with server.http() as http:
            refused = http.get("/page/trace")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_lost")
            assert http.post("/page/scene", json={"scene": "fill"}).status_code == 503
            state = http.get("/page/state").json()
            assert (state["paused"], state["delay_ms"]) == (True, 30)
        viewer.wait(lambda: viewer.seen[-1]["kind"] == "step" and viewer.seen[-1].get("full"), 60)
        after = viewer.seen[viewer.seen.index({"kind": "lost"}) + 1 :]
        assert [thing["kind"] for thing in after] == ["head", "step"] and after[0]["restarts"] == 1
        assert after[1]["n"] == 1 and not after[1]["running"] and after[1]["stats"]["usage"] == 0
        second = Viewer(server)
        number = post(server, "scene", scene="long")["requests"]
        viewer.wait(lambda: len(viewer.steps[-1]["waiting"]) == number)
        time.sleep(0.2)
        assert not viewer.steps[-1]["batch"], "it is paused as the one before"
        post(server, "control", action="resume")
        viewer.wait_for_end(number)
        since = viewer.seen[viewer.seen.index({"kind": "lost"}) + 1 :]
        times = [thing["t"] for thing in since if thing["kind"] == "step" and thing["batch"]]
        assert min(b - a for a, b in zip(times, times[1:], strict=False)) >= 0.03, "and as slow"
        check_format(since)
        second.wait_for_end(number)
        check_format(second.seen)
        viewer.close()
        second.close()


class TestAServerForOthers:
    def test_has_the_page_and_its_feed_and_no_levers(self, server: Server) -> None:
        viewer = Viewer(server)
        with server.http() as http:
            assert http.get("/page/state").json()["teach"] is False
            for path, body in (("control", {"action": "pause"}), ("scene", {"scene": "fill"}), ("clear", None)):
                answer = http.post(f"/page/{path}", json=body)
                assert answer.status_code == 403 and "--teach" in answer.json()["error"]["message"]
            http.post("/v1/completions", json={"model": "demo", "prompt": "x", "max_tokens": 60, "temperature": 0})
        viewer.wait(lambda: len(viewer.steps) > 2 and not viewer.steps[-1]["running"])
        (request,) = [thing for thing in viewer.seen if thing["kind"] == "request"]
        assert (request["prompt"], request["prompt_tokens"]) == ("", 1), "the texts of requests are nobody's business"
        assert not any(step["tokens"] for step in viewer.steps)
        covered = sum(
            thing["steps"] if thing["kind"] == "gap" else 1 for thing in viewer.seen if thing["kind"] in ("gap", "step")
        )
        assert viewer.steps[-1]["n"] == covered >= 10
        viewer.close()

    def test_gives_its_files_without_a_key_and_nothing_else(self, server: Server) -> None:
        with httpx.Client(base_url=server.url) as http:
            for path in ("/", "/page/index.html"):
                assert http.get(path).headers["content-type"].startswith("text/html")
            assert http.get("/page/missing.js").status_code == 404
            assert http.get("/page/..%2f..%2fapp.py").status_code == 404
            for method, path in KEYED:
                assert http.request(method, f"/page/{path}").status_code == 401
                assert http.request(method, f"/page/{path}/", follow_redirects=True).status_code == 401


def test_every_endpoint_of_the_page_needs_a_key() -> None:
    """One that is new is open until guard.py knows it."""
    endpoints = {(method, route.path) for route in page.router.routes for method in route.methods if route.path != "/"}
    assert endpoints == {(method, f"/page/{path}") for method, path in KEYED}
    assert {path for _, path in endpoints} == guard.KEYED_PAGE_PATHS


def test_without_the_page_there_is_none(scripted: Any) -> None:
    assert scripted.settings.page is False
    for path in ("/", "/page/index.html", "/page/state", "/page/trace"):
        assert scripted.http.get(path).status_code == 404


def test_teaching_needs_the_page_and_one_engine(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nanovllm.cli import app

    for options, says in ((["--no-page"], "teach=True needs the page"), (["-dp", "2"], "--data-parallel-size 1")):
        result = CliRunner().invoke(app, ["serve", str(demo_model()), "--teach", *options])
        assert result.exit_code == 2 and says in result.output


def test_an_option_wins_over_teaching_s_size_though_it_is_the_engine_s_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from nanovllm.cli import app
    from nanovllm.server import launch

    made: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "serve", lambda path, options, *_: made.append(options))
    default = Config.__dataclass_fields__["max_num_seqs"].default
    for options in ([], ["--max-num-seqs", str(default)]):
        result = CliRunner().invoke(app, ["serve", str(demo_model()), "--port", "0", "--teach", *options])
        assert result.exit_code == 0, result.output
    assert [options["max_num_seqs"] for options in made] == [TEACHING["max_num_seqs"], default]
