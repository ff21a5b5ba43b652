"""Times a decode step for each kind of sampling parameters: `python -m benchmarks.sampling_cost`.

`--batch` sequences of `--context` tokens decode as in normal use (overlap, CUDA graphs). The kinds take turns, for
`--rounds` rounds, so that a drift of the machine affects all alike. The table has the milliseconds a step of each
kind's best round, and the difference from a temperature alone, which costs nothing extra by design. The last line is
JSON.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.machine import describe_machine, describe_versions
from benchmarks.report import table_lines
from nanovllm import LLM, SamplingParams

PLAIN = "temperature alone"
CASES: dict[str, Callable[[int], dict[str, Any]]] = {  # the parameters that sequence i sets besides a temperature
    PLAIN: lambda i: {},
    "greedy": lambda i: {"temperature": 0.0},
    "top_p of one request": lambda i: {"top_p": 0.9} if i == 0 else {},
    "top_k=50": lambda i: {"top_k": 50},
    "top_p=0.9": lambda i: {"top_p": 0.9},
    "top_k=50, top_p=0.9": lambda i: {"top_k": 50, "top_p": 0.9},
    "min_p=0.05": lambda i: {"min_p": 0.05},
    "penalties of one request": lambda i: {"repetition_penalty": 1.1} if i == 0 else {},
    "penalties": lambda i: {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    "logit_bias of 100 tokens": lambda i: {"logit_bias": dict.fromkeys(range(100), 1.0)},
    "logprobs=0": lambda i: {"logprobs": 0},
    "logprobs=5": lambda i: {"logprobs": 5},
}


def start(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> None:
    """Add the sequences and run steps until all of them decode."""
    engine, context = llm.engine, len(prompts[0])
    for prompt, asked in zip(prompts, params, strict=True):
        engine.add(engine.make_sequence(prompt, asked))
    engine.step()
    while engine.scheduler.waiting or any(seq.num_tokens < context + 4 for seq in engine.scheduler.running):
        engine.step()


def seconds_per_step(llm: LLM, prompts: list[list[int]], asked: Callable[[int], dict[str, Any]], steps: int) -> float:
    params = [
        SamplingParams(**{"temperature": 0.6, "max_tokens": steps + 64, "ignore_eos": True, **asked(i)})
        for i in range(len(prompts))
    ]
    start(llm, prompts, params)
    begin = perf_counter()
    for _ in range(steps):
        llm.engine.step()
    if llm.engine.runner.is_cuda:
        torch.cuda.synchronize()
    elapsed = perf_counter() - begin
    llm.engine.abort(list(llm.engine.scheduler.running))
    return elapsed / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "shapes" / "qwen3-0.6b"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    llm = LLM(
        args.model, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=args.batch, seed=0
    )
    rng = random.Random(0)
    prompts = [[rng.randrange(llm.engine.vocab_size) for _ in range(args.context)] for _ in range(args.batch)]
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(args.rounds):
        for name, asked in CASES.items():
            seconds[name].append(seconds_per_step(llm, prompts, asked, args.steps))
    best = {name: min(times) for name, times in seconds.items()}
    more = {name: 100 * (time / best[PLAIN] - 1) for name, time in best.items()}
    print(f"{args.batch} sequences of {args.context} tokens, vocabulary {llm.engine.vocab_size:,}")
    rows = [[name, f"{1e3 * time:.3f}", f"{more[name]:+.1f}"] for name, time in best.items()]
    print(*table_lines(["every request asks", "ms a step", "% more"], rows), sep="\n")
    report = {"seconds_per_step": seconds, "percent_more": more, "arguments": vars(args)}
    print(json.dumps(report | {"machine": describe_machine(str(llm.engine.runner.device)), **describe_versions()}))
    llm.close()


if __name__ == "__main__":
    main()
