"""The engine's loop: plan a step, launch it, and only then read the tokens of the step before.

Overlap: while the device computes step N, the host plans and launches step N + 1. For that it need not know N's tokens,
only that each sequence gets one; their values stay on the device, in the rows. The host learns one step late that a
sequence has stopped. By then one surplus token is in flight, and the host drops it on arrival.
"""

import logging
import random
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count

from nanovllm.config import Config
from nanovllm.engine.admission import BadWords, make_sequence
from nanovllm.engine.block_manager import BlockManager, CacheStats
from nanovllm.engine.grammar_masks import draw_masked, why_no_token
from nanovllm.engine.health import EngineHealth
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats, snapshot
from nanovllm.errors import EngineDeadError
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StepInFlight:
    scheduled: ScheduledStep
    handle: "StepHandle"  # noqa: F821 -- worker/ imports torch, which is loaded only when an engine is made


class LLMEngine:
    """Sequences in, finished sequences out. Not thread-safe: one caller at a time.

    A KeyboardInterrupt may come between any two instructions, and a second one while the first is being handled. So a
    method that changes the books (queues, rows, blocks) calls `begin_change` first, and sets `is_changing` to False
    when it is through. If an interrupt comes in between, the next `begin_change` finds the mark and resets the engine.
    """

    is_changing = False  # a method is changing the books, or was interrupted while it did
    observer: "Observer | None" = None  # noqa: F821 -- gets what each step did, see engine/step_trace.py
    logits_processors: "Processors | None" = None  # noqa: F821 -- the user's, see vllm/logits_processors.py

    def __init__(self, config: Config) -> None:
        from nanovllm.distributed.ranks import Followers
        from nanovllm.models.checkpoint_config import load_hf_config
        from nanovllm.models.generation_config import load_default_sampling, load_eos_token_ids
        from nanovllm.models.model_path import resolve_model_path
        from nanovllm.models.tied_head import TiedHead
        from nanovllm.worker.model_runner import MAX_STEPS_IN_FLIGHT, ModelRunner
        from nanovllm.worker.resolve import resolve_by_weights

        self.config = config
        self.model_path = resolve_model_path(config.model, config.revision)
        hf_config, model_class = load_hf_config(self.model_path, config.hf_overrides)
        self.eos_token_ids = load_eos_token_ids(config, self.model_path, hf_config)
        self.eos_token_id: int | None = None  # the tokenizer's own: see `use_eos_of_tokenizer`
        self.default_sampling = load_default_sampling(config, self.model_path)
        resolve_by_weights(config, hf_config, self.model_path)
        self.followers = Followers(config)
        # The other ranks end, as in close(), when the engine is dropped, its construction is interrupted, or the
        # interpreter ends. Finalizers run last made first: so the running step ends before the ranks do.
        weakref.finalize(self, self.followers.close)
        self.health = EngineHealth(self.followers)
        self.health.guard(self)
        self.followers.start(hf_config, model_class, self.model_path)
        with self.followers.also_run("build", wait=True):
            self.runner = ModelRunner(config, hf_config, model_class, self.model_path, self.followers.tp)
            source = self.model_path if config.has_checkpoint else None
            self.tied_head = TiedHead(self.runner.dtype, source) if hf_config.tie_word_embeddings else None
        self.vocab_size: int = hf_config.vocab_size
        self.max_model_len = self.runner.max_model_len
        self._make_scheduler()
        # On the CPU, host and device share the cores: planning ahead would only compute surplus tokens.
        self.max_behind = MAX_STEPS_IN_FLIGHT - 1 if self.runner.is_cuda else 0
        if config.logits_processors:
            from nanovllm.vllm.logits_processors import install

            install(self)
        self.stats = StepStats()
        self._in_flight: deque[StepInFlight] = deque()
        self._unfinished: dict[str, Sequence] = {}
        self.advanced: list[Sequence] = []  # those that got a token in the last step()
        self.fresh_ids = count()
        self.fresh_seeds = random.Random(config.seed)

    def make_sequence(
        self,
        token_ids: list[int],
        params: SamplingParams,
        name: str = "prompt",
        bad_words: BadWords = (),
        request_id: str | None = None,
    ) -> Sequence:
        """Check a request and make a sequence of it, as `admission.make_sequence`; `add` then queues it."""
        return make_sequence(self, token_ids, params, name, bad_words, request_id)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Raises ValueError if an unfinished one has its id, RuntimeError if the engine sleeps."""
        self.require_ready()  # it may have fallen asleep since the sequence was made
        if seq.request_id in self._unfinished:
            raise ValueError(f"request_id={seq.request_id!r} is that of a request which is still running")
        self.begin_change()
        self._unfinished[seq.request_id] = seq
        self.scheduler.add(seq)
        self.is_changing = False

    def step(self) -> list[Sequence]:
        """Launch one step, then read an earlier one. Returns the sequences that the earlier step has finished.

        If anything fails, the engine aborts all requests, empties the cache and raises the error. Then it serves the
        next request, unless a rank or the device is lost for good (EngineDeadError).
        """
        with self.health.stepping:
            self.begin_change()
            self.advanced = []
            try:
                launched, finished = self._launch_next(), []
                while self._in_flight:
                    if self._in_flight[0].handle.awaits_masks:
                        draw_masked(self._in_flight[0], self.runner, self.followers)
                    if launched and len(self._in_flight) <= self.max_behind:
                        break
                    finished += self._read_tokens(self._in_flight.popleft())
                self._drop_surplus()
                self.followers.check()  # tokens that were computed with a lost rank are garbage
            except BaseException as error:
                self.reset()
                if isinstance(error, Exception):
                    self.health.check_device_after(error, self.runner)
                raise
            self.is_changing = False
            return finished

    def _launch_next(self) -> bool:
        """Plan and launch a step. False if there is nothing to compute before more tokens have arrived."""
        step = self.scheduler.schedule()
        plan = step.plan
        if not plan.rows:
            return False
        # A launch waits for a GPU whose queue is full, and so perhaps for other ranks. On a CPU it is the whole step.
        waiting = self.followers.time_limit() if self.runner.is_cuda else nullcontext()
        with self.followers.also_run("launch", plan), waiting:
            handle = self.runner.launch(plan)
        self._in_flight.append(StepInFlight(step, handle))
        self.stats.count(plan)
        return True

    def _read_tokens(self, step: StepInFlight) -> list[Sequence]:
        """Wait for a step's tokens and append each to its sequence. Returns the sequences that this finishes."""
        finished = []
        with self.followers.time_limit():
            token_ids = step.handle.tokens()
        self._read_prompt_logprobs(step)
        samples = step.scheduled.samples
        logprobs = step.handle.logprobs() if step.scheduled.plan.logprobs else [None] * len(samples)
        for seq, token_id, of_token in zip(samples, token_ids, logprobs, strict=True):
            if seq.is_finished:
                continue  # a surplus token
            if token_id < 0:
                self._fail(seq, why_no_token(seq, token_id))
            else:
                if of_token is not None:
                    seq.append_logprobs(of_token)
                seq.append_token(token_id)
                self.stats.num_output_tokens += 1
            self.advanced.append(seq)
            if seq.is_finished:
                self.scheduler.finish(seq)
                del self._unfinished[seq.request_id]
                finished.append(seq)
        return finished

    def _read_prompt_logprobs(self, step: StepInFlight) -> None:
        scored = step.scheduled.scored
        if scored:
            for (seq, position), values in zip(scored, step.handle.prompt_logprobs(), strict=True):
                # A prompt that was preempted half-way is computed again: equal values replace the first ones.
                seq.prompt_logprobs[position : position + len(values)] = values

    def _fail(self, seq: Sequence, reason: str) -> None:
        """End a sequence that has no next token. Its blocks may contain NaN, so no other sequence may share them."""
        logger.error("request %s has ended with an error: %s", seq.request_id, reason)
        self.block_manager.forget(seq)
        seq.finish("error", reason)

    def _drop_surplus(self) -> None:
        """Once all sequences are finished, steps in flight hold surplus tokens only: do not wait for them."""
        if not self._unfinished:
            self._in_flight.clear()

    def abort(self, seqs: Iterable[Sequence]) -> None:
        """End sequences early. Does nothing for those that have finished or were never added."""
        for seq in seqs:
            if self._unfinished.get(seq.request_id) is seq:
                self.finish(seq, "abort")

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence early, or replace the reason of one that the last step has finished."""
        self.begin_change()
        seq.finish(reason, stop_reason)
        if self._unfinished.get(seq.request_id) is seq:
            del self._unfinished[seq.request_id]
            self.scheduler.finish(seq)
        self._drop_surplus()
        self.is_changing = False

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> None:
        """Empty the prefix cache. Running sequences keep their blocks, or are preempted, and then computed anew."""
        self.begin_change()
        if reset_running_requests:
            self.scheduler.preempt_all()
        self.block_manager.forget_content()
        self.is_changing = False

    def begin_change(self) -> None:
        """Mark the books as changing, until `is_changing` is False again. Resets them if a change was cut off."""
        if self.is_changing:
            self.reset()
        self.is_changing = True

    def reset(self) -> None:
        """Abort all requests and empty the cache: after a failure the books and the device may disagree."""
        self.is_changing = True
        for seq in self._unfinished.values():
            if not seq.is_finished:
                seq.finish("abort")
        self._in_flight.clear()
        self._make_scheduler(self.block_manager.stats, self.scheduler.num_preemptions)
        self._unfinished.clear()
        self.is_changing = False

    def _make_scheduler(self, cache_stats: CacheStats | None = None, num_preemptions: int = 0) -> None:
        config, runner, windows = self.config, self.runner, self.runner.cache_groups.windows
        block_manager = BlockManager(runner.num_blocks, runner.block_size, config.enable_prefix_caching, windows)
        block_manager.stats = cache_stats or block_manager.stats
        scheduler = Scheduler(block_manager, config.max_num_seqs, config.max_num_batched_tokens)
        scheduler.num_preemptions = num_preemptions
        self.block_manager, self.scheduler = block_manager, scheduler

    def use_eos_of_tokenizer(self, eos_token_id: int | None) -> None:
        """Let the tokenizer's own EOS end sequences, too. An id outside the vocabulary is never drawn: ignore it."""
        if eos_token_id is not None and 0 <= eos_token_id < self.vocab_size:
            self.eos_token_id = eos_token_id
            self.eos_token_ids |= {eos_token_id}

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._unfinished or self._in_flight)

    def has_idle_device(self) -> bool:
        """Whether a GPU has nothing to compute. Never True on a CPU, which computes each step within `step`."""
        return self.runner.is_cuda and all(step.handle.is_done() for step in self._in_flight)

    def current_stats(self) -> StepStats:
        """The counters up to now, with the state of the cache and the queue."""
        return snapshot(self.stats, self.block_manager, self.scheduler, len(self._unfinished))

    @property
    def error(self) -> EngineDeadError | None:
        """Why the engine serves nothing any more; None while it does. Any thread may ask."""
        return self.health.error

    def check_health(self) -> None:
        """Raises `error`, if there is one."""
        self.health.check()

    def require_ready(self) -> None:
        """Raises RuntimeError if the engine sleeps, or its weights were dropped."""
        if self.runner.not_ready:
            raise RuntimeError(self.runner.not_ready)

    def close(self) -> None:
        """End the other ranks. In a forked child it does nothing, since they are the parent's."""
        self.followers.close()

    def leave_to_parent(self) -> None:
        """Called in a child right after the fork, see `engine/forks.py`."""
        self.followers.leave_to_parent()
