"""Paged attention on this GPU, against its read bandwidth and matmul rate: where the kernels' constants come from.

    python -m benchmarks.paged_attention [--quick]

Decode is timed on the length mix of the headline workload (256 requests, prompts and outputs uniform in 100..1024) at
four of its steps, on long contexts, and on a few short streams; prefill on whole prompts. One line per set of launch
parameters, the default first. Every timed launch reads other blocks than the ones before it, so that nothing comes out
of L2. The last line is JSON.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from nanovllm.kernels import decode_plan, paged_decode, paged_prefill
from nanovllm.kernels.paged_kv import shared_memory_bytes
from nanovllm.kernels.triton_shim import tl, triton

DTYPE = torch.bfloat16
HEAD_DIM, NUM_KV_HEADS = 128, 8
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM * 2  # K and V of one layer
POOL_TOKENS = 3_000_000
SCALE = HEAD_DIM**-0.5


# --- the device's ceilings --------------------------------------------------------------------------------------------


@triton.jit
def _read_kernel(x_ptr, out_ptr, CHUNK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * CHUNK
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + start + tl.arange(0, CHUNK))))


def median_seconds(launch: Callable[[], object], repeats: int) -> float:
    """Median device time of `launch`, each run between its own pair of events."""
    launch()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def read_bandwidth() -> float:
    """Bytes a second of a kernel that only reads."""
    x = torch.ones(2**30, dtype=torch.int32, device="cuda")
    best = 0.0
    for chunk, num_warps in ((4096, 4), (8192, 8), (16384, 8)):
        out = torch.empty(x.numel() // chunk, dtype=torch.int32, device="cuda")

        def launch(chunk: int = chunk, num_warps: int = num_warps, out: torch.Tensor = out) -> None:
            _read_kernel[(out.numel(),)](x, out, CHUNK=chunk, num_warps=num_warps)

        best = max(best, 4 * x.numel() / median_seconds(launch, 10))
    return best


def matmul_rate() -> float:
    """FLOP/s of a bf16 matmul of 8192^3."""
    a, b = (torch.randn(8192, 8192, dtype=DTYPE, device="cuda") for _ in range(2))
    return 2 * 8192**3 / median_seconds(lambda: a @ b, 10)


# --- decode -----------------------------------------------------------------------------------------------------------


def decode_scenarios() -> dict[str, list[int]]:
    """Context lengths of the sequences of one decode step, by name."""
    random.seed(0)
    prompts = [len([random.randint(0, 10000) for _ in range(random.randint(100, 1024))]) for _ in range(256)]
    outputs = [random.randint(100, 1024) for _ in range(256)]
    mixes = {
        f"step{step}": [prompt + step for prompt, most in zip(prompts, outputs, strict=True) if most > step]
        for step in (0, 300, 600, 900)
    }
    few = {f"{streams}x400": [400] * streams for streams in (1, 8, 32)}
    return {**mixes, "8x32k": [32768] * 8, "1x32k": [32768], **few}


class Pool:
    """A cache of POOL_TOKENS tokens whose blocks are dealt out at random, none twice to the same graph."""

    def __init__(self) -> None:
        self.storage = torch.empty(POOL_TOKENS * TOKEN_BYTES // 2, dtype=DTYPE, device="cuda").normal_()

    def caches(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        num_blocks = POOL_TOKENS // block_size
        size = (2, num_blocks, NUM_KV_HEADS, block_size, HEAD_DIM)
        return self.storage[: 2 * num_blocks * NUM_KV_HEADS * block_size * HEAD_DIM].view(size).unbind(0)

    def tables(self, lengths: list[int], block_size: int, count: int) -> list[torch.Tensor]:
        """`count` block tables `[S, max_blocks]` without a block in common."""
        needed = [-(-length // block_size) for length in lengths]
        ids = torch.randperm(POOL_TOKENS // block_size, generator=torch.Generator().manual_seed(0)).int()
        tables = torch.zeros(count, len(lengths), max(needed), dtype=torch.int32)
        used = 0
        for table in tables:
            for row, blocks in enumerate(needed):
                table[row, :blocks] = ids[used : used + blocks]
                used += blocks
        return list(tables.cuda())


def time_decode(
    pool: Pool,
    lengths: list[int],
    block_size: int,
    config: paged_decode.DecodeConfig,
    programs_per_sm: int = decode_plan.PROGRAMS_PER_SM,
    min_piece: int = decode_plan.MIN_PIECE,
    num_heads: int = 16,
    tables_of: dict | None = None,
) -> float:
    """Seconds a launch of decode attention takes inside a CUDA graph."""
    key = (tuple(lengths), block_size)
    tables_of = {} if tables_of is None else tables_of
    if key not in tables_of:
        launches = max(4, min(128, 400_000_000 // (sum(lengths) * TOKEN_BYTES)))
        tables_of[key] = pool.tables(lengths, block_size, launches)
    tables = tables_of[key]
    k_cache, v_cache = pool.caches(block_size)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    rows = torch.arange(len(lengths), dtype=torch.int32, device="cuda")
    q = torch.randn(len(lengths), num_heads, HEAD_DIM, dtype=DTYPE, device="cuda")
    out = torch.empty_like(q)
    num_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    plan = decode_plan.DecodePlan.allocate(
        len(lengths),
        num_heads,
        NUM_KV_HEADS,
        HEAD_DIM,
        "cuda",
        target_pieces=-(-programs_per_sm * num_sms // NUM_KV_HEADS),
        min_piece=min_piece,
    )
    decode_plan.plan_decode_triton(seq_lens, NUM_KV_HEADS, plan)

    def launch(table: torch.Tensor) -> None:
        paged_decode.paged_decode_triton(q, k_cache, v_cache, table, rows, seq_lens, plan, SCALE, out, config)

    launch(tables[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for table in tables:
            launch(table)
    return median_seconds(graph.replay, 9) / len(tables)


def bench_decode(pool: Pool, bandwidth: float, quick: bool) -> list[dict]:
    """Decode attention over launch parameters and cutting parameters; prints a table."""
    scenarios = decode_scenarios()
    default = paged_decode.decode_config(HEAD_DIM, 2, shared_memory_bytes(torch.device("cuda")))
    config = paged_decode.DecodeConfig
    cut = (decode_plan.PROGRAMS_PER_SM, decode_plan.MIN_PIECE)
    variants = [(256, default, *cut), (64, default, *cut), (16, default, *cut)]
    tiles, warps, stages = ((64, 128), (4,), (2, 3, 4)) if quick else ((32, 64, 128), (4, 8), (2, 3, 4))
    variants += [(256, config(t, w, s), *cut) for t in tiles for w in warps for s in stages]
    variants += [(64, config(128, 4, 3), *cut), (64, config(64, 4, 4), *cut)]
    programs, pieces = ((8, 32), (128, 512)) if quick else ((4, 8, 16, 32), (128, 256, 512))
    variants += [(256, default, p, m) for p in programs for m in pieces]
    variants = list(dict.fromkeys(variants))

    print(f"\npaged_decode, 16 heads on {NUM_KV_HEADS}, TB/s (read: {bandwidth / 1e12:.2f}); short streams in us")
    print("block tile warps stages prog/SM piece " + " ".join(f"{name:>7}" for name in scenarios))
    results, tables_of = [], {}
    for block_size, launch, programs_per_sm, min_piece in variants:
        row = {"block_size": block_size, **asdict(launch), "programs_per_sm": programs_per_sm, "min_piece": min_piece}
        cells = []
        try:
            for name, lengths in scenarios.items():
                seconds = time_decode(
                    pool, lengths, block_size, launch, programs_per_sm, min_piece, tables_of=tables_of
                )
                row[name] = seconds * 1e6
                tera = sum(lengths) * TOKEN_BYTES / seconds / 1e12
                cells.append(f"{seconds * 1e6:7.1f}" if name.endswith("x400") else f"{tera:7.2f}")
        except triton.runtime.errors.OutOfResources as error:
            cells.append(f"does not fit: {error}"[:60])
        results.append(row)
        print(
            f"{block_size:5} {launch.tile:4} {launch.num_warps:5} {launch.num_stages:6} {programs_per_sm:7} "
            f"{min_piece:5} " + " ".join(cells),
            flush=True,
        )
    return results


def bench_plan() -> dict:
    """Seconds of the plan, once a step, inside a CUDA graph."""
    result = {}
    for num_seqs in (1, 256, 1024):
        seq_lens = torch.randint(1, 2048, (num_seqs,), dtype=torch.int32, device="cuda")
        plan = decode_plan.DecodePlan.allocate(num_seqs, 16, NUM_KV_HEADS, HEAD_DIM, "cuda")
        decode_plan.plan_decode(seq_lens, NUM_KV_HEADS, plan)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(50):
                decode_plan.plan_decode(seq_lens, NUM_KV_HEADS, plan)
        result[num_seqs] = median_seconds(graph.replay, 9) / 50 * 1e6
    print("\nplan_decode: " + ", ".join(f"{us:.1f} us for {n} sequences" for n, us in result.items()))
    return result


# --- prefill ----------------------------------------------------------------------------------------------------------


def bench_prefill(pool: Pool, rate: float, quick: bool) -> list[dict]:
    """Prefill attention of whole prompts over launch parameters; prints a table."""
    default = paged_prefill.prefill_config(HEAD_DIM, 2, shared_memory_bytes(torch.device("cuda")))
    config = paged_prefill.PrefillConfig
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
                flops = 4 * num_heads * HEAD_DIM * num_seqs * length * (length + 1) / 2
                try:
                    seconds = time_prefill(pool, num_seqs, length, num_heads, launch)
                except triton.runtime.errors.OutOfResources as error:
                    cells.append(f"does not fit: {error}"[:60])
                    break
                row[name] = flops / seconds / 1e12
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


def time_prefill(
    pool: Pool, num_seqs: int, length: int, num_heads: int, config: paged_prefill.PrefillConfig | None
) -> float:
    """Seconds of one launch over `num_seqs` whole prompts; without a config, of torch's SDPA on dense tensors."""
    q = torch.randn(num_seqs * length, num_heads, HEAD_DIM, dtype=DTYPE, device="cuda")
    if config is None:
        dense = q.view(num_seqs, length, num_heads, HEAD_DIM).transpose(1, 2)
        keys = torch.randn(num_seqs, NUM_KV_HEADS, length, HEAD_DIM, dtype=DTYPE, device="cuda")
        attention = torch.nn.functional.scaled_dot_product_attention
        return median_seconds(lambda: attention(dense, keys, keys, is_causal=True, enable_gqa=True), 7)
    table = pool.tables([length] * num_seqs, 256, 1)[0]
    k_cache, v_cache = pool.caches(256)
    rows = torch.arange(num_seqs, dtype=torch.int32, device="cuda")
    query_start = torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda") * length
    seq_lens = torch.full((num_seqs,), length, dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)
    arguments = (q, k_cache, v_cache, table, rows, query_start, seq_lens, SCALE, out)
    return median_seconds(lambda: paged_prefill.paged_prefill_triton(*arguments, config=config), 7)


