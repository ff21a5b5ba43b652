"""Times paged attention over its launch parameters on this GPU: the measurement behind the kernels' constants.

    python -m benchmarks.paged_attention [--quick]

It times decode on the headline's length mix (256 requests, prompts and outputs uniform in 100..1024) at four of its
steps, on long contexts, and on a few short streams; and prefill on whole prompts. It prints the GPU's read bandwidth
and matmul rate, then a line for each set of launch parameters, the default first. Every timed launch reads other blocks
than the launches before it, so that no block comes out of L2. The engine itself chooses splits and stages by the number
of sequences. The last line is JSON.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial

import torch

from benchmarks.attention_timing import (
    AttentionShape,
    Pool,
    decode_lengths,
    in_one_go,
    median_seconds,
    prefill_flops,
    time_decode,
    time_prefill,
)
from benchmarks.ceilings import measure_ceilings
from benchmarks.workloads import PRESETS, draw
from nanovllm.kernels.attention import decode_splits, paged_decode_kernel, paged_prefill_kernel
from nanovllm.kernels.device import multiprocessors, shared_memory_bytes
from nanovllm.kernels.triton_shim import triton

SHAPE = AttentionShape(num_heads=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
POOL_TOKENS = 3_000_000


# --- decode -----------------------------------------------------------------------------------------------------------


def decode_scenarios() -> dict[str, list[int]]:
    """Scenario name -> the context lengths of one decode step's sequences."""
    headline = draw("headline", PRESETS["headline"], vocab_size=151936)
    mixes = {f"step{step}": decode_lengths(headline, step) for step in (0, 300, 600, 900)}
    few = {f"{streams}x400": [400] * streams for streams in (1, 8, 32)}
    return {**mixes, "8x32k": [32768] * 8, "1x32k": [32768], **few}


