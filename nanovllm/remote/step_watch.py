"""Notices a step that does not end. A GPU that hangs raises nothing, and its engine would serve nobody for good."""

from math import inf

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.pacing import Pacing

# On a GPU as long as vLLM waits for one (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS). On a CPU a step ends, and a large one may
# take longer.
LONGEST_STEP_S = {"cuda": 300.0, "cpu": inf}


class StepWatch:
    """Looks again and again whether an engine has done a step since the last look.

    It counts looks and reads no clock: a process that was stopped for an hour has not worked for one.

    Attributes:
        longest_s: seconds of looks without a step, though there was work, after which it is stalled.
    """

    def __init__(self, engine: LLMEngine, pacing: Pacing, look_s: float) -> None:
        """`look_s`: seconds from look to look."""
        self.longest_s = LONGEST_STEP_S[engine.runner.device]
        self._engine, self._pacing, self._look_s = engine, pacing, look_s
        self._num_steps = self._num_looks = 0

    def is_stalled(self) -> bool:
        """Look."""
        num_steps = self._engine.stats.num_steps
        has_work = self._engine.has_unfinished_requests and not self._pacing.is_paused
        is_same = has_work and num_steps == self._num_steps
        self._num_steps, self._num_looks = num_steps, self._num_looks + 1 if is_same else 0
        return self._num_looks * self._look_s > self.longest_s
