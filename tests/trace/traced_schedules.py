"""Random schedules on the simulated device, with a reader of the traces who believes only what the engine's books say.

The reader applies the changes of each trace, and after every step compares: what each block holds with the manager's
books, events with the engine's counters and sequences, the batch with the tokens that were computed.
"""

import random
from collections import Counter
from itertools import chain

import pytest
from engine.simulated_engine import VOCAB_SIZE, make_engine
from inside import digests_of_blocks, llm_over, text_engine_of

from nanovllm import SamplingParams
from nanovllm.cache_groups import Windows
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_trace import StepTrace
from nanovllm.engine.text_engine import TextEngine

COUNTERS = ("num_preemptions", "evictions", "prefix_hits", "num_decode_tokens", "num_prefill_tokens")


class Reader:
    """Takes the traces of an engine, and holds each against the books."""

    def __init__(self, engine: LLMEngine, has_gaps: bool) -> None:
        self.engine, self.has_gaps = engine, has_gaps
        self.tables: dict[str, list[list[int]]] = {}
        self.digests: dict[int, bytes | None] = {}
        self.name_of: dict[Sequence, str] = {}
        self.end_of: dict[str, int] = {}  # the position up to which a sequence is computed
        self.preemptions: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.last = engine.current_stats()
        self.names: list[str] = []
        self.num_traces = 0

    def take(self, trace: StepTrace) -> None:
        assert trace.stats == self.engine.current_stats()
        if self.has_gaps:  # what happened meanwhile is lost; what there is now is not
            self._check_blocks(trace)
            return
        assert trace.num_skipped == 0
        self.names += [arrival.name for arrival in trace.arrivals]
        self._check_events(trace)
        self._check_batch(trace)
        self._check_queues(trace)
        self._check_blocks(trace)
        self.seen.update(event.what for event in trace.events)
        self.last = trace.stats

    def _check_events(self, trace: StepTrace) -> None:
        of: dict[str, list] = {what: [] for what in ("preempt", "evict", "hit", "admit", "chunk", "finish", "abort")}
        for event in trace.events:
            of.setdefault(event.what, []).append(event)
        rose = {name: getattr(trace.stats, name) - getattr(self.last, name) for name in COUNTERS}
        assert len(of["preempt"]) == rose["num_preemptions"]
        assert len(of["evict"]) == rose["evictions"]
        assert sum(event.data["tokens"] for event in of["hit"]) == rose["prefix_hits"]
        self.preemptions.update(event.name for event in of["preempt"])
        for event in of["preempt"]:
            for block in event.data["blocks"]:
                assert block in chain(*self.tables[event.name]), "it gave back a block that it did not have"
        evicted = [event.data["block"] for event in of["evict"]]
        assert len(set(evicted)) == len(evicted)
        for event in of["hit"]:
            admitted = next(other for other in of["admit"] if other.name == event.name)
            assert set(event.data["blocks"]) <= set(admitted.data["blocks"])
        for event in of["preempt"] + of["finish"] + of["abort"]:
            self.end_of.pop(event.name, None)
        for event in of["admit"]:
            hit = [other.data["tokens"] for other in of["hit"] if other.name == event.name]
            self.end_of[event.name] = hit[0] if hit else 0
        chunked = {event.name: event.data for event in of["chunk"]}
        for name, kind, first, number in trace.batch:
            if name in chunked:
                assert kind == "prefill" and chunked[name]["from"] == first and chunked[name]["to"] == first + number
                assert chunked[name]["to"] <= chunked[name]["of"]
        assert set(chunked) <= {name for name, *_ in trace.batch}

    def _check_batch(self, trace: StepTrace) -> None:
        kinds = [kind for _, kind, *_ in trace.batch]
        assert kinds == sorted(kinds), "decodes first"
        tokens: Counter[str] = Counter()
        ended = {event.name for event in trace.events if event.what in ("finish", "abort")}
        for name, kind, first, number in trace.batch:
            tokens[kind] += number
            if name not in ended:
                assert self.end_of[name] == first, "a sequence is computed without a gap"
                self.end_of[name] = first + number
        assert tokens["decode"] == trace.stats.num_decode_tokens - self.last.num_decode_tokens
        assert tokens["prefill"] == trace.stats.num_prefill_tokens - self.last.num_prefill_tokens

    def _check_queues(self, trace: StepTrace) -> None:
        scheduler = self.engine.scheduler
        waiting = [seq for seq in scheduler.waiting if not seq.is_finished]
        for seqs, names in ((scheduler.running, trace.running), (waiting, trace.waiting)):
            for seq, name in zip(seqs, names, strict=True):
                assert self.name_of.setdefault(seq, name) == name, "a name is one sequence's"
                assert self.preemptions[name] == seq.num_preemptions
        in_order = [*trace.running, *trace.waiting]
        assert in_order == sorted(in_order, key=self.names.index), "names go by arrival"

    def _check_blocks(self, trace: StepTrace) -> None:
        assert trace.is_full == (self.num_traces == 0)
        self.num_traces += 1
        num_groups = len(self.engine.block_manager.windows)
        self.tables = {name: self.tables.get(name, [[] for _ in range(num_groups)]) for name in trace.running}
        for name, group, *change in trace.tables:
            before = self.tables[name][group]
            self.tables[name][group] = applied(before, *change)
            assert self.tables[name][group] != before, "nothing has changed"
        self.digests |= trace.digests
        seqs = self.engine.scheduler.running
        assert self.tables == {name: seq.block_tables for name, seq in zip(trace.running, seqs, strict=True)}
        books = [key and key[0] for key in digests_of_blocks(self.engine.block_manager)]
        assert [self.digests.get(block) for block in range(len(books))] == books
        owners = Counter(block for seq in seqs for block in {*chain(*seq.block_tables)} if block >= 0)
        self.seen["shared"] += sum(number > 1 for number in owners.values())


