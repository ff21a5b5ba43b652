"""Decides which sequences run in the next step. Continuous batching: the scheduler makes a new batch for every step.

Orca: Yu et al., OSDI 2022. Prompts are computed in chunks beside the running decodes (Sarathi-Serve: Agrawal et al.,
OSDI 2024), so that a long prompt does not delay the other sequences.
"""

import time
from collections import deque
from dataclasses import dataclass, field

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.new_row import new_row
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.step_plan import PromptSpan, StepPlan

WATERMARK = 0.01  # an admission leaves this share of the blocks free, so that running sequences can grow


@dataclass(slots=True)
class ScheduledStep:
    """A step's plan for the device, and the sequences that its results belong to, in the plan's order."""

    plan: StepPlan = field(default_factory=StepPlan)
    samples: list[Sequence] = field(default_factory=list)  # each gets one token
    scored: list[tuple[Sequence, int]] = field(default_factory=list)  # (sequence, position of the first scored token)


class Scheduler:
    """Serves sequences in their order of arrival, within a token budget, a number of rows, and the cache's blocks.

    Invariant: `running` is in order of arrival, and every waiting sequence arrived after all of them. When blocks run
    out, the scheduler preempts `running[-1]`, the latest arrival: it takes its blocks back and puts it at the head of
    the queue. On resuming, the sequence finds those of its blocks in the prefix cache that no other has taken since.
    The earliest sequence always advances, so every sequence ends.
    """

    def __init__(self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.block_manager = block_manager
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._num_watermark_blocks = int(WATERMARK * block_manager.num_blocks)
        # Every running sequence takes a token of the budget, so extra rows would stay empty.
        self._free_rows = list(range(min(max_num_seqs, max_num_batched_tokens)))[::-1]

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> ScheduledStep:
        """Fill one step's token budget: one token for each decode, then the prompt under way, then new arrivals."""
        step = ScheduledStep()
        self._continue_decodes(step)
        budget = self.max_num_batched_tokens - step.plan.num_decodes
        budget = self._continue_prefills(step, budget)
        self._admit_waiting(step, budget)
        return step

    def finish(self, seq: Sequence) -> None:
        """Take back a finished sequence's row and blocks.

        A step in flight may still compute a surplus token for it. The device works in order, so the next owner of the
        row and the blocks writes there after that.
        """
        if seq.row >= 0:
            self.running.remove(seq)
            self._release(seq)
        # A waiting one is skipped when it reaches the queue's head: removing it here would search the whole queue.

    def preempt_all(self) -> None:
        """Preempt every running sequence. They will resume in their order of arrival."""
        while self.running:
            self._preempt_latest()

    def _continue_decodes(self, step: ScheduledStep) -> None:
        """Plan one token for each sequence whose prompt is computed; preempt the latest arrivals if blocks run out."""
        for seq in self.running:  # a preemption removes the last one, at or after the loop's place
            if seq.num_tokens - seq.num_computed_tokens != 1 or seq.num_tokens >= seq.max_len:
                continue  # its prompt is under way, or its last token is in flight
            if seq.num_computed_tokens >= seq.room_until and not self._make_room(step, seq, 1):
                return
            step.plan.num_decodes += 1
            self._compute(step, seq, 1)

    def _continue_prefills(self, step: ScheduledStep, budget: int) -> int:
        """Plan the next chunk of the prompt that the last budget cut short.

        It is the latest arrival, since nobody is admitted behind a prompt that takes the rest of the budget. So if
        blocks for windows run out, the scheduler preempts it, and nothing that is in the step already.
        """
        for seq in self.running:
            num_new = min(len(seq.token_ids) - seq.num_computed_tokens, budget)
            if num_new > 0 and self._make_room(step, seq, num_new):
                budget -= self._compute(step, seq, num_new)
        return budget

    def _admit_waiting(self, step: ScheduledStep, budget: int) -> None:
        """Admit new arrivals in order, each when its whole prompt has room, until rows, blocks or budget run out."""
        manager = self.block_manager
        while self.waiting and budget > 0 and self._free_rows:
            seq = self.waiting[0]
            if seq.is_finished:  # aborted, or preempted while its last token was in flight
                self.waiting.popleft()
                continue
            if seq.num_in_flight:
                break  # just preempted: its newest token has not arrived yet
            prefix = manager.find_prefix(seq)
            spare = self._num_watermark_blocks if self.running else 0
            needed = manager.num_free_blocks_needed(seq, prefix, self.max_num_batched_tokens)
            if needed + spare > manager.num_free_blocks:
                break
            self.waiting.popleft()
            manager.admit(seq, prefix)
            if seq.num_preemptions == 0:
                seq.num_cached_tokens = seq.num_computed_tokens
                seq.metrics.first_scheduled_time = seq.metrics.first_scheduled_time or time.monotonic()
            seq.status = SequenceStatus.RUNNING
            seq.row = self._free_rows.pop()
            self.running.append(seq)
            num_new = min(len(seq.token_ids) - seq.num_computed_tokens, budget)
            manager.grow(seq, num_new)
            step.plan.new_rows.append(new_row(seq))
            budget -= self._compute(step, seq, num_new)

    def _make_room(self, step: ScheduledStep, seq: Sequence, num_new_tokens: int) -> bool:
        """Take the blocks that the next tokens of `seq` lack, from the latest arrivals if they run out.

        False if `seq` itself was preempted.
        """
        while (taken := self.block_manager.grow(seq, num_new_tokens)) is None:
            if self._preempt_latest() is seq:
                return False
        step.plan.new_blocks += [(seq.row, *block) for block in taken]
        return True

    def _compute(self, step: ScheduledStep, seq: Sequence, num_new_tokens: int) -> int:
        """Put the next tokens of `seq` into the step. If none are left after these, the step samples one more.

        The budget cuts at most one chunk of a step short, the last one: so the sequences that sample come first.
        """
        step.plan.rows.append(seq.row)
        step.plan.query_lens.append(num_new_tokens)
        if seq.must_score_prompt:
            self._score(step, seq, num_new_tokens)
        seq.num_computed_tokens += num_new_tokens
        self.block_manager.publish(seq)
        if seq.num_computed_tokens == seq.num_tokens:
            if seq.params.logprobs is not None:
                step.plan.logprobs.append((step.plan.num_samples, seq.params.logprobs))
            step.plan.num_samples += 1
            step.samples.append(seq)
            seq.num_in_flight += 1
        return num_new_tokens

    def _score(self, step: ScheduledStep, seq: Sequence, num_new_tokens: int) -> None:
        """Plan the log-probabilities of the prompt tokens that this chunk predicts: each token predicts the next."""
        start = seq.num_computed_tokens
        num_scored = min(start + num_new_tokens, seq.num_prompt_tokens - 1) - start
        if num_scored > 0:
            index = len(step.plan.rows) - 1
            step.plan.prompt_logprobs.append(PromptSpan(index, start, num_scored, seq.params.prompt_logprobs))
            step.scored.append((seq, start + 1))

    def _preempt_latest(self) -> Sequence:
        victim = self.running.pop()
        self._release(victim)
        victim.status = SequenceStatus.WAITING
        victim.num_preemptions += 1
        victim.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(victim)
        return victim

    def _release(self, seq: Sequence) -> None:
        self.block_manager.publish(seq)
        self.block_manager.release(seq)
        self._free_rows.append(seq.row)
        seq.row = -1
