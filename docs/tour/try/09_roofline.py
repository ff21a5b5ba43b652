"""How fast could it be at best, and is a figure worth anything?

The roofline of upstream's benchmark, from the bytes and FLOPs that Qwen3-0.6B cannot avoid and the ceilings measured in
one run on an H100 (docs/lab-notebook.md): 3.08 TB/s and 778 TFLOP/s. Then this machine, and a mistake: the same prompts
again, with the prefix cache as the first run left it. Expect: reading keys and values is nearly all of the roofline;
22,075 tok/s are five sixths of it; and the second run, which computes almost no prompt, looks several times faster.
"""

import random
from time import perf_counter

import torch

from nanovllm import LLM, SamplingParams, demo_model

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, INNER, VOCAB = 28, 1024, 16, 8, 128, 3072, 151_936
READ, MATMUL, MEASURED = 3.08e12, 778e12, 22_075  # bytes/s, FLOP/s, tok/s


def headline() -> list[tuple[int, int]]:
    """(prompt's tokens, answer's tokens) of each request, drawn as upstream's bench.py draws them."""
    random.seed(0)
    inputs = []
    for _ in range(256):
        inputs.append(random.randint(100, 1024))
        for _ in range(inputs[-1]):
            random.randint(0, 10_000)  # the token ids, which we do not need
    return [(length, random.randint(100, 1024)) for length in inputs]


def main() -> None:
    torch.set_num_threads(1)  # so small a model is not faster with more
    lengths = headline()
    layer_weights = HIDDEN * DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER
    weights, head = LAYERS * layer_weights, HIDDEN * VOCAB
    kv_bytes = LAYERS * 2 * KV_HEADS * DIM * 2  # of a token, in bfloat16
    outputs = sum(n for _, n in lengths)
    steps = max(n for _, n in lengths) - 1  # a prompt's step gives the first token
    seen = sum((n - 1) * inputs + n * (n - 1) // 2 for inputs, n in lengths)  # tokens that decodes read
    kv_s, weight_s = seen * kv_bytes / READ, steps * 2 * (weights + head) / READ
    pairs = sum(n * (n + 1) // 2 for n, _ in lengths)  # of a query and a key in the prompts
    flops = 2 * weights * sum(n for n, _ in lengths) + 2 * head * len(lengths) + 4 * LAYERS * HEADS * DIM * pairs
    total = kv_s + weight_s + flops / MATMUL
    print(f"{outputs:,} output tokens in {steps:,} decode steps; they read {seen * kv_bytes / 1e12:.2f} TB of K and V")
    print(
        f"K and V {kv_s:.2f} s, weights {weight_s:.2f} s, prompts {flops / MATMUL:.2f} s: {outputs / total:,.0f} tok/s"
    )
    print(f"measured {MEASURED:,} tok/s: {MEASURED / (outputs / total):.1%} of the roofline")

    x = torch.ones(1 << 26)  # 256 MB: far more than a cache
    seconds = []
    for _ in range(4):
        start = perf_counter()
        x.sum()
        seconds.append(perf_counter() - start)
    print(f"here: one thread reads {x.numel() * 4 / min(seconds) / 1e9:.1f} GB/s")
    prompts, rates, found = [[i] * 512 for i in range(1, 9)], [], []
    with LLM(demo_model(), device="cpu") as llm:
        cache = llm.engine.block_manager.stats
        for is_emptied in (True, False, True):
            if is_emptied:
                llm.reset_prefix_cache()
            hits, start = cache.prefix_hits, perf_counter()
            llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
            rates.append(8 * 4 / (perf_counter() - start))
            found.append(cache.prefix_hits - hits)
    print(f"prompt tokens that three runs found in the cache: {found} of {8 * 512:,}; it was emptied before the third")
    print(f"here: tok/s of the three runs: {', '.join(f'{rate:.0f}' for rate in rates)}")


if __name__ == "__main__":
    main()
