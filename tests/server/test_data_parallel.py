"""Two engines behind one port: where requests go, and what happens when an engine or the server ends."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from leftovers import are_gone, children_of
from prometheus_client.parser import text_string_to_metric_families
from server_process import KEY, ROOT, TEMPLATE, Server

from nanovllm import demo_model

ENDLESS = {"model": "demo", "max_tokens": 150, "temperature": 0, "extra_body": {"ignore_eos": True}}


OPTIONS = "--port 0 -dp 2 --device cpu --dtype float32 --num-kvcache-blocks 128 --max-num-seqs 16".split()
NAMES = ["--served-model-name", "demo", "--api-key", KEY, "--chat-template", TEMPLATE]
COMMAND = ["-m", "nanovllm", "serve", str(demo_model()), *OPTIONS, *NAMES]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("two") / "log", COMMAND)
    yield server
    server.stop()
    assert "Traceback" not in server.log.read_text(), server.log.read_text()[-6000:]


def by_engine(server: Server, name: str) -> list[float]:
    """A metric's value in each engine; 0 for one that does not serve."""
    values = [0.0, 0.0]
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        found = re.match(rf'{name}\{{.*engine="(\d)".* (\S+)$', line)
        if found:
            values[int(found[1])] += float(found[2])
    return values


def engines_of(server: Server) -> set[int]:
    return children_of(server.process.pid, "remote.process")


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Streams:
    """Streams that are read in threads until they end, however they end."""

    def __init__(self, client: openai.OpenAI, number: int, **options: Any) -> None:
        self.begun, self.ends, self._client, self._options = 0, [], client, ENDLESS | options
        self.threads = [threading.Thread(target=self._read, args=(i,)) for i in range(number)]
        for thread in self.threads:
            thread.start()

    def _read(self, i: int) -> None:
        try:
            chunks = iter(self._client.completions.create(prompt=f"# {i}", stream=True, **self._options))
            next(chunks)
            self.begun += 1
            self.ends.append([chunk.choices[0].finish_reason for chunk in chunks][-1])
        except openai.APIError as error:
            self.ends.append(error)

    def wait(self) -> list[Any]:
        for thread in self.threads:
            thread.join()
        return self.ends


class TestRequests:
    def test_that_begin_alike_meet_in_one_engines_cache(self, two: Server) -> None:
        for i in range(3):
            before = by_engine(two, "vllm:prefix_cache_hits_total")
            start = f"# {i}" * 300
            for tail in ("a", "b", "c"):
                two.client().completions.create(model="demo", prompt=start + tail, max_tokens=1)
            after = by_engine(two, "vllm:prefix_cache_hits_total")
            assert sorted(b > a for a, b in zip(before, after, strict=True)) == [False, True]

    def test_that_begin_differently_use_both_engines(self, two: Server) -> None:
        before = by_engine(two, "vllm:request_success_total")
        for i in range(20):
            two.client().completions.create(model="demo", prompt=f"{i} x", max_tokens=1)
        after = by_engine(two, "vllm:request_success_total")
        assert all(b > a for a, b in zip(before, after, strict=True)) and sum(after) - sum(before) == 20

    def test_of_either_engine_are_gone_on_from(self, two: Server) -> None:
        client, before = two.client(), by_engine(two, "vllm:request_success_total")
        one = client.responses.create(model="demo", input="0", max_output_tokens=2)
        for i in range(8):
            client.responses.create(model="demo", input=f"{i}", previous_response_id=one.id, max_output_tokens=1)
        after = by_engine(two, "vllm:request_success_total")
        assert all(b > a for a, b in zip(before, after, strict=True))

    def test_are_answered_and_refused_as_by_one_engine(self, two: Server) -> None:
        with two.http() as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "demo"
            answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers={"x-request-id": "me"})
            assert answer.headers.get_list("x-request-id") == ["me"] and len(answer.headers.get_list("date")) == 1
            json_type = {"content-type": "application/json"}
            assert http.post("/v1/completions", content=b"{", headers=json_type).status_code == 400
            assert http.post("/v1/completions", json={"prompt": "x", "n": 0}).json()["error"]["param"] == "n"
            assert http.get("/v1/nothing").status_code == 404 and http.head("/v1/models").status_code == 405
            assert http.get("/v1/models", headers={"authorization": "Bearer x"}).status_code == 401
            assert http.get("/openapi.json").status_code == 200

    def test_end_when_their_client_leaves(self, two: Server) -> None:
        with two.client().completions.create(prompt="x", stream=True, **ENDLESS) as stream:
            next(iter(stream))
        assert two.is_idle()

    def test_metrics_are_of_all_engines(self, two: Server) -> None:
        families = list(text_string_to_metric_families(httpx.get(f"{two.url}/metrics").text))
        assert len({family.name for family in families}) == len(families)
        of = {family.name: {sample.labels.get("engine") for sample in family.samples} for family in families}
        assert of["vllm:generation_tokens"] == of["vllm:num_requests_running"] == {"0", "1"}


def test_an_engine_that_dies_takes_only_its_own_requests_and_comes_back(two: Server) -> None:
    two.is_idle()
    num_fds = len(os.listdir(f"/proc/{two.process.pid}/fd"))
    client, before = two.client(), engines_of(two)
    streams = Streams(client, 12)
    wait_for(lambda: streams.begun == 12)
    running = by_engine(two, "vllm:num_requests_running")
    assert min(running) > 0
    killed = min(before)  # started first: engine 0
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: by_engine(two, "nanovllm:engine_up") == [0, 1], 3)  # until the kernel has closed its sockets
    assert all(client.completions.create(model="demo", prompt=f"{i}", max_tokens=1).choices for i in range(6))
    assert httpx.get(f"{two.url}/health").status_code == 200
    ends = streams.wait()
    assert ends.count("length") == running[1]
    assert all("the engine has ended" in str(end) for end in ends if end != "length")
    wait_for(lambda: by_engine(two, "nanovllm:engine_up") == [1, 1])
    for i in range(20):
        client.completions.create(model="demo", prompt=f"{i}", max_tokens=1)
    assert by_engine(two, "vllm:request_success_total")[0] > 0
    assert by_engine(two, "nanovllm:engine_restarts_total") == [1, 0]
    after = engines_of(two)
    assert len(after) == 2 and killed not in after and len(before & after) == 1
    client.close()
    wait_for(lambda: len(os.listdir(f"/proc/{two.process.pid}/fd")) <= num_fds)


def test_a_signal_drains_all_engines_and_leaves_nothing(two: Server) -> None:
    engines = engines_of(two)
    streams = Streams(two.client(), 4, max_tokens=60)
    wait_for(lambda: streams.begun == 4)
    two.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.InternalServerError, match="about to end"):
        wait_for(lambda: not two.client().completions.create(model="demo", prompt="x", max_tokens=1))
    assert streams.wait() == ["length"] * 4, "they must finish"
    assert two.process.wait(10) == 0 and are_gone(list(engines))


def test_no_engine_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, *COMMAND], stdout=log, stderr=log, cwd=ROOT)
    wait_for(lambda: len(children_of(server.pid, "remote.process")) == 2)
    engines = children_of(server.pid, "remote.process")
    server.kill()
    assert are_gone(list(engines))
    server.wait()
