"""Who runs in the next step. Continuous batching: the batch is made anew for every step.

Orca: Yu et al., OSDI 2022. Prompts enter in chunks beside the running decodes (Sarathi-Serve: Agrawal et al., OSDI
2024), so that a long prompt holds nobody up.
"""

import time
from collections import deque
from dataclasses import dataclass, field

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import MAX_STOP_IDS
from nanovllm.step_plan import LogitEdits, NewRow, PromptSpan, StepPlan

# The largest numbers that a device-resident row can hold
INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4e38
WATERMARK = 0.01  # share of the blocks that an admission leaves free, for those who run to grow into


@dataclass(slots=True)
class ScheduledStep:
    """A plan for the device, and the sequences whose tokens it samples and whose prompts it scores, in its order."""

    plan: StepPlan = field(default_factory=StepPlan)
    samples: list[Sequence] = field(default_factory=list)
    scored: list[tuple[Sequence, int]] = field(default_factory=list)  # and the position of the first token scored


class Scheduler:
    """First come, first served, within a token budget, a number of rows, and the cache's blocks.

    Invariant: `running` is in order of arrival, and whoever waits arrived later. So `running[-1]` is the latest
    arrival: the one preempted when blocks run out. Its blocks go back, it heads the queue, and when it resumes it
    finds those still cached that nobody has taken since. The earliest always advances, hence everyone ends.
    """

    def __init__(self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.block_manager = block_manager
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._num_watermark_blocks = int(WATERMARK * block_manager.num_blocks)
        # Each who runs needs a token a step, so no more rows than tokens are of use.
        self._free_rows = list(range(min(max_num_seqs, max_num_batched_tokens)))[::-1]

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> ScheduledStep:
        """Fill one step's token budget: every running sequence's next token, the prompt under way, new arrivals."""
        step = ScheduledStep()
        self._continue_decodes(step)
        budget = self.max_num_batched_tokens - step.plan.num_decodes
        budget = self._continue_prefills(step, budget)
        self._admit_waiting(step, budget)
        return step

    def finish(self, seq: Sequence) -> None:
        """Take back what a finished sequence holds.

        A step in flight may still compute a surplus token for it. The device works in order, so whoever gets its
        row and blocks next writes there after that.
        """
        if seq.row >= 0:
            self.running.remove(seq)
            self._release(seq)
        # If it waits, it is skipped when its turn comes: leaving costs nothing, however long the queue.

    def preempt_all(self) -> None:
        """Take back what all who run hold. They go on in the order in which they came."""
        while self.running:
            self._preempt_latest()

    def _continue_decodes(self, step: ScheduledStep) -> None:
        """One token for each running sequence whose prompt is done, preempting from the end when blocks run out."""
        for seq in self.running:  # a preemption takes its victim from the end, at or past the loop's place
            if seq.num_tokens - seq.num_computed_tokens != 1 or seq.num_tokens >= seq.max_len:
                continue  # its prompt is under way, or its last token is in flight
            num_held = len(seq.block_table)
            while not self.block_manager.grow(seq):
                if self._preempt_latest() is seq:
                    return
            if len(seq.block_table) > num_held:
                step.plan.new_blocks.append((seq.row, num_held, seq.block_table[-1]))
            step.plan.num_decodes += 1
            self._compute(step, seq, 1)

    def _continue_prefills(self, step: ScheduledStep, budget: int) -> int:
        """The next chunk of the prompt that the last budget cut short; its blocks are its own since admission."""
        for seq in self.running:
            num_left = len(seq.token_ids) - seq.num_computed_tokens
            if num_left > 0 and budget > 0:
                budget -= self._compute(step, seq, min(num_left, budget))
        return budget

    def _admit_waiting(self, step: ScheduledStep, budget: int) -> None:
        """New arrivals in order, each with all the blocks of its prompt, until rows, blocks or budget run out."""
        manager = self.block_manager
        while self.waiting and budget > 0 and self._free_rows:
            seq = self.waiting[0]
            if seq.is_finished:  # aborted, or preempted when the token that ended it was in flight
                self.waiting.popleft()
                continue
            if seq.num_in_flight:
                break  # just preempted: its last token has not arrived yet
            prefix = [] if seq.must_score_prompt else manager.find_prefix(seq)
            spare = self._num_watermark_blocks if self.running else 0
            if manager.num_free_blocks_needed(seq, prefix) + spare > manager.num_free_blocks:
                break
            self.waiting.popleft()
            manager.admit(seq, prefix)
            if seq.num_preemptions == 0:
                seq.num_cached_tokens = seq.num_computed_tokens
                seq.metrics.first_scheduled_time = seq.metrics.first_scheduled_time or time.monotonic()
            seq.status = SequenceStatus.RUNNING
            seq.row = self._free_rows.pop()
            self.running.append(seq)
            step.plan.new_rows.append(_new_row(seq))
            budget -= self._compute(step, seq, min(len(seq.token_ids) - seq.num_computed_tokens, budget))

    def _compute(self, step: ScheduledStep, seq: Sequence, num_new_tokens: int) -> int:
        """Put the next tokens of `seq` into the step. If they are all it has, the step samples one more.

        At most one chunk a step is cut short by the budget, and it is the last: so those that sample come first.
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
        """Ask for the log-probabilities of the prompt's tokens that the chunk predicts: each token the next."""
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


def _new_row(seq: Sequence) -> NewRow:
    params = seq.params
    stop_ids = sorted(seq.stop_ids) if params.min_tokens else []
    min_len = min(seq.num_prompt_tokens + params.min_tokens, seq.max_len) if params.min_tokens else 0
    fits = len(stop_ids) <= MAX_STOP_IDS
    return NewRow(
        row=seq.row,
        token_ids=seq.token_ids,
        num_computed_tokens=seq.num_computed_tokens,
        block_table=seq.block_table,
        temperature=min(params.temperature, FLOAT32_MAX),
        top_k=min(params.top_k, INT32_MAX),
        top_p=params.top_p,
        min_p=params.min_p,
        seed=seq.seed,
        min_len=min_len,
        stop_ids=stop_ids if fits else [],
        edits=_edits(seq, () if fits else tuple(stop_ids), min_len),
    )


def _edits(seq: Sequence, held_back: tuple[int, ...], min_len: int) -> LogitEdits | None:
    """What the sequence changes in its logits; None, as most, if nothing."""
    params = seq.params
    edits = LogitEdits(
        prompt_len=seq.num_prompt_tokens,
        repetition_penalty=min(params.repetition_penalty, FLOAT32_MAX),
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=params.logit_bias,
        allowed_token_ids=params.allowed_token_ids,
        bad_words=seq.bad_words,
        held_back=held_back,
        min_len=min_len,
    )
    return edits if edits.has_any else None
