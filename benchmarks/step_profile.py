"""Shows where a decode step's time goes, by kind of kernel: `python -m benchmarks.step_profile --batches 1,32,256`.

For each batch size, as many sequences of `--context` tokens decode with CUDA graphs, as in normal use, while PyTorch's
profiler records the kernels of `--steps` steps. The profiler slows the host, not the kernels.
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nanovllm import LLM, SamplingParams

KINDS = {  # part of a kernel's name -> its kind; the first part found in the name counts
    # Both times include the rank's wait for other ranks; the one-shot kernel starts early, so its time also includes
    # the wait for the kernel before it.
    "AllReduce": "all-reduce, NCCL",
    "_one_shot_kernel": "all-reduce, one-shot",
    "nccl": "gather",
    "_decode_kernel": "attention",
    "_split_kernel": "attention: splits",
    "rms_norm": "norms",
    "qk_norm_rope": "QK-norm, RoPE, store",
    "silu": "SiLU·mul",
    "_tile_kernel": "GEMMs, few rows",
    "_vector_kernel": "GEMMs, few rows",
    "nvjet": "GEMMs",
    "splitKreduce": "GEMMs",
    "gemm": "GEMMs",
    "cutlass": "GEMMs",
    "scan_kernel": "sampler",
    "choose_kernel": "sampler",
    "prepare_inputs": "prepare inputs",
}


def start(llm: LLM, batch: int, context: int, num_steps: int) -> None:
    """Add `batch` sequences and run steps until all of them decode. None ends within the next `num_steps` steps."""
    engine = llm.engine
    params = SamplingParams(temperature=0.6, max_tokens=num_steps + 64, ignore_eos=True)
    for _ in range(batch):
        prompt = [random.randrange(engine.vocab_size) for _ in range(context)]
        engine.add(engine.make_sequence(prompt, params))
    engine.step()
    while engine.scheduler.waiting or any(seq.num_tokens < context + 4 for seq in engine.scheduler.running):
        engine.step()


def measure(llm: LLM, batch: int, context: int, num_steps: int) -> dict[str, tuple[float, float]]:
    """Kind of kernel -> (launches, microseconds) a step."""
    start(llm, batch, context, num_steps)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        for _ in range(num_steps):
            llm.engine.step()
        torch.cuda.synchronize()
    totals: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for event in trace.key_averages():
        if event.device_time_total > 0:
            kind = next((kind for part, kind in KINDS.items() if part in event.key), "other")
            count, time = totals[kind]
            totals[kind] = (count + event.count / num_steps, time + event.device_time_total / num_steps)
    llm.engine.abort(list(llm.engine.scheduler.running))
    while llm.engine.has_unfinished_requests:
        llm.engine.step()
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "shapes" / "qwen3-0.6b"))
    parser.add_argument("--batches", default="1,8,32,128,256")
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="the profiler records rank 0")
    args = parser.parse_args()
    random.seed(0)
    options = {"max_model_len": 4096, "tensor_parallel_size": args.tensor_parallel_size}
    llm = LLM(args.model, load_format="dummy", skip_tokenizer_init=True, **options)
    for batch in map(int, args.batches.split(",")):
        totals = measure(llm, batch, args.context, args.steps)
        print(f"batch {batch}, context {args.context}")
        for kind, (count, time) in sorted(totals.items(), key=lambda item: -item[1][1]):
            print(f"  {kind:22} {count:6.0f} launches {time:9.0f} µs a step")
        launches, time = map(sum, zip(*totals.values(), strict=True))
        print(f"  {'all':22} {launches:6.0f} launches {time:9.0f} µs a step")


if __name__ == "__main__":
    main()