def applied(table: list[int], num_kept: int, num_given_back: int, added: list[int]) -> list[int]:
    """A block table after a change."""
    assert num_kept <= len(table)
    after = table[:num_kept] + added
    return [-1] * num_given_back + after[num_given_back:]


def random_params(rng: random.Random) -> SamplingParams:
    limit = rng.choice((1, 3, 6, 12, None))
    return SamplingParams(max_tokens=limit, ignore_eos=rng.random() < 0.7, n=rng.choice((1, 1, 1, 2)))


def traced_schedule(rng: random.Random, windows: Windows, has_gaps: bool = False) -> Counter[str]:
    """Run a schedule under a reader's eyes. Returns how often each event came.

    With `has_gaps` only some steps are traced.
    """
    block_size, num_blocks = rng.choice((1, 2, 2, 3, 4)), rng.randint(2, 12) * len(windows)
    engine = make_engine(
        num_blocks, block_size, rng.choice((1, 2, 4, 8)), rng.choice((1, 2, 3, 5, 8, 64)),
        max_model_len=max(2, int(num_blocks * block_size * rng.choice((0.4, 0.7, 1.0)))),
        enable_prefix_caching=rng.random() < 0.8, max_behind=rng.randint(0, 1), windows=windows,
    )  # fmt: skip
    text_engine = text_engine_of(llm_over(engine))
    engine.runner.nan_every = rng.choice((0, 0, 40))
    reader = Reader(engine, has_gaps)
    engine.observer = reader.take
    longest = engine.max_model_len - 1
    shared = [[rng.randrange(VOCAB_SIZE) for _ in range(longest)] for _ in range(2)]
    requests, left = [], rng.randint(1, 9)
    while left or engine.has_unfinished_requests:
        while left and rng.random() < 0.4:
            left -= 1
            length = max(1, int(longest * rng.random() ** 2))
            num_shared = rng.randint(0, length)
            tail = [rng.randrange(VOCAB_SIZE) for _ in range(length - num_shared)]
            requests.append(text_engine.make_request(rng.choice(shared)[:num_shared] + tail, random_params(rng)))
            text_engine.add(requests[-1])
        if has_gaps and reader.num_traces:
            engine.observer = reader.take if rng.random() < 0.3 else None
        if requests and rng.random() < 0.05:
            text_engine.abort([rng.choice(requests)])
        if rng.random() < 0.02:
            engine.reset_prefix_cache()
        if rng.random() < 0.01:
            fail(text_engine)
            reader.last = engine.current_stats()  # what a failed step has counted has no trace
        elif engine.has_unfinished_requests:
            text_engine.step()
    engine.observer = reader.take
    trace = text_engine.tracer and text_engine.tracer.between_steps()
    if trace is not None:
        reader.take(trace)
    return reader.seen


def fail(text_engine: TextEngine) -> None:
    """A step fails on the device: its requests are aborted, and it has no trace."""
    engine = text_engine.engine
    engine.runner.fail_next = True
    with pytest.raises(RuntimeError, match="injected"):
        while engine.has_unfinished_requests:
            text_engine.step()
        raise RuntimeError("injected, but the last step needed no launch")
    engine.runner.fail_next = False
