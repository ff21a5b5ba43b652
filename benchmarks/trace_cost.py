"""What a trace of one step costs, from the engine's books to a viewer's browser, at the size of a large GPU.

A real engine's books over a device that computes nothing: most blocks are cached under digests, every row decodes, a
few take a block. Between two steps it reads an array larger than the caches, as other work would.

python -m benchmarks.trace_cost                      256 rows, 70,000 blocks: Qwen3-0.6B on a GPU of 139 GiB
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from nanovllm import SamplingParams, demo_model
from nanovllm.config import Config
from nanovllm.engine.step_trace import StepTrace
from nanovllm.engine.text_engine import TextEngine
from nanovllm.remote.messages import packed
from nanovllm.server.sse import event
from nanovllm.step_plan import StepPlan
from nanovllm.trace.writer import TraceWriter

OVERRIDES = {
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
BLOCK_SIZE = 16
COLD_BYTES = 64 << 20  # more than the caches hold


class Step:
    """Stands in for a step on a device: its tokens are there at once, and are all alike."""

    awaits_masks = False

    def __init__(self, plan: StepPlan) -> None:
        self._num_samples = plan.num_samples

    def tokens(self) -> list[int]:
        return [7] * self._num_samples


def fill_cache(engine: Any, rng: np.random.Generator) -> None:
    """Let every block hold something that could be found. No device computes it."""
    manager = engine.block_manager
    length = 64 * BLOCK_SIZE
    for _ in range(-(-manager.num_blocks // 64)):
        seq = engine.make_sequence(rng.integers(1, 6000, length).tolist(), SamplingParams(max_tokens=1))
        manager.admit(seq, manager.find_prefix(seq))
        seq.num_computed_tokens = length
        manager.publish(seq)
        manager.release(seq)


def traces(args: argparse.Namespace) -> Iterator[tuple[float, StepTrace]]:
    """(seconds that the trace took, trace): the first is full, the others are of steps that only decode."""
    options = {
        "device": "cpu", "dtype": "float32", "load_format": "dummy", "hf_overrides": OVERRIDES, "seed": 0,
        "max_num_seqs": args.rows, "num_kvcache_blocks": args.blocks, "kvcache_block_size": BLOCK_SIZE,
        "max_num_batched_tokens": 8192, "skip_tokenizer_init": True, "max_model_len": 4096,
    }  # fmt: skip
    text_engine = TextEngine(Config.from_options(str(demo_model()), options))
    engine, rng, made = text_engine.engine, np.random.default_rng(0), []
    engine.runner.launch = Step
    fill_cache(engine, rng)
    cold = np.ones(COLD_BYTES, dtype=np.uint8)
    params = SamplingParams(max_tokens=2048, ignore_eos=True)
    for length in rng.integers(100, 1025, args.rows).tolist():
        text_engine.add(text_engine.make_request(rng.integers(1, 6000, length).tolist(), params))
    while any(seq.num_in_flight or not seq.output_token_ids for seq in engine.scheduler.running) or (
        len(engine.scheduler.running) < args.rows
    ):
        text_engine.step()
    for number in range((args.traces + 1) * args.every):
        engine.observer = made.append if number % args.every == 0 else None
        cold.sum()
        text_engine.step()
        if made:
            text_engine.tracer.has_texts = False  # as on a server for others
            yield text_engine.tracer.cost_s, made.pop()


def timed(times: list[float], function: Any) -> Any:
    began = time.perf_counter()
    result = function()
    times.append(time.perf_counter() - began)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=70_000)
    parser.add_argument("--traces", type=int, default=40)
    parser.add_argument("--every", type=int, default=20, help="of so many steps one is traced")
    args = parser.parse_args()
    made, pickled, written, encoded = [], [], [], []
    sizes: dict[str, list[int]] = {"pickle": [], "JSON": []}
    writer = TraceWriter()
    for cost_s, trace in traces(args):
        made.append(cost_s)
        message = timed(pickled, partial(packed, (trace.stats, [], [trace])))
        objects = timed(written, partial(writer.objects, trace))
        text = timed(encoded, lambda objects=objects: b"".join(map(event, objects)))
        sizes["pickle"].append(len(message))
        sizes["JSON"].append(len(text))
    rows = {"trace": made, "pickle": pickled, "objects": written, "JSON": encoded}
    for name, values in rows.items():
        first, *rest = (1000 * value for value in values)
        print(f"{name:8} first {first:6.2f} ms, then median {median(rest):.3f} ms, largest {max(rest):.3f} ms")
    for name, numbers in sizes.items():
        first, *rest = numbers
        print(f"{name:8} first {first / 1000:6.0f} kB, then median {median(rest) / 1000:.1f} kB")
    print(json.dumps({"benchmark": "trace_cost", **vars(args), **rows}))


if __name__ == "__main__":
    main()
