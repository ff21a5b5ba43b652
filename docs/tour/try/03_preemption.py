"""What happens when a running request needs a block and there is none?

The real engine with the demo model, once with room for all and once with 10 blocks of 16 tokens, which is too little
for four requests. A token budget of 32 cuts longer prompts into chunks. Expect: the latest arrivals are preempted,
the first one never; all four end; and every token is the same as with room enough.
"""

import torch

from nanovllm import LLM, SamplingParams, demo_model

PROMPTS = [
    "def mean(values: list[float]) -> float:\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import json\n\n\ndef load(path):\n    with open(path) as file:\n",
    "for line in sys.stdin:\n",
]
PARAMS = SamplingParams(temperature=0.7, seed=1, max_tokens=48, ignore_eos=True)


def run(num_blocks: int, trace: bool) -> tuple[list[list[int]], int]:
    """(the tokens of each answer, number of preemptions) of an engine with so many blocks."""
    sizes = {"num_kvcache_blocks": num_blocks, "kvcache_block_size": 16, "max_num_batched_tokens": 32}
    sizes["max_model_len"] = 160  # what 10 blocks hold
    with LLM(demo_model(), dtype="float32", device="cpu", **sizes) as llm:
        engine, scheduler = llm.engine, llm.engine.scheduler
        seqs = [engine.make_sequence(llm.get_tokenizer().encode(prompt), PARAMS) for prompt in PROMPTS]
        for seq in seqs:
            engine.add(seq)
        preempted, steps = 0, 0
        while engine.num_unfinished:
            engine.step()
            steps += 1
            if trace and scheduler.num_preemptions > preempted:
                preempted = scheduler.num_preemptions
                running = [seqs.index(seq) for seq in scheduler.running]
                waiting = [seqs.index(seq) for seq in scheduler.waiting if not seq.is_finished]
                print(f"step {steps}: a preemption; running {running}, waiting {waiting}")
        if trace:
            print(f"preempted: {[seq.num_preemptions for seq in seqs]} times, by request")
        return [seq.output_token_ids for seq in seqs], steps


def main() -> None:
    torch.set_num_threads(1)  # so small a model is not faster with more
    roomy, fast = run(num_blocks=64, trace=False)
    tight, slow = run(num_blocks=10, trace=True)
    print(f"steps: {fast} with room, {slow} without")
    print(f"tokens equal: {roomy == tight}")


if __name__ == "__main__":
    main()
