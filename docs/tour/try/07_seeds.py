"""Does a request get the same tokens whoever shares its batch?

The real engine with the demo model in float32, temperature 1. One request with a seed runs alone, then among seven
others, then in a cache so small and with so few tokens a step that its prompt is cut and it is preempted. After that
the noise itself: 20,000 draws over four logits. Expect: equal tokens in the first three, others with another seed; and
frequencies as softmax says.
"""

import torch

from nanovllm import LLM, SamplingParams, demo_model
from nanovllm.kernels.sampling.gumbel_noise import gumbel, noise_bits, noise_keys, spread_indices

PROMPT = "class Queue:\n    def __init__(self):\n        self.items = []\n\n    def put(self, item):\n"
OTHERS = [f"def step_{i}(x):\n    return x + {i}\n\n\ndef" for i in range(7)]


def ask(llm: LLM, seed: int, before: int, after: int) -> tuple[list[int], int]:
    """(tokens, preemptions) of the request, with so many others before it in the queue and behind it."""
    engine, encode = llm.engine, llm.get_tokenizer().encode
    prompts = [*OTHERS[:before], PROMPT, *OTHERS[before : before + after]]
    params = [SamplingParams(temperature=1.0, seed=100 + i, max_tokens=40, ignore_eos=True) for i in range(8)]
    params[before] = SamplingParams(temperature=1.0, seed=seed, max_tokens=40, ignore_eos=True)
    seqs = [engine.make_sequence(encode(p), each) for p, each in zip(prompts, params, strict=False)]
    for seq in seqs:
        engine.add(seq)
    while engine.num_unfinished:
        engine.step()
    return seqs[before].output_token_ids, seqs[before].num_preemptions


def frequencies(logits: torch.Tensor, num_draws: int) -> torch.Tensor:
    """How often each token is drawn at positions 0, 1, 2, …, by the engine's own noise."""
    positions = torch.arange(num_draws, dtype=torch.int32).unsqueeze(1)
    seed = torch.tensor([[7]], dtype=torch.int32)
    noise = gumbel(noise_bits(spread_indices(len(logits), logits.device), *noise_keys(seed, seed * 0, positions)))
    return torch.bincount((logits + noise).argmax(1), minlength=len(logits)) / num_draws


def main() -> None:
    torch.set_num_threads(1)  # so small a model is not faster with more
    with LLM(demo_model(), dtype="float32", device="cpu", kvcache_block_size=16) as llm:
        alone, _ = ask(llm, seed=42, before=0, after=0)
        print(f"in a batch of 8 as alone: {ask(llm, seed=42, before=3, after=4)[0] == alone}")
        print(f"with another seed: {ask(llm, seed=43, before=0, after=0)[0] == alone}")
    tight = {"kvcache_block_size": 16, "num_kvcache_blocks": 10, "max_num_batched_tokens": 16, "max_model_len": 160}
    with LLM(demo_model(), dtype="float32", device="cpu", **tight) as llm:
        tokens, num_preemptions = ask(llm, seed=42, before=2, after=0)
        print(f"in chunks of at most 16 tokens, preemptions {num_preemptions}: {tokens == alone}")
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    print("softmax says ", [round(p, 3) for p in logits.softmax(0).tolist()])
    print("drawn        ", [round(p, 3) for p in frequencies(logits, 20_000).tolist()])


if __name__ == "__main__":
    main()
