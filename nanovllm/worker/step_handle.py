"""A launched step, through which the engine reads the step's tokens when it needs them."""

from dataclasses import dataclass

import torch

from nanovllm.outputs import TokenLogprobs
from nanovllm.step_plan import StepPlan
from nanovllm.worker.cuda_graph import StepShape
from nanovllm.worker.logit_extras import PendingLogprobs


@dataclass(slots=True)
class LaunchedStep:
    """A step whose plain part is launched: what its last part needs, the extras and the copy of tokens to the host."""

    plan: StepPlan
    shape: StepShape
    slot: int  # of the buffers on the host
    hidden: torch.Tensor  # [tokens, hidden_size]
    logits: torch.Tensor | None  # [>= num_samples, vocab]; None without samples, or if no extras are asked for


@dataclass(slots=True)
class StepHandle:
    """A launched step. Every method but `is_done` waits until the device has finished it."""

    sampled: torch.Tensor  # [num_samples] int32, on the host
    done: torch.cuda.Event | None
    extras: PendingLogprobs | None = None
    awaits_masks: LaunchedStep | None = None  # then it has no tokens: `ModelRunner.draw` makes another handle

    def is_done(self) -> bool:
        return self.done is None or self.done.query()

    def tokens(self) -> list[int]:
        self._wait()
        return self.sampled.tolist()

    def logprobs(self) -> list[TokenLogprobs | None]:
        """One item per sampled token; None where the plan's `logprobs` does not ask for it."""
        self._wait()
        return self.extras.sample_logprobs() if self.extras else [None] * len(self.sampled)

    def prompt_logprobs(self) -> list[list[TokenLogprobs]]:
        """One list per span of the plan's `prompt_logprobs`: the log-probabilities of its tokens."""
        self._wait()
        return self.extras.prompt_logprobs() if self.extras else []

    def _wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()