# --- correctness ------------------------------------------------------------------------------------------------------


def check(pool: Pool) -> dict:
    """Relative error of both kernels to their references; raises SystemExit where it is not bf16's."""
    lengths = [1, 700, 64, 2500, 256]
    errors = {}
    rows = torch.arange(len(lengths), dtype=torch.int32, device="cuda")
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    query_start = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    for block_size in (256, 64, 16):
        cache = (*pool.caches(block_size), pool.tables(lengths, block_size, 1)[0], rows)
        for name, num_tokens in (("decode", len(lengths)), ("prefill", sum(lengths))):
            q = torch.randn(num_tokens, 16, HEAD_DIM, dtype=DTYPE, device="cuda")
            out, expected = torch.full_like(q, float("nan")), torch.empty_like(q)
            if name == "decode":
                plan = decode_plan.DecodePlan.allocate(len(lengths), 16, NUM_KV_HEADS, HEAD_DIM, "cuda")
                plan = decode_plan.plan_decode(seq_lens, NUM_KV_HEADS, plan)
                paged_decode.paged_decode(q, *cache, seq_lens, plan, SCALE, out)
                paged_decode.paged_decode_reference(q, *cache, seq_lens, SCALE, expected)
            else:
                paged_prefill.paged_prefill(q, *cache, query_start, seq_lens, SCALE, out)
                paged_prefill.paged_prefill_reference(q, *cache, query_start, seq_lens, SCALE, expected)
            error = ((out.double() - expected.double()).norm() / expected.double().norm()).item()
            errors[f"{name}_{block_size}"] = error
            if not error < 5e-3:
                raise SystemExit(f"{name} at block size {block_size} is wrong: relative error {error}")
    print("relative error to the references: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    return errors


def main() -> None:
    """Run everything and print the tables and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer variants, under a minute")
    parser.add_argument("--only", choices=("decode", "prefill"), help="leave the other out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    began = time.perf_counter()
    torch.manual_seed(0)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    result["read_bytes_per_s"], result["matmul_flop_per_s"] = read_bandwidth(), matmul_rate()
    print(
        f"{result['device']}, torch {result['torch']}, Triton {result['triton']}: read "
        f"{result['read_bytes_per_s'] / 1e12:.2f} TB/s, matmul {result['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s"
    )
    pool = Pool()
    result["errors"] = check(pool)
    if arguments.only != "prefill":
        result["decode_us"] = bench_decode(pool, result["read_bytes_per_s"], arguments.quick)
        result["plan_us"] = bench_plan()
    if arguments.only != "decode":
        result["prefill_tflop_per_s"] = bench_prefill(pool, result["matmul_flop_per_s"], arguments.quick)
    result["seconds"] = time.perf_counter() - began
    print(f"\n{result['seconds']:.0f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
