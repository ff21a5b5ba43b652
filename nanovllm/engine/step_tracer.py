"""Makes a `StepTrace` of a step by comparing the engine's books before planning, after planning, and at the end.

The engine does not know of it. For the time of one step the tracer stands between the engine and its scheduler: it sees
the plan, the block tables as planned, and what they were before. From that follow the events of the step: a preemption
is a count that rose, a hit is where a new row begins, a chunk is a part of a prompt, an eviction is a block that was
taken while others could find it. What callers do between two steps shows in the queues and blocks of the next trace;
arrivals and ends are the only events of it.

The cost grows with the batch and with what has changed, not with the cache or the queue.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count, islice
from string import ascii_uppercase
from typing import NamedTuple

from nanovllm.engine.block_states import BlockStates, Tables, digests_of
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Completion, Request
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_trace import Arrival, BatchEntry, Event, Observer, StepTrace
from nanovllm.text.detokenizer import Detokenizer
from nanovllm.text.token_decoder import TokenDecoder

MOST_WAITING = 64  # of the queue, which may be long
MOST_CHARS = 200  # of a prompt


class _Before(NamedTuple):
    """A running sequence's books before a plan."""

    num_preemptions: int
    published: range  # indices of the blocks that a release would publish
    tables: Tables


@dataclass(slots=True)
class _Followed:
    """A sequence that traces have named."""

    name: str
    text: Detokenizer | None
    num_pieces: int  # of its text, that traces have had