def bench_decode(pool: Pool, bandwidth: float, quick: bool) -> list[dict]:
    """Time decode attention over launch parameters and split parameters. Prints a table."""
    scenarios = decode_scenarios()
    num_sms = multiprocessors(torch.device("cuda"))
    config = paged_decode_kernel.DecodeConfig
    variants = [(block_size, None, None, None) for block_size in (256, 64, 16)]
    tiles, warps, stages = ((64,), (2, 4), (2, 3)) if quick else ((32, 64), (1, 2, 4), (2, 3, 4))
    variants += [(256, config(t, w, s), None, None) for t in tiles for w in warps for s in stages]
    programs, splits = ((2, 4), (128, 512)) if quick else ((2, 3, 4, 8), (64, 128, 256, 512))
    variants += [(256, None, p, m) for p in programs for m in splits]
    variants = list(dict.fromkeys(variants))

    print(f"\npaged_decode, 16 heads on {SHAPE.num_kv_heads}, TB/s (read: {bandwidth / 1e12:.2f}); short streams in us")
    print("block tile warps stages prog/SM split " + " ".join(f"{name:>7}" for name in scenarios))
    results = []
    for block_size, launch, programs_per_sm, min_split in variants:
        row, cut = {"block_size": block_size, **(asdict(launch) if launch else {})}, {}
        if programs_per_sm:
            row |= {"programs_per_sm": programs_per_sm, "min_split": min_split}
            cut = {"target_splits": -(-programs_per_sm * num_sms // SHAPE.num_kv_heads), "min_split": min_split}
        cells = []
        try:
            for name, lengths in scenarios.items():
                seconds = time_decode(pool, lengths, block_size, launch, **cut)
                row[name] = seconds * 1e6
                tera = sum(lengths) * SHAPE.token_bytes / seconds / 1e12
                cells.append(f"{seconds * 1e6:7.1f}" if name.endswith("x400") else f"{tera:7.2f}")
        except triton.runtime.errors.OutOfResources as error:
            cells.append(f"does not fit: {error}"[:60])
        results.append(row)
        shown = [row.get(name, "-") for name in ("tile", "num_warps", "num_stages", "programs_per_sm", "min_split")]
        print("{:5} {:>4} {:>5} {:>6} {:>7} {:>5} ".format(block_size, *shown) + " ".join(cells), flush=True)
    return results


def bench_splits() -> dict:
    """Microseconds that `split_contexts`, which runs once a step, takes inside a CUDA graph, by number of sequences."""
    result = {}
    for num_seqs in (1, 256, 1024):
        seq_lens = torch.randint(1, 2048, (num_seqs,), dtype=torch.int32, device="cuda")
        splits = decode_splits.DecodeSplits.allocate(num_seqs, 16, SHAPE.num_kv_heads, SHAPE.head_dim, "cuda")
        launch = partial(decode_splits.split_contexts, seq_lens, SHAPE.num_kv_heads, splits)
        result[num_seqs] = median_seconds(in_one_go([launch] * 50, "cuda"), "cuda") / 50 * 1e6
    print("\nsplit_contexts: " + ", ".join(f"{us:.1f} us for {n} sequences" for n, us in result.items()))
    return result


# --- prefill ----------------------------------------------------------------------------------------------------------


def bench_prefill(pool: Pool, rate: float, quick: bool) -> list[dict]:
    """Time prefill attention of whole prompts over launch parameters. Prints a table."""
    default = paged_prefill_kernel.prefill_config(SHAPE.head_dim, 2, shared_memory_bytes(torch.device("cuda")))
    config = paged_prefill_kernel.PrefillConfig
    variants = [default, config(128, 64, 8, 3, not default.pack), config(128, 128, 8, 2, True)]
    variants += [config(128, 64, 8, 2, True), config(64, 64, 4, 3, True), config(64, 128, 4, 2, True)]
    if not quick:
        variants += [config(128, 128, 8, 2, False), config(128, 64, 8, 4, True), config(128, 64, 4, 3, True)]
        variants += [config(128, 32, 8, 3, True), config(128, 32, 4, 3, True), config(64, 64, 4, 2, True)]
    variants = list(dict.fromkeys(variants))
    shapes = {"64x2k": (64, 2048), "8x2k": (8, 2048), "1x16k": (1, 16384), "140x1k": (140, 1024)}

    print(f"\npaged_prefill, block 256, TFLOP/s (8192^3 matmul: {rate / 1e12:.0f})")
    print("heads rows tile warps stages pack " + " ".join(f"{name:>7}" for name in shapes))
    results = []
    for num_heads in (16, 32):
        for launch in [*(variants if num_heads == 16 else variants[: 2 if quick else 6]), None]:
            row = {"num_heads": num_heads, **(asdict(launch) if launch else {"sdpa": True})}
            cells = []
            for name, (num_seqs, length) in shapes.items():
                try:
                    if launch is None:
                        seconds = time_sdpa(num_seqs, length, num_heads)
                    else:
                        seconds = time_prefill(pool, num_seqs, length, 256, launch, num_heads)
                except triton.runtime.errors.OutOfResources as error:
                    cells.append(f"does not fit: {error}"[:60])
                    break
                row[name] = prefill_flops(num_heads, SHAPE.head_dim, num_seqs, length) / seconds / 1e12
                cells.append(f"{row[name]:7.0f}")
            results.append(row)
            label = (
                "torch's SDPA, not paged"
                if launch is None
                else (
                    f"{launch.rows:5} {launch.tile:4} {launch.num_warps:5} {launch.num_stages:6} {str(launch.pack):>5}"
                )
            )
            print(f"{num_heads:4} {label:>28} " + " ".join(cells), flush=True)
    return results


def time_sdpa(num_seqs: int, length: int, num_heads: int) -> float:
    """Seconds that torch's SDPA takes over `num_seqs` whole prompts, on dense tensors."""
    q = torch.randn(num_seqs, num_heads, length, SHAPE.head_dim, dtype=SHAPE.dtype, device="cuda")
    keys = torch.randn(num_seqs, SHAPE.num_kv_heads, length, SHAPE.head_dim, dtype=SHAPE.dtype, device="cuda")
    attention = torch.nn.functional.scaled_dot_product_attention
    return median_seconds(lambda: attention(q, keys, keys, is_causal=True, enable_gqa=True), "cuda")


def main() -> None:
    """Time decode and prefill. Prints the tables and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer variants, under a minute")
    parser.add_argument("--only", choices=("decode", "prefill"), help="time only this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    began = time.perf_counter()
    torch.manual_seed(0)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    ceilings = measure_ceilings("cuda", SHAPE.dtype)
    result["read_bytes_per_s"], result["matmul_flop_per_s"] = ceilings.read_bytes_per_s, ceilings.matmul_flops_per_s
    print(
        f"{result['device']}, torch {result['torch']}, Triton {result['triton']}: read "
        f"{result['read_bytes_per_s'] / 1e12:.2f} TB/s, matmul {result['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s"
    )
    pool = Pool(SHAPE, POOL_TOKENS, "cuda")
    if arguments.only != "prefill":
        result["decode_us"] = bench_decode(pool, result["read_bytes_per_s"], arguments.quick)
        result["split_us"] = bench_splits()
    if arguments.only != "decode":
        result["prefill_tflop_per_s"] = bench_prefill(pool, result["matmul_flop_per_s"], arguments.quick)
    result["seconds"] = time.perf_counter() - began
    print(f"\n{result['seconds']:.0f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
