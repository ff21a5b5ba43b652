"""Many streaming clients for a while, of whom some leave in the middle: `python -m benchmarks.soak --device cpu`.

It prints how many answers differ from the first to the same question, what the server holds afterwards that it did not
before (blocks, requests, descriptors, threads, memory), how late its event loop was, and its CPU time per chunk.
"""

import argparse
import asyncio
import json
import os
import random
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.serving import cpu_seconds, server
from benchmarks.serving_clients import ask
from nanovllm import demo_model

QUESTIONS = 64


def question(i: int, max_tokens: int) -> dict[str, Any]:
    body = {"model": "m", "prompt": f"def f{i}(x, y):\n    ", "seed": i, "max_tokens": max_tokens, "ignore_eos": True}
    return body | {"stream": True, "stream_options": {"include_usage": True}}


def holdings(server_pid: int) -> dict[str, float]:
    """What the server and its engine's process hold."""
    children = Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split()
    found = {}
    for name, pid in zip(("server", "engine"), [server_pid, *children], strict=True):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines if ":" in line)
        found[f"{name}: descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
        found[f"{name}: threads"] = int(status["Threads"])
        found[f"{name}: rss_mb"] = int(status["VmRSS"].split()[0]) / 1024
    return found


def metrics(port: int) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    pairs = (line.rpartition(" ")[::2] for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def lag_percentile(values: dict[str, float], share: float) -> float:
    """The upper bound of the histogram's bucket that holds this share, in seconds."""
    name = "nanovllm:event_loop_lag_seconds"
    total = values[f"{name}_count"]
    bounds = [(float(key.split('le="')[1].split('"')[0]), n) for key, n in values.items() if f"{name}_bucket" in key]
    return min(bound for bound, n in bounds if n >= share * total)


async def use(port: int, seconds: float, clients: int, leaving: float, max_tokens: int) -> Counter[str]:
    """Keep so many clients busy. Returns what became of their requests."""
    first: dict[int, str] = {}
    seen: Counter[str] = Counter()
    end = time.time() + seconds
    rng = random.Random(0)

    async def client() -> None:
        while time.time() < end:
            i = rng.randrange(QUESTIONS)
            request = {"at": 0.0, "body": question(i, max_tokens), "keeps_text": True}
            if rng.random() < leaving:
                request["leave_after"] = rng.randint(0, max_tokens // 2)
            answer = await ask(port, 0.0, request)
            seen["chunks"] += len(answer.get("times", ()))
            if answer["status"] != 200:
                seen[f"status {answer['status']}"] += 1
            elif answer.get("has_left"):
                seen["left"] += 1
            else:
                seen["finished"] += 1
                seen["wrong"] += first.setdefault(i, answer["text"]) != answer["text"]
                seen["short"] += answer["num_tokens"] != max_tokens

    await asyncio.gather(*(client() for _ in range(clients)))
    return seen


async def touch_cache(port: int) -> None:
    """Use every block once: a CPU gets its memory only then."""
    long = {"model": "m", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    await asyncio.gather(*(ask(port, 0.0, {"at": 0.0, "body": long | {"prompt": [i] * 1984}}) for i in range(20)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--leaving", type=float, default=0.2, help="the share of requests whose client leaves")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    options = {"device": args.device, "dtype": "float32", "max_num_seqs": 256, "num_kvcache_blocks": 448}
    with server(options, Path(demo_model())) as (process, port):
        load = (args.clients, args.leaving, args.max_tokens)
        asyncio.run(touch_cache(port))
        asyncio.run(use(port, 15, *load))  # what is made once is made now
        time.sleep(1)
        before, cpu = holdings(process.pid), cpu_seconds(process.pid)
        seen = asyncio.run(use(port, args.seconds, *load))
        cpu_after = cpu_seconds(process.pid)
        time.sleep(2)
        after, values = holdings(process.pid), metrics(port)
    print(dict(seen))
    print({name: [before[name], after[name]] for name in before})
    print({name: n for name, n in values.items() if name.startswith(("vllm:num_requests", "vllm:kv_cache_usage"))})
    print(f"event loop late: p99 at most {lag_percentile(values, 0.99) * 1000:.0f} ms")
    print(f"event loop: {(cpu_after[0] - cpu[0]) / seen['chunks'] * 1e6:.0f} µs of CPU a chunk")
    print(json.dumps({"benchmark": "soak", "seen": seen, "before": before, "after": after}))


if __name__ == "__main__":
    main()
