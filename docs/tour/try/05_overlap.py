"""What does the host do while the device computes, and what does it send?

The real engine with the demo model. On a CPU host and device are the same cores, so the engine plans no step ahead;
here it is told to, as on a GPU. Expect: step N+1 is launched before the tokens of step N are read; the answer is the
same either way; the only price is one surplus token; and in most steps the host sends the device nothing at all.
"""

import torch

from nanovllm import LLM, SamplingParams, demo_model
from nanovllm.step_plan import StepPlan
from nanovllm.worker.step_handle import StepHandle

PROMPT = "import sys\n\n\ndef main() -> None:\n"


def run(llm: LLM, max_behind: int, params: SamplingParams) -> tuple[list[int], list[str], list[StepPlan]]:
    """(the answer's tokens, the order of launches and reads, the plans) with so many steps launched ahead."""
    engine, log, plans, number = llm.engine, [], [], {}
    launch, tokens = engine.runner.launch, StepHandle.tokens

    def logged_launch(plan: StepPlan) -> StepHandle:
        handle = launch(plan)
        number[id(handle)] = len(plans)
        log.append(f"launch {len(plans)}")
        plans.append(plan)
        return handle

    def logged_tokens(handle: StepHandle) -> list[int]:
        log.append(f"read {number[id(handle)]}")
        return tokens(handle)

    engine.max_behind, engine.runner.launch, StepHandle.tokens = max_behind, logged_launch, logged_tokens
    try:
        engine.reset_prefix_cache()
        answer = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids
    finally:
        del engine.runner.launch
        StepHandle.tokens = tokens
    return list(answer), log, plans


def main() -> None:
    torch.set_num_threads(1)  # so small a model is not faster with more
    with LLM(demo_model(), dtype="float32", device="cpu", kvcache_block_size=16) as llm:
        whole, _, _ = run(llm, 0, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
        stop = next(token for i, token in enumerate(whole) if i > 20 and token not in whole[:i])
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, stop_token_ids=[stop])
        plain, in_turn, few = run(llm, 0, params)
        ahead, overlapped, more = run(llm, 1, params)
    print(f"one after the other: {', '.join(in_turn[:6])}, …")
    print(f"one step ahead: {', '.join(overlapped[:6])}, …")
    print(f"tokens equal: {plain == ahead}; surplus tokens: {len(more) - len(few)} of {len(more)}")
    silent = sum(not plan.new_rows and not plan.new_blocks for plan in more)
    blocks = sum(len(plan.new_blocks) for plan in more)
    print(f"of {len(more)} steps the host sends nothing new in {silent}: {blocks} blocks and one row in the others")


if __name__ == "__main__":
    main()
