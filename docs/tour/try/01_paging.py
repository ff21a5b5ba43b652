"""How much of the KV cache does paging save?

Upstream's benchmark: 256 requests, prompts and answers of 100 to 1,024 tokens. The engine's own scheduler and block
manager run them all, without a model: every decode "samples" a token at once, since memory depends on lengths alone.
Expect: where each request reserves room for the longest possible one, most of the memory holds nothing; in blocks the
same cache is nearly full, runs about twice as many requests at once, and is done in fewer steps.
"""

import random

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

CACHE = 131_072  # tokens
LONGEST = 2048  # tokens of the longest request: 1,024 of the prompt, 1,024 of the answer


def headline() -> list[tuple[int, int]]:
    """(prompt's tokens, answer's tokens) of each request, drawn as upstream's bench.py draws them."""
    random.seed(0)
    inputs = []
    for _ in range(256):
        inputs.append(random.randint(100, 1024))
        for _ in range(inputs[-1]):
            random.randint(0, 10_000)  # the token ids, which we do not need
    return [(length, random.randint(100, 1024)) for length in inputs]


def run(lengths: list[tuple[int, int]], block_size: int, max_num_seqs: int = 256) -> tuple[int, float, float]:
    """(steps, running requests, tokens in the cache), the last two as means over the steps in which somebody waits."""
    manager = BlockManager(CACHE // block_size, block_size, enable_prefix_caching=False)
    scheduler = Scheduler(manager, max_num_seqs, max_num_batched_tokens=16384)
    for i, (inputs, outputs) in enumerate(lengths):
        params = SamplingParams(max_tokens=outputs, ignore_eos=True)
        scheduler.add(Sequence(str(i), [0] * inputs, params, inputs + outputs, frozenset(), {}, seed=0))
    steps, running, tokens = 0, [], []
    while scheduler.running or scheduler.waiting:
        step = scheduler.schedule()
        steps += 1
        if scheduler.waiting:
            running.append(len(scheduler.running))
            tokens.append(sum(seq.num_computed_tokens for seq in scheduler.running))
        for seq in step.samples:
            seq.append_token(0)
            if seq.is_finished:
                scheduler.finish(seq)
    return steps, sum(running) / len(running), sum(tokens) / len(tokens)


def main() -> None:
    lengths = headline()
    # One block that holds the longest request is a reservation: whoever enters takes it whole.
    for name, block_size in ("reserved", LONGEST), ("blocks of 256", 256), ("blocks of 16", 16):
        steps, running, tokens = run(lengths, block_size)
        print(f"{name}: {running:.0f} requests at once, {tokens / CACHE:.1%} of the memory filled, {steps:,} steps")


if __name__ == "__main__":
    main()
