"""Makes a `StepTrace` of a step from the engine's books before planning, after planning, and at the end.

The engine does not know of it. For the time of one step the tracer stands between the engine and its scheduler: it sees
each preemption, and the plan. From the plan follow the other events: a hit is where a new row begins, a chunk is a part
of a prompt, an eviction is a block that was taken and lost its digest. What callers do between two steps shows in the
queues and blocks of the next trace; arrivals and ends are the only events of it.

The cost grows with the batch and with what has changed, not with the cache or the queue.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count, islice
from string import ascii_uppercase

from nanovllm.engine.cache_changes import DigestChanges, SeenTables, table_changes
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Completion, Request
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_trace import Arrival, BatchEntry, Event, Observer, StepTrace
from nanovllm.step_plan import StepPlan
from nanovllm.text.detokenizer import Detokenizer
from nanovllm.text.token_decoder import TokenDecoder

MOST_WAITING = 64  # of the queue, which may be long
MOST_CHARS = 200  # of a prompt


@dataclass(slots=True)
class _Followed(SeenTables):
    """A sequence that traces have named."""

    text: Detokenizer | None = None
    num_pieces: int = 0  # of its text, that traces have had


class StepTracer:
    """Follows one engine for one observer. Of the engine's thread.

    Args:
        owner: each unfinished sequence's request and completion.
        decoder: None if the engine has no tokenizer.

    Attributes:
        cost_s: what the last trace of a step took, beside the step itself.
        has_texts: whether traces have prompts and pieces of text.
    """

    def __init__(
        self,
        engine: LLMEngine,
        observer: Observer,
        owner: Mapping[Sequence, tuple[Request, Completion]],
        decoder: TokenDecoder | None,
    ) -> None:
        self.observer = observer
        self._engine, self._owner, self._decoder = engine, owner, decoder
        self._followed: dict[Sequence, _Followed] = {}
        self._names = names()
        self._digests = DigestChanges()
        self.has_texts = True
        self._arrivals: list[Arrival] = []
        self._events: list[Event] = []
        self._batch: list[BatchEntry] = []
        self._step_s = self.cost_s = 0.0
        self._num_steps: int | None = None  # as of the last trace; None before the first
        self._running: list[str] = []  # as of the last trace

    def step(self) -> None:
        """Let the engine do a step, and watch. Raises what it raises."""
        scheduler = self._engine.scheduler
        schedule, preempt = scheduler.schedule, scheduler._preempt_latest
        self._arrivals, self._events, self._batch = [], [], []
        began = time.perf_counter()
        try:  # the instance's own methods, which hide the class's
            scheduler.schedule = lambda: self._watch(scheduler, schedule)
            scheduler._preempt_latest = lambda: self._watch_preemption(scheduler, preempt)
            self._engine.step()
        finally:
            for name in ("schedule", "_preempt_latest"):
                vars(scheduler).pop(name, None)
        self._step_s = time.perf_counter() - began - self.cost_s

    def trace(self) -> StepTrace:
        """The trace of the step, once its tokens have become text."""
        began = time.perf_counter()
        trace = self._trace(self._steps_since() - 1)
        self.cost_s += time.perf_counter() - began
        return trace

    def between_steps(self) -> StepTrace | None:
        """A trace of no step, if something has changed since the last trace."""
        self._arrivals, self._events, self._batch, self._step_s = [], [], [], 0.0
        self._follow()
        running = self._running
        trace = self._trace(self._steps_since())
        is_new = trace.is_full or trace.num_skipped or trace.events or trace.tables or trace.digests
        return trace if is_new or trace.running != running else None

    def end(self) -> None:
        """Follow the engine no more."""
        self._digests.end(self._engine.block_manager)

    def _steps_since(self) -> int:
        """How many steps were launched since the last trace."""
        return 0 if self._num_steps is None else self._engine.stats.num_steps - self._num_steps

    def _trace(self, num_skipped: int) -> StepTrace:
        engine, scheduler = self._engine, self._engine.scheduler
        is_full, self._num_steps = self._num_steps is None, engine.stats.num_steps
        followed = self._followed
        ended = [seq for seq in followed if seq.finish_reason is not None]
        self._events += [_end_of(followed[seq].name, seq) for seq in ended]
        running = [(followed[seq], seq.block_tables) for seq in scheduler.running]
        self._running = [seen.name for seen, _ in running]
        trace = StepTrace(
            num_steps=engine.stats.num_steps,
            num_skipped=max(0, num_skipped),
            time_s=time.monotonic(),
            step_s=self._step_s,
            batch=self._batch,
            running=self._running,
            waiting=[followed[seq].name for seq in self._first_waiting() if not seq.is_finished],
            tables=table_changes(running, engine.block_manager.windows),
            digests=self._digests.take(engine.block_manager),
            is_full=is_full,
            events=self._events,
            arrivals=self._arrivals,
            pieces=self._pieces() if self.has_texts else {},
            stats=engine.current_stats(),
        )
        for seq in ended:
            del followed[seq]
        return trace

    def _watch(self, scheduler: Scheduler, schedule: Callable[[], ScheduledStep]) -> ScheduledStep:
        """Plan a step, and note what that did."""
        began, manager = time.perf_counter(), scheduler.block_manager
        self._follow()
        lost = self._digests.note(manager).lost
        lost.clear()
        self.cost_s = time.perf_counter() - began
        step = schedule()
        began = time.perf_counter()
        plan, followed = step.plan, self._followed
        self._events += _evictions((block for *_, block in plan.new_blocks), lost)
        self._batch = [
            (followed[seq].name, "decode", seq.num_computed_tokens - 1, 1) for seq in step.samples[: plan.num_decodes]
        ]
        if len(plan.rows) > plan.num_decodes:
            self._watch_prefills(scheduler, plan, lost)
        self.cost_s += time.perf_counter() - began
        return step

    def _watch_prefills(self, scheduler: Scheduler, plan: StepPlan, lost: set[int]) -> None:
        self._follow()  # from further back in the queue than traces look
        of_row, block_size = {seq.row: seq for seq in scheduler.running}, scheduler.block_manager.block_size
        new = {of_row[row.row]: row.num_computed_tokens for row in plan.new_rows}  # its tokens that were cached
        for seq, num_cached in new.items():
            self._events += self._admission(seq, num_cached)
            fresh = chain.from_iterable(table[num_cached // block_size :] for table in seq.block_tables)
            self._events += _evictions(fresh, lost)
        for row, num_tokens in zip(plan.rows[plan.num_decodes :], plan.query_lens[plan.num_decodes :], strict=True):
            seq = of_row[row]
            end, prompt_len, name = seq.num_computed_tokens, len(seq.token_ids), self._followed[seq].name
            self._batch.append((name, "prefill", end - num_tokens, num_tokens))
            if seq not in new or end < prompt_len:
                by = "Scheduler._admit_waiting" if seq in new else "Scheduler._continue_prefills"
                self._events.append(Event("chunk", name, by, {"from": end - num_tokens, "to": end, "of": prompt_len}))

    def _watch_preemption(self, scheduler: Scheduler, preempt: Callable[[], Sequence]) -> Sequence:
        """Let the latest arrival be preempted, and note which blocks nobody has any more."""
        began = time.perf_counter()
        *others, victim = scheduler.running
        held = dict.fromkeys(block for block in chain.from_iterable(victim.block_tables) if block >= 0)
        shared = {block for seq in others for table in seq.block_tables for block in held.keys() & table}
        freed = [block for block in held if block not in shared]
        name = self._followed[victim].name
        self._events.append(Event("preempt", name, "Scheduler._preempt_latest", {"blocks": freed}))
        self.cost_s += time.perf_counter() - began
        return preempt()

    def _admission(self, seq: Sequence, num_cached: int) -> Iterator[Event]:
        name, tables = self._followed[seq].name, seq.block_tables
        held = [block for block in dict.fromkeys(chain.from_iterable(tables)) if block >= 0]
        yield Event("admit", name, "Scheduler._admit_waiting", {"blocks": held})
        if num_cached:
            num_hit = num_cached // self._engine.block_manager.block_size
            hit = [block for table in tables for block in table[:num_hit] if block >= 0]
            yield Event("hit", name, "BlockManager.find_prefix", {"tokens": num_cached, "blocks": hit})

    def _follow(self) -> None:
        """Name the sequences that no trace has seen, in order of arrival."""
        scheduler = self._engine.scheduler
        for seq in chain(scheduler.running, self._first_waiting()):
            if seq in self._followed or seq.is_finished:
                continue
            request, completion = self._owner[seq]
            name, text = next(self._names), completion.detokenizer
            self._followed[seq] = _Followed(name, text=text, num_pieces=len(text.pieces) if text else 0)
            prompt = self._prompt(request) if self.has_texts else ""
            self._arrivals.append(Arrival(name, seq.num_prompt_tokens, prompt, seq.max_len - seq.num_prompt_tokens))
            if self._num_steps is not None:  # the first trace does not know when they came
                self._events.append(Event("arrive", name, "Scheduler.add", {}))

    def _prompt(self, request: Request) -> str:
        text = request.prompt
        if text is None:
            text = self._decoder.decode(request.prompt_token_ids[:MOST_CHARS]) if self._decoder else ""
        return text[:MOST_CHARS]

    def _first_waiting(self) -> Iterator[Sequence]:
        return islice(self._engine.scheduler.waiting, MOST_WAITING)

    def _pieces(self) -> dict[str, list[str]]:
        """The new text of each sequence that has some."""
        pieces = {}
        for followed in self._followed.values():
            if followed.text is not None and len(followed.text.pieces) > followed.num_pieces:
                pieces[followed.name] = followed.text.pieces[followed.num_pieces :]
                followed.num_pieces = len(followed.text.pieces)
        if self._decoder is not None and self._batch:
            for seq in self._engine.advanced:
                followed = self._followed.get(seq)
                if followed is not None and followed.text is None and seq.finish_reason != "error":
                    pieces[followed.name] = self._decoder.token_texts(seq.token_ids[-1:], seq.token_ids[-9:-1])
        return pieces


def names() -> Iterator[str]:
    """A, B, …, Z, A1, B1, …"""
    for i in count():
        yield from (f"{letter}{i or ''}" for letter in ascii_uppercase)


def _evictions(taken: Iterable[int], lost: set[int]) -> list[Event]:
    """Those of the blocks that were taken which others could find until then."""
    return [Event("evict", None, "BlockManager._take", {"block": block}) for block in taken if block in lost]


def _end_of(name: str, seq: Sequence) -> Event:
    """How a sequence has ended."""
    reason = seq.finish_reason
    if reason == "abort":
        return Event("abort", name, "LLMEngine.abort", {"reason": reason})
    is_stop_string = reason == "stop" and isinstance(seq.stop_reason, str)
    by = "TextEngine._detokenize" if is_stop_string else "LLMEngine._fail" if reason == "error" else ""
    return Event("finish", name, by or "Sequence.append_token", {"reason": reason})
