"""A step that has been launched: its tokens, once there are any."""

from dataclasses import dataclass

import torch

from nanovllm.outputs import TokenLogprobs
from nanovllm.worker.logit_extras import PendingLogprobs


@dataclass(slots=True)
class StepHandle:
    """A launched step. Whatever is read from it waits for it."""

    sampled: torch.Tensor  # [num_samples] int32, on the host
    done: torch.cuda.Event | None
    extras: PendingLogprobs | None = None

    def is_done(self) -> bool:
        return self.done is None or self.done.query()

    def tokens(self) -> list[int]:
        self._wait()
        return self.sampled.tolist()

    def logprobs(self) -> list[TokenLogprobs | None]:
        """Of each sampled token, None where the plan's `logprobs` did not ask."""
        self._wait()
        return self.extras.samples() if self.extras else [None] * len(self.sampled)

    def prompt_logprobs(self) -> list[list[TokenLogprobs]]:
        """Of the tokens of each of the plan's `prompt_logprobs`."""
        self._wait()
        return self.extras.spans() if self.extras else []

    def _wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()
