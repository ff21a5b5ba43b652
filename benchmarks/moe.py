"""Times a whole mixture-of-experts layer against its roofline: `python -m benchmarks.moe`, on one GPU.

A graph replays several layers in turn, each with weights of its own, so that the hardware's caches hold none of them.
A layer is the router, the experts and the norm after them, which adds up what the experts leave; its result is the next
layer's input, so tokens choose experts as random weights will have it, nearly evenly.

The floor of a layer's time is the larger of two: the bytes of the experts that were hit and of the router, at the read
bandwidth, and the FLOPs of all pairs and of the router, at a matmul's rate; both measured first (benchmarks/
ceilings.py). Each layer's result for a few tokens is first compared with a plain loop over the experts.

`--tune` times the two products alone instead, with other tiles than the table's (benchmarks/moe_tuning.py). What fails
is printed and left out. The benchmark ends at `--seconds` and prints what it has by then.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.attention_timing import in_one_go, median_seconds
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.machine import describe_machine, describe_versions
from benchmarks.report import ceilings_line, table_lines
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe.activation import gate_reference
from nanovllm.kernels.moe.expert_loop import loop_over_experts
from nanovllm.kernels.moe.route import route
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.moe import MERGED, QWEN_NAMES, SparseMoE

TOKENS = (1, 8, 32, 128, 256, 2048, 8192)
CHECKED_TOKENS = (3, 300, 3000)  # so that every tiling is


class MoEShape(NamedTuple):
    """One layer's sizes."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    k: int
    is_gpt_oss: bool = False
    num_layers: int = 4  # with weights of their own

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size * 2

    def floor_s(self, num_tokens: int, num_hit: float, ceilings: Ceilings) -> tuple[float, float]:
        """(seconds to read what was hit, seconds to multiply)."""
        router = self.num_experts * self.hidden_size
        flops = 2 * num_tokens * (self.k * self.expert_bytes / 2 + router)
        num_bytes = num_hit * self.expert_bytes + 2 * router
        return num_bytes / ceilings.read_bytes_per_s, flops / ceilings.matmul_flops_per_s


