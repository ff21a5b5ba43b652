"""What it costs that somebody looks: `python -m benchmarks.watched`.

A server process gets one load again and again, by turns with a viewer of its page connected and without. It prints the
throughput of each run, the medians, their difference, and that of neighbouring runs, which a machine whose speed drifts
disturbs less. The viewer is a process that reads the feed and throws it away; on a CPU it takes time of the engine's
own cores, which a browser elsewhere would not.

python -m benchmarks.watched --device cpu                          the demo model
python -m benchmarks.watched --device cpu --model chat             SmolLM2
python -m benchmarks.watched --device cuda --shape qwen3-0.6b      the headline's requests, with random weights
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.model_shape import read_config
from benchmarks.serving import bodies, send, server
from benchmarks.setting import SHAPES
from benchmarks.workloads import PRESETS, draw, shrunk
from nanovllm import chat_model, demo_model

VIEWER = """
import signal, socket, sys
link = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
link.sendall(b"GET /page/trace HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
num_steps = num_bytes = 0
print(len(link.recv(1 << 20)), flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
try:
    for line in link.makefile("rb"):
        num_bytes += len(line)
        num_steps += line.startswith(b'data: {"kind":"step"')
finally:
    print(num_steps, num_bytes, flush=True)
"""


@contextmanager
def viewer(port: int) -> Iterator[None]:
    """A process that looks. Says at the end what it has seen."""
    process = subprocess.Popen([sys.executable, "-c", VIEWER, str(port)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()  # it is connected
    began = time.perf_counter()
    try:
        yield
    finally:
        process.terminate()
        num_steps, num_bytes = map(int, process.communicate(timeout=10)[0].split())
        seconds = time.perf_counter() - began
        print(f"  the viewer saw {num_steps / seconds:.1f} steps and {num_bytes / seconds / 1000:,.0f} kB a second")


def requests(args: argparse.Namespace, vocab_size: int) -> list[dict[str, Any]]:
    mix = shrunk(PRESETS[args.workload], args.shrink)
    return [{"at": 0.0, "body": body} for body in bodies(draw(args.workload, mix, vocab_size))]


def throughput(port: int, load: list[dict[str, Any]], num_clients: int) -> float:
    """Output tokens a second of one run."""
    answers = send(port, load, num_clients)
    failed = [answer for answer in answers if answer["status"] != 200]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
    seconds = max(answer["end"] for answer in answers) - min(request["at"] for request in load)
    return sum(answer["num_tokens"] for answer in answers) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", choices=["demo", "chat"], help="default: --shape on CUDA, the demo model on a CPU")
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--workload", default="headline", choices=sorted(PRESETS))
    parser.add_argument("--shrink", type=int, help="divides lengths and number; default 1 on CUDA, 8 on a CPU")
    parser.add_argument("--runs", type=int, default=5, help="of each side")
    parser.add_argument("--clients", type=int, help="processes that send; default 4 on CUDA, 1 on a CPU")
    args = parser.parse_args()
    is_cpu = args.device == "cpu"
    args.shrink, args.clients = args.shrink or (8 if is_cpu else 1), args.clients or (1 if is_cpu else 4)
    options: dict[str, Any] = {"device": args.device, "enable_prefix_caching": False}
    if args.model is None and not is_cpu:
        model, vocab_size = SHAPES / args.shape, read_config(SHAPES / args.shape)["vocab_size"]
        options |= {"load_format": "dummy", "max_model_len": 4096, "skip_tokenizer_init": True}
    else:
        model = Path(chat_model() if args.model == "chat" else demo_model())
        vocab_size = 6000  # of either model's ids
    load = requests(args, vocab_size)
    rates: dict[str, list[float]] = {"alone": [], "watched": []}
    with server(options, model) as (_, port):
        throughput(port, load[:256], args.clients)  # a warm-up
        for i in range(2 * args.runs):
            side = ("alone", "watched")[(i + i // 2) % 2]  # alone, watched, watched, alone, …
            if side == "watched":
                with viewer(port):
                    rates[side].append(throughput(port, load, args.clients))
                time.sleep(0.5)  # until the server knows that it is gone
            else:
                rates[side].append(throughput(port, load, args.clients))
            print(f"{side}: {rates[side][-1]:,.0f} tok/s", flush=True)
    alone, watched = median(rates["alone"]), median(rates["watched"])
    pairs = sorted(w / a - 1 for a, w in zip(rates["alone"], rates["watched"], strict=True))
    print(f"median alone {alone:,.0f}, watched {watched:,.0f} tok/s: {watched / alone - 1:+.2%}")
    print(f"pairs, one run beside the other: median {median(pairs):+.2%}, from {pairs[0]:+.2%} to {pairs[-1]:+.2%}")
    print(json.dumps({"benchmark": "watched", "device": args.device, "model": str(model.name), "rates": rates}))


if __name__ == "__main__":
    main()
