"""Times the experts' two products alone with many tiles: `python -m benchmarks.moe --tune --shapes … --tokens …`.

Both products of a layer have tiles of equal rows. So for each number of rows it prints the fastest tilings of either
product, sorted and unsorted, and the table's own time beside them. Candidates are compiled on several threads first,
which takes most of the time: choose one or two shapes and sizes a call.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from itertools import product

import torch

from benchmarks.attention_timing import in_one_go, median_seconds
from benchmarks.ceilings import Ceilings
from nanovllm.kernels.device import shared_memory_bytes
from nanovllm.kernels.moe.expert_product import gated_product, weighted_product
from nanovllm.kernels.moe.experts import SLICED_TOKENS, UNSORTED_PAIRS
from nanovllm.kernels.moe.sort_by_expert import sort_by_expert_triton
from nanovllm.kernels.moe.tilings import Tiling, choose_tilings

SHOWN = 4  # tilings of a product


def candidates(num_rows: int, halves: int, device: torch.device) -> Iterator[Tiling]:
    """Tilings that fit into the shared memory and the registers."""
    if num_rows < 64:
        shapes = product((16, 32, 64), (64, 128, 256), (3, 4, 6), (4,), (1,), (False,))
    else:
        shapes = product((64, 128, 256 // halves), (64, 128), (3, 4), (4, 8), (8,), (False, True))
    for weight_rows, columns, depth, warps, group, copy_engine in dict.fromkeys(shapes):
        stage = 2 * (num_rows + halves * weight_rows) * columns
        accumulators = num_rows * halves * weight_rows // (32 * warps)  # registers of a thread
        if 16_384 < depth * stage <= shared_memory_bytes(device) - 2048 and accumulators <= 160:
            yield Tiling(num_rows, weight_rows, columns, depth, warps, group, copy_engine)


def tune(name: str, shape, all_tokens: list[int], ceilings: Ceilings, deadline: float) -> None:  # noqa: ANN001
    """Print the fastest tilings of both products of a `MoEShape`, for each number of tokens."""
    from benchmarks.moe import make_layers

    layers = [layer.experts for layer, _ in make_layers(shape, "cuda")]
    for num_tokens in all_tokens:
        scores = torch.rand(num_tokens, shape.num_experts, device="cuda")
        ids = [scores.roll(i, 1).topk(shape.k).indices.int() for i in range(len(layers))]
        memory_s, math_s = shape.floor_s(num_tokens, float(ids[0].unique().numel()), ceilings)
        floor = max(memory_s, math_s) * 1e6
        print(f"{name}, {num_tokens} tokens: floors {floor * 2 / 3:.1f} and {floor / 3:.1f} µs", flush=True)
        own = choose_tilings(ids[0].numel(), shape.num_experts, 2, shared_memory_bytes(scores.device))
        pairs_of_each = ids[0].numel() / shape.num_experts
        rows = [r for r in (16, 32, 64, 128) if pairs_of_each / 4 <= r <= max(16, 8 * pairs_of_each)] or [128]
        for num_rows, is_sorted in product(rows, (False, True)):
            if not is_sorted and ids[0].numel() > 2 * UNSORTED_PAIRS:
                continue
            for halves in (2, 1):
                if time.monotonic() > deadline:
                    print("no time left", flush=True)
                    return
                tilings = list(candidates(num_rows, halves, scores.device))
                if own[2 - halves].rows == num_rows:
                    tilings.append(own[2 - halves])
                times = time_tilings(layers, ids, halves, list(dict.fromkeys(tilings)), is_sorted, deadline)
                kind = f"{'gated' if halves == 2 else 'weighted'}, {'sorted' if is_sorted else 'unsorted'}"
                for seconds, tiling in times[:SHOWN]:
                    print(f"  {kind}: {seconds * 1e6:8.1f} µs  {astuple(tiling)}", flush=True)
                for seconds, tiling in times:
                    if tiling == own[2 - halves]:
                        print(f"  {kind}: {seconds * 1e6:8.1f} µs  {astuple(tiling)}: the table's", flush=True)


def time_tilings(
    layers: list, ids: list[torch.Tensor], halves: int, tilings: list[Tiling], is_sorted: bool, deadline: float
) -> list[tuple[float, Tiling]]:
    """(seconds of a layer's product, tiling), the fastest first."""
    num_tokens, k = ids[0].shape
    first = layers[0]
    x = torch.randn(num_tokens, first.hidden_size, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(num_tokens * k, first.intermediate_size, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(num_tokens, k, device="cuda")
    orders: dict[int, list] = {}

    def launches(tiling: Tiling) -> list[Callable[[], object]]:
        if is_sorted and tiling.rows not in orders:
            orders[tiling.rows] = [sort_by_expert_triton(i, 0, first.num_experts, tiling.rows) for i in ids]
        all_orders = orders[tiling.rows] if is_sorted else [None] * len(ids)

        def launch(layer, i: torch.Tensor, order) -> object:  # noqa: ANN001
            if halves == 2:
                return gated_product(x, layer.gate_up, layer.gate_up_bias, i, 0, order, layer.activation, tiling)
            in_slices = num_tokens <= SLICED_TOKENS
            return weighted_product(hidden, layer.down, layer.down_bias, weights, i, 0, order, in_slices, tiling)

        every = zip(layers, ids, all_orders, strict=True)
        return [lambda layer=layer, i=i, order=order: launch(layer, i, order) for layer, i, order in every]

    def compiles(tiling: Tiling) -> bool:
        if time.monotonic() > deadline:
            return False
        try:
            with torch.inference_mode():
                launches(tiling)[0]()
            return True
        except Exception as error:  # the other tilings go on
            print(f"  {astuple(tiling)}: {error!r:.200}", flush=True)
            return False

    if is_sorted:
        launches(tilings[0])
    with ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as threads:
        good = [tiling for tiling, is_good in zip(tilings, threads.map(compiles, tilings), strict=True) if is_good]
    torch.cuda.synchronize()
    times = []
    for tiling in good:
        try:
            all_launches = launches(tiling)
            times.append((median_seconds(in_one_go(all_launches, "cuda"), "cuda") / len(all_launches), tiling))
        except Exception as error:  # the other tilings go on
            print(f"  {astuple(tiling)}: {error!r:.200}", flush=True)
    return sorted(times, key=lambda pair: pair[0])