SHAPES = {
    "qwen3-30b-a3b": MoEShape(2048, 768, 128, 8),
    "gpt-oss-20b": MoEShape(2880, 2880, 32, 4, is_gpt_oss=True),
    "mixtral-8x7b": MoEShape(4096, 14336, 8, 2),
    "tiny": MoEShape(64, 32, 8, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tune", action="store_true", help="time the products with other tiles than the table's")
    parser.add_argument("--seconds", type=float, default=80, help="begin no measurement after so many seconds")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    dtype = torch.bfloat16
    ceilings = measure_ceilings(args.device, dtype, shrink=1 if args.device == "cuda" else 64)
    print(ceilings_line(ceilings, "bfloat16"), flush=True)
    if args.tune:
        from benchmarks.moe_tuning import tune

        for name in args.shapes:
            attempt(name, lambda name=name: tune(name, SHAPES[name], args.tokens, ceilings, deadline))
        return
    rows, errors = [], []
    for name in args.shapes:
        measured, failed = measure_shape(name, SHAPES[name], args.tokens, args.device, ceilings, deadline)
        rows, errors = rows + measured, errors + failed
        torch.cuda.empty_cache()
    report = {"benchmark": "moe", "rows": rows, "errors": errors}
    machine = {"machine": describe_machine(args.device), "versions": describe_versions()}
    print(json.dumps(report | machine))
    print(*report_lines(rows), *errors, ceilings_line(ceilings, "bfloat16"), sep="\n")


def measure_shape(
    name: str, shape: MoEShape, all_tokens: list[int], device: str, ceilings: Ceilings, deadline: float
) -> tuple[list[dict], list[str]]:
    """(what was measured of a shape, what failed)."""
    rows, errors = [], []
    layers = attempt(name, lambda: make_layers(shape, device))
    if layers is None:
        return rows, [f"{name}: no layers"]
    if device == "cuda":  # compiling takes most of the time, so several threads do it
        sizes = [*CHECKED_TOKENS, *all_tokens]
        with ThreadPoolExecutor(min(len(sizes), os.cpu_count() or 1)) as threads:
            list(threads.map(lambda n: attempt(f"{name}, {n} tokens", lambda: run_once(layers[0], shape, n)), sizes))
        torch.cuda.synchronize()
    for num_tokens in CHECKED_TOKENS:
        error = attempt(f"{name}, {num_tokens} tokens", lambda n=num_tokens: largest_error(layers[0], shape, n, device))
        text = "failed" if error is None else f"off by {error:.4f} of the loop's deviation"
        print(f"{name}, {num_tokens} tokens: {text}", flush=True)
        if error is None or not error < 0.1:  # roundings to bfloat16 in between
            errors.append(f"{name}, {num_tokens} tokens: WRONG RESULT: {text}")
    for num_tokens in all_tokens:
        if time.monotonic() > deadline:
            errors.append(f"{name}, {num_tokens} tokens: no time left")
            continue
        row = attempt(f"{name}, {num_tokens} tokens", lambda n=num_tokens: measure(layers, shape, n, device, ceilings))
        if row is None:
            errors.append(f"{name}, {num_tokens} tokens: failed")
        else:
            rows.append({"shape": name, "tokens": num_tokens, **row})
            print(rows[-1], flush=True)
    return rows, errors


def attempt(name: str, action: Callable[[], object]) -> object | None:
    """The result of `action`; None, and the error printed, if it fails."""
    try:
        with torch.inference_mode():
            return action()
    except Exception as error:  # the other measurements go on
        print(f"{name}: {error!r:.1500}", flush=True)
        return None


def make_layers(shape: MoEShape, device: str, dtype: torch.dtype = torch.bfloat16) -> list[tuple[SparseMoE, RMSNorm]]:
    """Layers of random weights, each with the norm after it."""
    options = {"names": MERGED, "activation": "clamped", "bias": True} if shape.is_gpt_oss else {"names": QWEN_NAMES}
    sizes = shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.k
    layers = []
    for _ in range(shape.num_layers):
        with torch.device(device):
            layer = SparseMoE(*sizes, TensorParallel(), **options).to(dtype)
            norm = RMSNorm(shape.hidden_size, 1e-6).to(dtype)
        for param in layer.parameters():
            param.data.normal_(0, param.shape[-1] ** -0.5)
        norm.weight.data.fill_(1)
        layers.append((layer, norm))
    return layers


def run_once(layer_and_norm: tuple[SparseMoE, RMSNorm], shape: MoEShape, num_tokens: int) -> None:
    layer, norm = layer_and_norm
    x = torch.zeros(num_tokens, shape.hidden_size, device="cuda", dtype=torch.bfloat16)
    norm(layer(x), torch.zeros_like(x))


def measure(
    layers: list[tuple[SparseMoE, RMSNorm]], shape: MoEShape, num_tokens: int, device: str, ceilings: Ceilings
) -> dict[str, float]:
    """A layer's microseconds, its floor's, and how many experts are hit."""
    x = torch.randn(num_tokens, shape.hidden_size, device=device, dtype=torch.bfloat16)
    residual = torch.zeros_like(x)
    hits: list[int] = []

    def run(layer: SparseMoE, norm: nn.Module, state: list[torch.Tensor], count: bool = False) -> None:
        if count:
            hits.append(route(layer.gate(state[0]), shape.k, True)[1].unique().numel())
        state[0], _ = norm(layer(state[0]), residual)

    state = [x]
    for layer, norm in layers:  # compiles every kernel, too
        run(layer, norm, state, count=True)
    state = [x]
    launches = [lambda layer=layer, norm=norm: run(layer, norm, state) for layer, norm in layers] * 2
    seconds = median_seconds(in_one_go(launches, device), device) / len(launches)
    num_hit = sum(hits) / len(hits)
    memory_s, math_s = shape.floor_s(num_tokens, num_hit, ceilings)
    return {
        "hit": num_hit,
        "microseconds": seconds * 1e6,
        "memory_us": memory_s * 1e6,
        "math_us": math_s * 1e6,
        "percent": 100 * max(memory_s, math_s) / seconds,
    }


def largest_error(layer_and_norm: tuple[SparseMoE, RMSNorm], shape: MoEShape, num_tokens: int, device: str) -> float:
    """The largest difference from a plain loop over the experts, over the standard deviation of the loop's result."""
    layer = layer_and_norm[0]
    experts = layer.experts
    x = torch.randn(num_tokens, shape.hidden_size, device=device, dtype=torch.bfloat16)
    weights, ids = route(layer.gate(x), shape.k, layer.renormalize)

    def product(weight: torch.Tensor, bias: torch.Tensor | None, e: int, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, weight[e], None if bias is None else bias[e])

    want = loop_over_experts(
        x,
        weights,
        ids,
        shape.num_experts,
        0,
        lambda e, rows: gate_reference(product(experts.gate_up, experts.gate_up_bias, e, rows), experts.activation),
        lambda e, rows: product(experts.down, experts.down_bias, e, rows),
    )
    out = experts(x, weights, ids).total()
    return float((out.float() - want.float()).abs().max() / want.float().std())


def report_lines(rows: list[dict]) -> list[str]:
    cells = [
        [
            f"{row['shape']}, {row['tokens']}",
            f"{row['hit']:.0f}",
            f"{row['microseconds']:.1f}",
            f"{row['memory_us']:.1f}",
            f"{row['math_us']:.1f}",
            f"{row['percent']:.0f} %",
        ]
        for row in rows
    ]
    return table_lines(["shape, tokens", "experts hit", "µs a layer", "to read", "to multiply", "of the floor"], cells)


if __name__ == "__main__":
    main()
