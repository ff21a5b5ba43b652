"""Draws under grammars: a step's masks need the tokens of the step before, which come when the step runs already.

So a step with grammars is launched without its last part. When the host has read the step before, it takes each
sequence's matcher up to its newest token and asks which may come next; the device then draws under these masks, before
the next step is launched. All this happens while the device computes, and the other sequences' tokens stay as they are.
"""

from typing import TYPE_CHECKING

from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import NO_TOKEN_LEFT, WHY_NO_TOKEN
from nanovllm.structured_outputs import TokenMasks

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from nanovllm.distributed.ranks import Followers
    from nanovllm.engine.llm_engine import StepInFlight
    from nanovllm.worker.model_runner import ModelRunner


def draw_masked(step: "StepInFlight", runner: "ModelRunner", followers: "Followers") -> None:
    """Let a launched step, which awaits masks, draw under them. The tokens of all steps before it are known."""
    masks = token_masks(step.scheduled.samples, runner.extras.masked_draws.buffer)
    with followers.also_run("draw", masks), followers.time_limit():
        step.handle = runner.draw(step.handle.awaits_masks, masks)


def token_masks(seqs: list[Sequence], buffer: "Callable[[int, int], np.ndarray]") -> TokenMasks:
    """What each sequence with a grammar may draw next. A finished one has no mask, since its token is surplus.

    Args:
        buffer: memory for so many masks of so many int32 words.
    """
    samples = [i for i, seq in enumerate(seqs) if seq.grammar is not None and not seq.is_finished]
    matchers = [seqs[i].grammar for i in samples]
    if not matchers:
        return TokenMasks([], buffer(0, 0))
    new = [
        seqs[i].token_ids[seqs[i].num_prompt_tokens + matcher.num_tokens :]
        for i, matcher in zip(samples, matchers, strict=True)
    ]
    bits = buffer(len(matchers), matchers[0].num_words)
    matchers[0].advance_all(matchers, new, bits)
    return TokenMasks(samples, bits)


def why_no_token(seq: Sequence, token_id: int) -> str:
    """The reason why the sampler returned this negative number."""
    error = seq.grammar.error if seq.grammar is not None and token_id == NO_TOKEN_LEFT else ""
    return f"its grammar cannot be followed any further: {error}" if error else WHY_NO_TOKEN[token_id]
