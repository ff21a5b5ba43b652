"""A real server process, on the small model of the repository."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai

from nanovllm import demo_model

KEY = "sk-test"
ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}# a\n{% endif %}"
)
PROGRAM = """
import sys, json
from nanovllm.server.launch import listen, serve
from nanovllm.server.settings import Limits, ServerSettings
model, options, settings, limits = json.loads(sys.argv[1])
serve(model, options, ServerSettings(**settings, limits=Limits(**limits)), listen("127.0.0.1", 0))
"""


class Server:
    """A server process, until `stop`."""

    def __init__(self, log: Path, command: list[str]) -> None:
        self.log = log
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, cwd=ROOT, env=env)
        self.port = self._wait()
        self.url = f"http://127.0.0.1:{self.port}"

    @classmethod
    def made(cls, log: Path, options: dict[str, Any] | None = None, **settings: Any) -> "Server":
        """A server with these options of the engine, settings and `limits`."""
        limits = settings.pop("limits", {})
        settings = {
            "served_model_names": ["demo", "other-name"],
            "api_keys": [KEY],
            "chat_template": TEMPLATE,
        } | settings
        options = {"device": "cpu", "dtype": "float32", "num_kvcache_blocks": 128, "max_num_seqs": 16} | (options or {})
        return cls(log, ["-c", PROGRAM, json.dumps([str(demo_model()), options, settings, limits])])

    def _wait(self) -> int:
        deadline = time.monotonic() + 120
        while "nano-vLLM serves" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)
        return int(self.log.read_text().split("nano-vLLM serves")[1].split("\n")[0].rpartition(":")[2])

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **({"api_key": KEY, "max_retries": 0} | options))

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def metric(self, name: str) -> float:
        with self.http() as http:
            lines = http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))

    def is_idle(self, seconds: float = 10.0) -> bool:
        """Whether it comes to rest: no completion runs or waits, and no block of the cache is in use."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        deadline = time.monotonic() + seconds
        while any(self.metric(name) for name in names):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