class StepTracer:
    """Follows one engine for one observer. Of the engine's thread.

    Args:
        owner: each unfinished sequence's request and completion.
        decoder: None if the engine has no tokenizer.

    Attributes:
        cost_s: what the last trace of a step took, beside the step itself.
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
        self._blocks = BlockStates()
        self._arrivals: list[Arrival] = []
        self._events: list[Event] = []
        self._batch: list[BatchEntry] = []
        self._step_s = self.cost_s = 0.0
        self._num_steps: int | None = None  # as of the last trace; None before the first

    def step(self) -> None:
        """Let the engine do a step, and watch. Raises what it raises."""
        scheduler = self._engine.scheduler
        schedule = scheduler.schedule
        self._arrivals, self._events, self._batch = [], [], []
        scheduler.schedule = lambda: self._watch(scheduler, schedule)
        began = time.perf_counter()
        try:
            self._engine.step()
        finally:
            vars(scheduler).pop("schedule", None)  # the instance's own, which hides the class's
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
        trace = self._trace(self._steps_since())
        return trace if trace.is_full or trace.blocks or trace.events or trace.num_skipped else None

    def _steps_since(self) -> int:
        """How many steps were launched since the last trace."""
        return 0 if self._num_steps is None else self._engine.stats.num_steps - self._num_steps

    def _trace(self, num_skipped: int) -> StepTrace:
        engine, scheduler = self._engine, self._engine.scheduler
        self._follow()  # those that have come since the plan
        is_full, self._num_steps = self._num_steps is None, engine.stats.num_steps
        followed = self._followed
        ended = [seq for seq in followed if seq.is_finished]
        self._events += [_end_of(followed[seq].name, seq) for seq in ended]
        pieces = self._pieces()
        tables = {followed[seq].name: seq.block_tables for seq in scheduler.running}
        trace = StepTrace(
            num_steps=engine.stats.num_steps,
            num_skipped=max(0, num_skipped),
            time_s=time.monotonic(),
            step_s=self._step_s,
            batch=self._batch,
            running=list(tables),
            waiting=[followed[seq].name for seq in self._first_waiting() if not seq.is_finished],
            blocks=self._blocks.look(engine.block_manager, tables),
            is_full=is_full,
            events=self._events,
            arrivals=self._arrivals,
            pieces=pieces,
            stats=engine.current_stats(),
        )
        for seq in ended:
            del followed[seq]
        return trace

    def _watch(self, scheduler: Scheduler, schedule: Callable[[], ScheduledStep]) -> ScheduledStep:
        """Plan a step, and note what that did."""
        began, manager = time.perf_counter(), scheduler.block_manager
        before = {seq: _before(seq, manager.block_size) for seq in scheduler.running}
        digests, num_evictions = digests_of(manager), manager.stats.evictions
        self.cost_s = time.perf_counter() - began
        step = schedule()
        began = time.perf_counter()
        self._follow()
        of_row = {seq.row: seq for seq in scheduler.running}
        new = {of_row[row.row]: row.num_computed_tokens for row in step.plan.new_rows}  # its tokens that were cached
        self._events += self._preemptions(before)
        fresh: list[tuple[list[Event], list[int]]] = [([], [block for *_, block in step.plan.new_blocks])]
        for seq, num_cached in new.items():
            tables = (table[num_cached // manager.block_size :] for table in seq.block_tables)
            taken = [block for block in chain.from_iterable(tables) if block >= 0]
            fresh.append((list(self._admission(seq, num_cached)), taken))
        num_evicted = manager.stats.evictions - num_evictions
        evicted = self._evicted([block for _, taken in fresh for block in taken], num_evicted, digests, before)
        for events, taken in fresh:
            self._events += events
            self._events += [
                Event("evict", None, "BlockManager._take", {"block": block}) for block in taken if block in evicted
            ]
        for i, (row, num_tokens) in enumerate(zip(step.plan.rows, step.plan.query_lens, strict=True)):
            seq = of_row[row]
            end, prompt_len, name = seq.num_computed_tokens, len(seq.token_ids), self._followed[seq].name
            is_decode = i < step.plan.num_decodes
            self._batch.append(BatchEntry(name, "decode" if is_decode else "prefill", end - num_tokens, num_tokens))
            if not is_decode and (seq not in new or end < prompt_len):
                by = "Scheduler._admit_waiting" if seq in new else "Scheduler._continue_prefills"
                self._events.append(Event("chunk", name, by, {"from": end - num_tokens, "to": end, "of": prompt_len}))
        self.cost_s += time.perf_counter() - began
        return step

    def _admission(self, seq: Sequence, num_cached: int) -> Iterator[Event]:
        name, tables = self._followed[seq].name, seq.block_tables
        held = [block for block in dict.fromkeys(chain.from_iterable(tables)) if block >= 0]
        yield Event("admit", name, "Scheduler._admit_waiting", {"blocks": held})
        if num_cached:
            num_hit = num_cached // self._engine.block_manager.block_size
            hit = [block for table in tables for block in table[:num_hit] if block >= 0]
            yield Event("hit", name, "BlockManager.find_prefix", {"tokens": num_cached, "blocks": hit})

    def _preemptions(self, before: dict[Sequence, _Before]) -> Iterator[Event]:
        """The latest arrival first, as the scheduler takes them. A block is freed by the last of its owners."""
        victims = [seq for seq in reversed(before) if seq.num_preemptions > before[seq].num_preemptions]
        if not victims:
            return
        owners: dict[int, set[Sequence]] = {}
        for seq, books in before.items():
            for block in chain.from_iterable(books.tables):
                owners.setdefault(block, set()).add(seq)
        for seq in victims:
            freed = []
            for block in chain.from_iterable(before[seq].tables):
                owners[block].discard(seq)
                if block >= 0 and not owners[block]:
                    freed.append(block)
            name = self._followed[seq].name
            yield Event("preempt", name, "Scheduler._preempt_latest", {"blocks": freed})

    def _evicted(
        self,
        taken: list[int],
        number: int,
        digests: list[bytes | None],
        before: dict[Sequence, _Before],
    ) -> set[int]:
        """Which of the blocks that were taken others could find until then; so many, by the manager's count.

        Those with a digest before the plan. With a step in flight there may be more: a block's last token is known
        late, so a preempted sequence publishes its last full block only when it is released, and that block may be
        taken next. Of equal blocks of several such sequences the first to be released is meant.
        """
        evicted = {block for block in taken if digests[block] is not None}
        if len(evicted) == number:
            return evicted
        found: dict[bytes, int] = {}
        others: list[int] = []
        known = set(digests)
        for seq, books in reversed(before.items()):
            if seq.num_preemptions > books.num_preemptions:
                for table in books.tables:
                    for i in books.published:
                        if table[i] in taken and table[i] not in evicted:
                            is_new = seq.block_digests[i] not in known and seq.block_digests[i] not in found
                            found.setdefault(seq.block_digests[i], table[i])
                            others = [table[i], *others] if is_new else [*others, table[i]]
        return evicted | set(others[: number - len(evicted)])

    def _follow(self) -> None:
        """Name the sequences that no trace has seen, in order of arrival."""
        scheduler = self._engine.scheduler
        for seq in chain(scheduler.running, self._first_waiting()):
            if seq in self._followed or seq.is_finished:
                continue
            request, completion = self._owner[seq]
            name, text = next(self._names), completion.detokenizer
            self._followed[seq] = _Followed(name, text, len(text.pieces) if text else 0)
            prompt = request.prompt
            if prompt is None:
                prompt = self._decoder.decode(request.prompt_token_ids[:MOST_CHARS]) if self._decoder else ""
            limit = seq.max_len - seq.num_prompt_tokens
            self._arrivals.append(Arrival(name, seq.num_prompt_tokens, prompt[:MOST_CHARS], limit))
            if self._num_steps is not None:  # the first trace does not know when they came
                self._events.append(Event("arrive", name, "Scheduler.add", {}))

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


def _before(seq: Sequence, block_size: int) -> _Before:
    num_known = min(seq.num_computed_tokens, len(seq.token_ids))
    published = range(seq.num_published_blocks, num_known // block_size)
    return _Before(seq.num_preemptions, published, [list(table) for table in seq.block_tables])


def _end_of(name: str, seq: Sequence) -> Event:
    """How a sequence has ended."""
    reason = seq.finish_reason
    if reason == "abort":
        return Event("abort", name, "LLMEngine.abort", {"reason": reason})
    is_stop_string = reason == "stop" and isinstance(seq.stop_reason, str)
    by = "TextEngine._detokenize" if is_stop_string else "LLMEngine._fail" if reason == "error" else ""
    return Event("finish", name, by or "Sequence.append_token", {"reason": reason})
