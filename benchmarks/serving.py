"""How fast a server is, and what streaming costs it: `python -m benchmarks.serving`.

First the headline workload offline. Then a server process of the same engine gets the same requests over HTTP, as
streams: all at once (`--at-once N`: N at a time), and as Poisson arrivals at shares of the offline rate. `--busy`
repeats it with a busy process on every core. It prints throughput, the times to the first token and between chunks, and
the server's CPU time per token; with several engines "of offline" is against as many times the offline rate of one.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.engines import EngineOptions, make_engine
from benchmarks.model_shape import read_config
from benchmarks.runs import warm_up
from benchmarks.setting import SHAPES
from benchmarks.workloads import PRESETS, Workload, draw, shrunk

SERVER = """
import json, sys
from nanovllm.server.launch import listen, serve
from nanovllm.server.settings import Limits, ServerSettings
model, options, size = json.loads(sys.argv[1])
settings = ServerSettings(served_model_names=["m"], limits=Limits(queue=100_000))
serve(model, options, settings, listen("127.0.0.1", 0), data_parallel_size=size)
"""


@contextmanager
def server(options: dict[str, Any], model: Path, num_engines: int = 1) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server process and its port."""
    command = [sys.executable, "-c", SERVER, json.dumps([str(model), options, num_engines])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("nano-vLLM serves"):
                yield process, int(line.rpartition(":")[2])
                break
        else:
            raise RuntimeError("the server has ended before it served")
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def busy_cores(number: int) -> Iterator[None]:
    """A process that computes without end, for each core."""
    made = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in made:
            process.kill()
            process.wait()


def bodies(workload: Workload) -> list[dict[str, Any]]:
    more = {"model": "m", "temperature": workload.temperature, "ignore_eos": True, "stream": True}
    more["stream_options"] = {"include_usage": True}
    pairs = zip(workload.prompts, workload.max_tokens, strict=True)
    return [{"prompt": prompt, "max_tokens": n, **more} for prompt, n in pairs]


def send(
    port: int, requests: list[dict[str, Any]], num_clients: int, at_once: int | None = None
) -> list[dict[str, Any]]:
    """Send the requests from several processes, `at_once` at a time. Returns what each client saw."""
    command, processes = [sys.executable, "-m", "benchmarks.serving_clients"], []
    for i in range(num_clients):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        work = {
            "port": port,
            "requests": requests[i::num_clients],
            "at_once": at_once and max(1, at_once // num_clients),
        }
        process.stdin.write(json.dumps(work) + "\n")
        process.stdin.flush()
        processes.append(process)
    for process in processes:
        process.stdout.readline()  # it has started, which takes long on busy cores
    start = time.time() + 0.2
    for process in processes:
        process.stdin.write(f"{start}\n")
        process.stdin.close()
    return [one for process in processes for one in json.load(process.stdout)]


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU time of a process's first thread, which is the event loop's, and of all of its threads."""
    ticks = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        ticks[int(task.name)] = int(fields[11]) + int(fields[12])
    scale = os.sysconf("SC_CLK_TCK")
    return ticks[pid] / scale, sum(ticks.values()) / scale


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def run(
    name: str,
    process: subprocess.Popen,
    port: int,
    requests: list[dict[str, Any]],
    clients: int,
    at_once: int | None = None,
) -> dict[str, Any]:
    """Send a load, measure, print a line."""
    before = cpu_seconds(process.pid)
    answers = send(port, requests, clients, at_once)
    loop_s, all_s = (after - b for after, b in zip(cpu_seconds(process.pid), before, strict=True))
    failed = [answer for answer in answers if answer["status"] != 200]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
    tokens = sum(answer["num_tokens"] for answer in answers)
    seconds = max(answer["end"] for answer in answers) - min(request["at"] for request in requests)
    first = [answer["times"][0] for answer in answers]
    gaps = [b - a for answer in answers for a, b in zip(answer["times"], answer["times"][1:], strict=False)]
    chunks = sum(len(answer["times"]) for answer in answers)
    result = {
        "load": name, "tokens_per_s": tokens / seconds, "ttft_ms": [1000 * percentile(first, p) for p in (0.5, 0.99)],
        "chunk_gap_ms": [1000 * percentile(gaps, p) for p in (0.5, 0.99)], "tokens_per_chunk": tokens / chunks,
        "loop_us_per_chunk": loop_s / chunks * 1e6, "cpu_us_per_token": all_s / tokens * 1e6,
    }  # fmt: skip
    print(
        f"{name}: {result['tokens_per_s']:,.0f} tok/s; first token p50 {result['ttft_ms'][0]:.1f} ms, p99 "
        f"{result['ttft_ms'][1]:.1f}; from chunk to chunk p50 {result['chunk_gap_ms'][0]:.2f} ms, p99 "
        f"{result['chunk_gap_ms'][1]:.2f}; {result['tokens_per_chunk']:.2f} tokens a chunk; event loop "
        f"{result['loop_us_per_chunk']:.0f} µs a chunk",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workload", default="headline", choices=sorted(PRESETS))
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--num-seqs", type=int, help="replaces the workload's number of requests")
    parser.add_argument("--repeat", type=int, default=2, help="offline runs, of which the best counts")
    parser.add_argument("--shares", type=lambda text: [float(s) for s in text.split(",") if s], default=[0.5, 0.8])
    parser.add_argument("--poisson-requests", type=int, default=512)
    parser.add_argument("--clients", type=int, default=4, help="processes that send")
    parser.add_argument("--data-parallel-size", "-dp", type=int, default=1, help="engines behind the port")
    parser.add_argument(
        "--at-once", type=int, help="requests at a time, each client's next after its last (default: all)"
    )
    parser.add_argument("--busy", action="store_true", help="once more, with every core busy")
    args = parser.parse_args()
    model = SHAPES / args.shape
    options = {"load_format": "dummy", "device": args.device, "dtype": "auto", "max_model_len": 4096}
    options |= {"max_num_seqs": args.at_once} if args.at_once else {}
    mix = shrunk(PRESETS[args.workload], args.shrink)
    mix = replace(mix, num_seqs=args.num_seqs or mix.num_seqs)
    workload = draw(args.workload, mix, read_config(model)["vocab_size"])
    engine = make_engine("nanovllm", EngineOptions(model_dir=model, **options))
    warm_up(engine, workload, num_tokens=16)
    rates = []
    for _ in range(args.repeat):
        engine.reset()
        began = time.perf_counter()
        engine.generate(workload)
        rates.append(workload.num_output_tokens / (time.perf_counter() - began))
    engine.close()
    del engine
    print("offline: " + ", ".join(f"{rate:,.0f}" for rate in rates) + " tok/s", flush=True)
    results = []
    options |= {"skip_tokenizer_init": True, "enable_prefix_caching": False}
    with server(options, model, args.data_parallel_size) as (process, port):
        all_at_once = [{"at": 0.0, "body": body} for body in bodies(workload)]
        run("warm-up", process, port, all_at_once[:256], args.clients)
        for is_busy in (False, True)[: 1 + args.busy]:
            with busy_cores(os.cpu_count() if is_busy else 0):
                name = f"{args.at_once or 'all'} at once" + (", every core busy" if is_busy else "")
                results.append(run(name, process, port, all_at_once, args.clients, args.at_once))
                share_of_offline = results[-1]["tokens_per_s"] / max(rates) / args.data_parallel_size
                print(f"  {share_of_offline:.1%} of offline", flush=True)
                for share in args.shares if not is_busy else ():
                    rng, at, arrivals = random.Random(0), 0.0, []
                    rate = (
                        args.data_parallel_size
                        * share
                        * max(rates)
                        / (workload.num_output_tokens / len(workload.prompts))
                    )
                    many = bodies(workload) * -(-args.poisson_requests // len(workload.prompts))
                    for body in many[: args.poisson_requests]:
                        at += rng.expovariate(rate)
                        arrivals.append({"at": at, "body": body})
                    results.append(run(f"Poisson, {share:.0%} of offline", process, port, arrivals, args.clients))
    print(json.dumps({"benchmark": "serving", "offline": rates, "results": results}))


if __name__ == "__main__":
    main()
