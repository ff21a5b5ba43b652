"""The engine's loop: plan a step, launch it, and only then read the tokens of the step before.

Overlap: while the device runs step N, the host plans and launches step N + 1, for which it need not know N's tokens,
only that there will be one for each sequence. Their values stay on the device, in the rows. What the host learns
late is that a sequence has stopped: by then one surplus token is in flight, and is dropped when it arrives.
"""

import logging
import os
import random
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from nanovllm.config import Config
from nanovllm.engine.admission import BadWords, check_params, check_prompt, check_that_a_token_is_left
from nanovllm.engine.block_manager import BlockManager, CacheStats
from nanovllm.engine.forks import FORKED, keep_in_children
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import EngineDeadError
from nanovllm.sampling_params import NAN_LOGITS, NO_TOKEN_LEFT, SamplingParams

logger = logging.getLogger(__name__)

WHY_NO_TOKEN = {
    NAN_LOGITS: "the model's logits are NaN: its weights are damaged, or its numbers overflow in this dtype",
    NO_TOKEN_LEFT: "no token is left to draw: the request's parameters, or the model's logits, rule out all",
}

LONGEST_STEP = 10.0  # seconds for which leaving the interpreter waits for one


@dataclass(slots=True)
class StepStats:
    """What the engine did, in tokens and steps, since it started."""

    num_steps: int = 0
    num_prefill_tokens: int = 0  # computed, not found in the cache
    num_decode_tokens: int = 0
    num_output_tokens: int = 0  # handed to their sequences
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    evictions: int = 0
    cache_usage: float = 0.0
    num_running: int = 0
    num_waiting: int = 0


@dataclass(slots=True)
class _StepInFlight:
    scheduled: ScheduledStep
    handle: "StepHandle"  # noqa: F821 -- worker/ imports torch, which is loaded only when an engine is made


def _end_steps(stepping: Any, pid: int) -> None:
    """On leaving the interpreter: let the step that a daemon thread is at come to its end, and no other begin.

    PyTorch aborts the process when a thread is ended within its code.
    """
    if os.getpid() == pid:
        stepping.acquire(timeout=LONGEST_STEP)


class LLMEngine:
    """Requests in, finished sequences out. Not thread-safe: one caller at a time.

    A KeyboardInterrupt may come between any two instructions, and a second one while the first is being handled. So
    whatever changes the books marks them first (`begin_change`) and, when it is through, as whole. Whoever finds them
    marked begins anew.
    """

    is_changing = False  # somebody is changing the books, or has been interrupted in it
    _device_error = ""  # what it says since it has failed for good

    logits_processors: "Processors | None" = None  # noqa: F821 -- the user's, see vllm/logits_processors.py

    def __init__(self, config: Config) -> None:
        from nanovllm.distributed.ranks import Followers
        from nanovllm.models.checkpoint_config import load_hf_config
        from nanovllm.models.generation_config import load_default_sampling, load_eos_token_ids
        from nanovllm.models.loader import resolve_model_path
        from nanovllm.models.tied_head import TiedHead
        from nanovllm.worker.model_runner import MAX_STEPS_IN_FLIGHT, ModelRunner
        from nanovllm.worker.resolve import resolve_by_weights

        self.config = config
        self._pid = os.getpid()
        self.model_path = resolve_model_path(config.model, config.revision)
        hf_config, model_class = load_hf_config(self.model_path, config.hf_overrides)
        self.eos_token_ids = load_eos_token_ids(config, self.model_path, hf_config)
        self.eos_token_id: int | None = None  # the tokenizer's own, which is one of them; set by who has the tokenizer
        self.default_sampling = load_default_sampling(config, self.model_path)
        resolve_by_weights(config, hf_config, self.model_path)
        self.followers = Followers(config)
        # Dropping the engine, an interrupt amid the construction and leaving the interpreter end them like close().
        weakref.finalize(self, self.followers.close)
        self._stepping = threading.RLock()
        weakref.finalize(self, _end_steps, self._stepping, self._pid)  # runs before the one above
        keep_in_children(self)
        self.followers.start(hf_config, model_class, self.model_path)
        with self.followers.also_run("build", wait=True):
            self.runner = ModelRunner(config, hf_config, model_class, self.model_path, self.followers.tp)
            source = self.model_path if config.has_checkpoint else None
            self.tied_head = TiedHead(self.runner.dtype, source) if hf_config.tie_word_embeddings else None
        self.vocab_size: int = hf_config.vocab_size
        self.max_model_len = self.runner.max_model_len
        self._make_scheduler()
        # Where the device does not run beside the host, planning ahead would only compute surplus tokens.
        self.max_behind = MAX_STEPS_IN_FLIGHT - 1 if self.runner.is_cuda else 0
        if config.logits_processors:
            from nanovllm.vllm.logits_processors import install

            install(self)
        self.stats = StepStats()
        self._in_flight: deque[_StepInFlight] = deque()
        self._unfinished: dict[str, Sequence] = {}
        self.advanced: list[Sequence] = []  # those to which the last step() handed a token
        self._ids = count()
        self._random = random.Random(config.seed)

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._unfinished or self._in_flight)

    @property
    def error(self) -> EngineDeadError | None:
        """Why the engine serves nothing any more; None while it does. May be asked in any thread."""
        if os.getpid() != self._pid:
            return EngineDeadError(FORKED)
        if self._device_error:
            return EngineDeadError(
                f"the device has failed for good: {self._device_error}\nOnly a new process can use it again"
            )
        return self.followers.error

    def require_own_process(self) -> None:
        """Raises EngineDeadError in a child that was forked off the engine's process."""
        if os.getpid() != self._pid:
            raise EngineDeadError(FORKED)

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine serves nothing any more."""
        error = self.error
        if error is not None:
            raise error

    def make_sequence(
        self,
        token_ids: list[int],
        params: SamplingParams,
        name: str = "prompt",
        bad_words: BadWords = (),
        request_id: str | None = None,
    ) -> Sequence:
        """Check a request and give it its shape. The engine is not touched: whatever cannot run is refused here.

        `params` are the request's own, which nobody assigns to any more. `bad_words` are the token sequences of
        `params.bad_words`, see `nanovllm.text.bad_words`.

        Raises:
            ValueError: naming the prompt as `name`, what is wrong with it, and what is allowed.
            RuntimeError: the engine sleeps, or its weights were dropped; EngineDeadError: see `error`.
        """
        self.check_health()
        if self.runner.not_ready:
            raise RuntimeError(self.runner.not_ready)
        check_prompt(token_ids, name, self.vocab_size, self.max_model_len)
        check_params(params, bad_words, self.vocab_size, self.config.max_logprobs)
        if self.logits_processors is not None:
            self.logits_processors.validate(params)
        elif params.extra_args:
            raise ValueError(
                f"extra_args={params.extra_args!r:.80} are for logits_processors, which this engine has not"
            )
        stop_ids = self.eos_token_ids.union(params.stop_token_ids)
        check_that_a_token_is_left(params, bad_words, stop_ids, self.vocab_size)
        num_left = self.max_model_len - len(token_ids)
        seed = params.seed if params.seed is not None else self._random.getrandbits(64)
        return Sequence(
            request_id=str(next(self._ids)) if request_id is None else request_id,
            token_ids=list(token_ids),
            params=params,
            max_len=len(token_ids) + min(num_left, params.max_tokens or num_left),
            stop_ids=stop_ids,
            stop_reasons=self._stop_reasons(params),
            seed=seed & (2**64 - 1),
            bad_words=bad_words,
        )

    def _stop_reasons(self, params: SamplingParams) -> dict[int, int | None]:
        """The ids that end a sequence, and what each gives as `stop_reason`: itself, or None for the tokenizer's."""
        if params.ignore_eos:
            return {i: i for i in params.stop_token_ids}
        return {i: None if i == self.eos_token_id else i for i in self.eos_token_ids.union(params.stop_token_ids)}

    def use_eos_of_tokenizer(self, eos_token_id: int | None) -> None:
        """Let the tokenizer's own EOS end sequences too. One outside the vocabulary is never drawn, and left out."""
        if eos_token_id is not None and 0 <= eos_token_id < self.vocab_size:
            self.eos_token_id = eos_token_id
            self.eos_token_ids |= {eos_token_id}

    def add(self, seq: Sequence) -> None:
        """Queue a request. Raises ValueError if one of its id is unfinished, RuntimeError as `make_sequence` does."""
        if self.runner.not_ready:  # since it was made
            raise RuntimeError(self.runner.not_ready)
        if seq.request_id in self._unfinished:
            raise ValueError(f"request_id={seq.request_id!r} is that of a request which is still running")
        self.begin_change()
        self._unfinished[seq.request_id] = seq
        self.scheduler.add(seq)
        self.is_changing = False

    def abort(self, seqs: Iterable[Sequence]) -> None:
        """End requests before their time. Those that have finished, or were never added, are left alone."""
        for seq in seqs:
            if self._unfinished.get(seq.request_id) is seq:
                self.finish(seq, "abort")

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request before its time, or one that has just ended for another reason than it seemed."""
        self.begin_change()
        seq.finish(reason, stop_reason)
        if self._unfinished.get(seq.request_id) is seq:
            del self._unfinished[seq.request_id]
            self.scheduler.finish(seq)
        self._drop_surplus()
        self.is_changing = False

    def has_idle_device(self) -> bool:
        """Whether there is a device that has nothing to do: the next step would be launched and not waited for."""
        return self.runner.is_cuda and all(step.handle.is_done() for step in self._in_flight)

    def step(self) -> list[Sequence]:
        """Launch one step, and return the sequences that an earlier one has finished.

        If anything fails, every unfinished request is aborted, the cache is emptied, and the error goes on: the
        engine serves the next request; unless it has lost a rank or its device for good, which is the end of it
        (EngineDeadError).
        """
        with self._stepping:
            return self._step()

    def _step(self) -> list[Sequence]:
        self.begin_change()
        self.advanced = []
        try:
            launched = self._launch_next()
            finished: list[Sequence] = []
            while self._in_flight and (len(self._in_flight) > self.max_behind or not launched):
                finished += self._read_tokens(self._in_flight.popleft())
            self._drop_surplus()
            self.followers.check()  # what a lost rank has left on the device is worth nothing
        except Exception as error:
            self.reset()
            self._look_after_device(error)
            raise
        except BaseException:
            self.reset()
            raise
        self.is_changing = False
        return finished

    def _launch_next(self) -> bool:
        """Plan and launch a step. False if there is nothing to compute before more tokens have arrived."""
        step = self.scheduler.schedule()
        plan = step.plan
        if not plan.rows:
            return False
        # A device's queue may be full, and then launching waits for the device. On a CPU it is the step itself.
        waiting = self.followers.time_limit() if self.runner.is_cuda else nullcontext()
        with self.followers.also_run("launch", plan), waiting:
            handle = self.runner.launch(plan)
        self._in_flight.append(_StepInFlight(step, handle))
        self.stats.num_steps += 1
        self.stats.num_decode_tokens += plan.num_decodes
        self.stats.num_prefill_tokens += plan.num_tokens - plan.num_decodes
        return True

    def _read_tokens(self, step: _StepInFlight) -> list[Sequence]:
        """Wait for a step's tokens, and hand each to its sequence."""
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
                self._fail(seq, WHY_NO_TOKEN[token_id])
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

    def _fail(self, seq: Sequence, reason: str) -> None:
        """End a sequence that has no next token. Nobody else shall find its blocks: NaN may be in them."""
        logger.error("request %s has ended with an error: %s", seq.request_id, reason)
        self.block_manager.forget(seq)
        seq.finish("error", reason)

    def _drop_surplus(self) -> None:
        """With nobody left, no one waits for what is in flight: the runner sees to its buffers."""
        if not self._unfinished:
            self._in_flight.clear()

    def _read_prompt_logprobs(self, step: _StepInFlight) -> None:
        scored = step.scheduled.scored
        if scored:
            for (seq, position), values in zip(scored, step.handle.prompt_logprobs(), strict=True):
                # What has been here before, of a prompt that was preempted under way, comes again.
                seq.prompt_logprobs[position : position + len(values)] = values

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> None:
        """Forget all cached prefixes. Who runs keeps its blocks, or is preempted, and then computed anew."""
        self.begin_change()
        if reset_running_requests:
            self.scheduler.preempt_all()
        self.block_manager.forget_content()
        self.is_changing = False

    def begin_change(self) -> None:
        """The books are whole when this returns, and marked as changing until `is_changing` is False again."""
        if self.is_changing:
            self.reset()
        self.is_changing = True

    def reset(self) -> None:
        """After a failure nobody knows how far the host's books and the device have come: begin anew.

        All requests are aborted, and the cache is emptied. It may be interrupted, and then done again.
        """
        self.is_changing = True
        for seq in self._unfinished.values():
            if not seq.is_finished:
                seq.finish("abort")
        self._in_flight.clear()
        self._make_scheduler(self.block_manager.stats, self.scheduler.num_preemptions)
        self._unfinished.clear()
        self.is_changing = False

    def _look_after_device(self, error: Exception) -> None:
        """After a step that has failed by `error`. Raises EngineDeadError if the device has failed for good.

        After a "device-side assert" or an "illegal memory access" CUDA answers the process with errors for ever.
        """
        if isinstance(error, EngineDeadError):
            return
        try:
            self.runner.check_device()
        except Exception as lasting:
            self._device_error = str(lasting) or repr(lasting)
            raise EngineDeadError(str(self.error)) from error

    def close(self) -> None:
        """End the other ranks, if there are any. In a forked child nothing, for they are the parent's."""
        self.followers.close()

    def leave_to_parent(self) -> None:
        """Called in a child that was just forked, see `engine/forks.py`."""
        self.followers.leave_to_parent()

    def _make_scheduler(self, cache_stats: CacheStats | None = None, num_preemptions: int = 0) -> None:
        config, runner = self.config, self.runner
        block_manager = BlockManager(runner.num_blocks, runner.block_size, config.enable_prefix_caching)
        block_manager.stats = cache_stats or block_manager.stats
        scheduler = Scheduler(block_manager, config.max_num_seqs, config.max_num_batched_tokens)
        scheduler.num_preemptions = num_preemptions
        self.block_manager, self.scheduler = block_manager, scheduler

    def current_stats(self) -> StepStats:
        """Counters up to now, with the state of the cache and the queue."""
        cache, scheduler = self.block_manager.stats, self.scheduler
        return replace(
            self.stats,
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=cache.prefix_queries,
            prefix_hits=cache.prefix_hits,
            evictions=cache.evictions,
            cache_usage=self.block_manager.usage,
            num_running=len(scheduler.running),
            num_waiting=len(self._unfinished) - len(scheduler.running),
        )
