"""The real LLMEngine over a simulated device, so that thousands of schedules run in seconds and every error shows.

The device follows step plans and nothing else: its rows and block tables come from the plans' deltas. Its "model" is a
hash: the key and value of a token are the hash of the whole prefix up to it, written to a slot. Attention reads every
slot of the context back and fails unless it finds there the hashes of its own prefix, which it would not if a block
were stale, lost, shared wrongly or written by two. The next token is a function of the hash, so that what each request
must answer is known beforehand, whoever shares its batch. A grammar is a hash, too: of its seed and the output so far.
"""

from bisect import bisect_right
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
from inside import (
    begin_books,
    blocks_of_digests,
    digests_of_blocks,
    free_blocks,
    free_rows,
    owners_of_blocks,
    steps_in_flight,
    unfinished_sequences,
)

from nanovllm.cache_groups import CacheGroups, Windows, most_blocks_in_all
from nanovllm.config import Config
from nanovllm.distributed.ranks import Followers
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from nanovllm.sampling_params import NAN_LOGITS, NO_TOKEN_LEFT, SamplingParams
from nanovllm.step_plan import StepPlan
from nanovllm.structured_outputs import TokenMasks

EOS = 0
VOCAB_SIZE = 5  # so few that requests stop often, and share prefixes by chance


def extend(parent: int, token_id: int) -> int:
    """The hash of a prefix and one more token."""
    return ((parent ^ (token_id + 1)) * 6364136223846793005 + 1442695040888963407) % 2**64


def prefix_hashes(token_ids: list[int]) -> list[int]:
    hashes, parent = [], 0
    for token_id in token_ids:
        parent = extend(parent, token_id)
        hashes.append(parent)
    return hashes


def next_token(
    prefix_hash: int, num_tokens: int, min_len: int, stop_ids: list[int], allowed: set[int] | None = None
) -> int:
    """The model's choice, or the next one after it that is not held back and that the grammar, if any, allows."""
    first = (prefix_hash >> 40) % VOCAB_SIZE
    held_back = stop_ids if num_tokens < min_len else ()
    for token_id in (*range(first, VOCAB_SIZE), *range(first)):
        if token_id not in held_back and (allowed is None or token_id in allowed):
            return token_id
    return NO_TOKEN_LEFT


def allowed_tokens(grammar: int, output: list[int]) -> set[int]:
    """What the grammar with this seed allows next: any set of tokens, and now and then none."""
    bits = prefix_hashes([grammar, *output])[-1] >> 30
    return {token_id for token_id in range(VOCAB_SIZE) if bits >> token_id & 1}


class SimulatedMatcher:
    """Stands in for `text.grammar.Matcher`."""

    num_words = 1
    error = ""

    def __init__(self, grammar: int) -> None:
        self.grammar, self.accepted = grammar, []

    @property
    def num_tokens(self) -> int:
        return len(self.accepted)

    def accept(self, token_ids: list[int]) -> bool:
        for token_id in token_ids:
            assert token_id in allowed_tokens(self.grammar, self.accepted), "a token was drawn without its mask"
            self.accepted.append(token_id)
        return True

    @staticmethod
    def advance_all(matchers: "list[SimulatedMatcher]", token_ids: list[list[int]], bits: np.ndarray) -> None:
        for matcher, ids, row in zip(matchers, token_ids, bits, strict=True):
            matcher.accept(ids)
            matcher.fill(row)

    def fill(self, row: np.ndarray) -> None:
        row[0] = sum(1 << token_id for token_id in allowed_tokens(self.grammar, self.accepted))


def has_no_token(prefix_hash: int, nan_every: int) -> bool:
    """Whether the model's logits after a prefix are NaN: of one in so many, 0 for never."""
    return nan_every > 0 and (prefix_hash >> 20) % nan_every == 0


def expected_output(
    prompt: list[int], params: SamplingParams, max_model_len: int, nan_every: int = 0, grammar: int | None = None
) -> tuple[list[int], str]:
    """The tokens and the finish reason of a request that runs alone and is never disturbed."""
    held_back = sorted({EOS, *params.stop_token_ids})
    stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    limit = max_model_len - len(prompt)
    limit = limit if params.max_tokens is None else min(limit, params.max_tokens)
    min_len = len(prompt) + params.min_tokens if params.min_tokens else 0
    tokens, parent = list(prompt), prefix_hashes(prompt)[-1]
    for produced in range(1, limit + 1):
        if has_no_token(parent, nan_every):
            return tokens[len(prompt) :], "error"
        allowed = None if grammar is None else allowed_tokens(grammar, tokens[len(prompt) :])
        tokens.append(next_token(parent, len(tokens), min_len, held_back, allowed))
        if tokens[-1] == NO_TOKEN_LEFT:
            return tokens[len(prompt) : -1], "error"
        parent = extend(parent, tokens[-1])
        if tokens[-1] in stop_ids and produced > params.min_tokens:
            return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"


class SimulatedDevice:
    """Stands in for ModelRunner."""

    is_cuda = False
    not_ready = ""
    extras = SimpleNamespace(
        masked_draws=SimpleNamespace(buffer=lambda num, num_words: np.empty((num, num_words), dtype=np.int32))
    )

    def __init__(
        self, num_blocks: int, block_size: int, max_model_len: int, num_rows: int, budget: int, windows: Windows
    ) -> None:
        self.cache_groups = CacheGroups(windows, [])
        self.num_blocks, self.block_size, self.max_model_len = num_blocks, block_size, max_model_len
        self.num_rows, self.budget = num_rows, budget
        self.rows: dict[int, SimpleNamespace] = {}
        self.slots: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)  # (group, hash)
        self.launched: StepPlan | None = None
        self.fail_next = False
        self.nan_every = 0
        self.is_lost = False  # all that it is asked to do fails, as on CUDA after an illegal memory access

    def check_device(self) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def launch(self, plan: StepPlan) -> SimpleNamespace:
        self.check_device()
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("injected device failure")
        self._check(plan)
        self._apply_deltas(plan)
        self._store(plan)
        self._attend(plan)
        self.launched, self.sampled = plan, self._sample(plan)
        has_grammar = any(self.rows[row].has_grammar for row in plan.rows[: plan.num_samples])
        return self._handle(plan if has_grammar else None)

    def draw(self, plan: StepPlan, masks: TokenMasks) -> SimpleNamespace:
        assert plan is self.launched, "a step draws under its masks when a later one was launched"
        for index, bits in zip(masks.samples, masks.bits, strict=True):
            assert self.rows[plan.rows[index]].has_grammar
            allowed = {token_id for token_id in range(VOCAB_SIZE) if bits[0] >> token_id & 1}
            if self.sampled[index] != NAN_LOGITS:
                self.sampled[index] = self._draw(plan.rows[index], allowed)
        return self._handle(None)

    def _handle(self, awaits_masks: StepPlan | None) -> SimpleNamespace:
        sampled = list(self.sampled)
        return SimpleNamespace(tokens=lambda: sampled, awaits_masks=awaits_masks)

    def _check(self, plan: StepPlan) -> None:
        assert plan.rows and len(plan.rows) == len(plan.query_lens)
        assert len(set(plan.rows)) == len(plan.rows) <= self.num_rows, f"rows {plan.rows}"
        assert all(0 <= row < self.num_rows for row in plan.rows)
        assert plan.num_tokens <= self.budget
        assert min(plan.query_lens) >= 1
        assert all(n == 1 for n in plan.query_lens[: plan.num_decodes])
        assert plan.num_decodes <= plan.num_samples <= len(plan.rows)
        assert len(plan.rows) - plan.num_samples <= 1, "two prompts were cut short in one step"
        assert {new.row for new in plan.new_rows} <= set(plan.rows)
        assert {row for row, *_ in plan.new_blocks} <= set(plan.rows)

    def _apply_deltas(self, plan: StepPlan) -> None:
        for row, group, index, block in plan.new_blocks:
            assert index == len(self.rows[row].block_tables[group]), "a block table grew with a gap"
            self.rows[row].block_tables[group].append(block)
        for new in plan.new_rows:
            # An earlier owner's tokens and blocks stay in memory past what the new one overwrites.
            old = self.rows.get(new.row, SimpleNamespace(token_ids=[]))
            self.rows[new.row] = SimpleNamespace(
                token_ids=[*new.token_ids, *old.token_ids[len(new.token_ids) :]],
                block_tables=[list(table) for table in new.block_tables],
                num_computed=new.num_computed_tokens,
                hashes=prefix_hashes(new.token_ids[: new.num_computed_tokens]),
                min_len=new.min_len,
                stop_ids=new.stop_ids,
                has_grammar=new.edits is not None and new.edits.has_grammar,
            )

    def _slots_of(self, table: list[int], start: int, end: int) -> list[int]:
        size = self.block_size
        assert all(table[i] >= 0 for i in range(start // size, -(-end // size))), "a block was needed that went back"
        return [table[p // size] * size + p % size for p in range(start, end)]

    def _store(self, plan: StepPlan) -> None:
        """A layer stores all keys and values of a step before it attends."""
        written: set[int] = set()
        for index, query_len in zip(plan.rows, plan.query_lens, strict=True):
            row = self.rows[index]
            start, end = row.num_computed, row.num_computed + query_len
            parent = row.hashes[-1] if row.hashes else 0
            for position in range(start, end):
                parent = extend(parent, row.token_ids[position])
                row.hashes.append(parent)
            for group, table in enumerate(row.block_tables):
                for slot, content in zip(self._slots_of(table, start, end), row.hashes[start:end], strict=True):
                    assert slot not in written, "two sequences, or two groups, write to one slot"
                    written.add(slot)
                    self.slots[slot] = (group, content)
            row.num_computed = end

    def _attend(self, plan: StepPlan) -> None:
        for index, query_len in zip(plan.rows, plan.query_lens, strict=True):
            row = self.rows[index]
            first_query = row.num_computed - query_len
            for group, (table, window) in enumerate(zip(row.block_tables, self.cache_groups.windows, strict=True)):
                start = 0 if window is None else max(first_query - window + 1, 0)
                read = [self.slots[slot] for slot in self._slots_of(table, start, row.num_computed)]
                expected = [(group, content) for content in row.hashes[start:]]
                assert read == expected, "attention read another prefix's keys and values"

    def _sample(self, plan: StepPlan) -> list[int]:
        return [self._draw(row) for row in plan.rows[: plan.num_samples]]

    def _draw(self, index: int, allowed: set[int] | None = None) -> int:
        row = self.rows[index]
        n = row.num_computed
        if has_no_token(row.hashes[-1], self.nan_every):
            token_id = NAN_LOGITS
        else:
            token_id = next_token(row.hashes[-1], n, row.min_len, row.stop_ids, allowed)
        row.token_ids[n:] = [max(token_id, 0), *row.token_ids[n + 1 :]]
        return token_id


def make_engine(
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int | None = None,
    enable_prefix_caching: bool = True,
    max_behind: int = 0,
    windows: Windows = (None,),
) -> LLMEngine:
    """An LLMEngine as its constructor leaves it, but for the device. `max_model_len` is cut to what the cache holds."""
    longest = max_model_len or num_blocks * block_size
    needs = partial(most_blocks_in_all, windows=windows, largest_chunk=max_num_batched_tokens, block_size=block_size)
    max_model_len = bisect_right(range(longest + 1), num_blocks, key=needs) - 1
    engine = LLMEngine.__new__(LLMEngine)
    engine.config = Config(
        model="simulated",
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
    )
    engine.followers = Followers(engine.config)
    rows = min(max_num_seqs, max_num_batched_tokens)
    engine.runner = SimulatedDevice(num_blocks, block_size, max_model_len, rows, max_num_batched_tokens, windows)
    engine.eos_token_ids, engine.eos_token_id = frozenset({EOS}), None
    engine.vocab_size = VOCAB_SIZE
    engine.max_model_len = max_model_len
    engine.max_behind = max_behind
    engine.stats = StepStats()
    begin_books(engine)
    return engine


def add_request(engine: LLMEngine, prompt: list[int], params: SamplingParams, grammar: int | None = None) -> Sequence:
    seq = engine.make_sequence(prompt, params)
    seq.grammar = None if grammar is None else SimulatedMatcher(grammar)
    engine.add(seq)
    return seq


def run(engine: LLMEngine, max_steps: int = 10_000) -> None:
    """Step until nothing is left, checking every invariant after every step."""
    checker = Checker(engine)
    for _ in range(max_steps):
        if not engine.has_unfinished_requests:
            checker.check_idle()
            return
        checker.step()
    raise AssertionError(f"requests are left after {max_steps} steps")


class Checker:
    """Steps an engine, and holds it to its promises after each step."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.content_of: dict[bytes, list[int]] = {}  # digest -> the hashes that its block must hold
        self.earliest: tuple[Sequence | None, tuple[int, int], int] = (None, (0, 0), 0)

    def step(self) -> list[Sequence]:
        engine = self.engine
        steps, waited = engine.stats.num_steps, steps_in_flight(engine)
        finished = engine.step()
        assert engine.stats.num_steps > steps or steps_in_flight(engine) < waited, "a step did nothing"
        assert steps_in_flight(engine) <= engine.max_behind
        unfinished = unfinished_sequences(engine)
        assert all(seq.is_finished and seq.request_id not in unfinished for seq in finished)
        self.check()
        self._check_progress()
        return finished

    def check(self) -> None:
        self._check_blocks()
        self._check_content()
        self._check_order()
        self._check_rows()

    def check_idle(self) -> None:
        self.check()
        engine = self.engine
        assert not engine.scheduler.running and engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
        stats = engine.current_stats()
        assert (stats.cache_usage, stats.num_running, stats.num_waiting) == (0.0, 0, 0)

    def _check_blocks(self) -> None:
        """Every block is free or owned, and owned by as many as it counts."""
        manager = self.engine.block_manager
        owners = [0] * manager.num_blocks
        for seq in self.engine.scheduler.running:
            held = [block for table in seq.block_tables for block in table if block >= 0]
            assert len(set(held)) == len(held)
            for table, window in zip(seq.block_tables, manager.windows, strict=True):
                assert len(table) * manager.block_size >= seq.num_computed_tokens
                # No more than the next token needs
                assert len(table) <= manager.num_blocks_for(max(len(seq.token_ids), seq.num_computed_tokens))
                self._check_window(table, window, seq.num_computed_tokens)
            for block in held:
                owners[block] += 1
        assert owners_of_blocks(manager) == owners
        assert set(free_blocks(manager)) == {block for block, n in enumerate(owners) if n == 0}
        assert manager.num_free_blocks + sum(n > 0 for n in owners) == manager.num_blocks
        assert not any(seq.block_tables for seq in self.engine.scheduler.waiting)

    def _check_window(self, table: list[int], window: int | None, num_computed: int) -> None:
        """A table has all that later tokens see, and no more than the tokens of the last step saw."""
        manager = self.engine.block_manager
        size = manager.block_size
        num_back = sum(block < 0 for block in table)
        assert all(block < 0 for block in table[:num_back]) and (window is not None or not num_back)
        if window is not None:
            assert num_back <= max(num_computed - window + 1, 0) // size, "a block that the next token sees went back"
            first_query = num_computed - self.engine.runner.budget
            assert num_back >= max(first_query - window + 1, 0) // size, "a block was kept behind the window"

    def _check_content(self) -> None:
        """What the prefix map promises to be in a block is there."""
        manager, device = self.engine.block_manager, self.engine.runner
        size = manager.block_size
        for seq in [*unfinished_sequences(self.engine).values(), *self.engine.scheduler.running]:
            if seq.block_digests and seq.block_digests[-1] not in self.content_of:
                hashes = prefix_hashes(seq.token_ids)
                for i, digest in enumerate(seq.block_digests):
                    content = hashes[i * size : (i + 1) * size]
                    assert self.content_of.setdefault(digest, content) == content, "two prefixes, one digest"
        digest_of = digests_of_blocks(manager)
        for (digest, group), block in blocks_of_digests(manager).items():
            assert digest_of[block] == (digest, group)
            if digest in self.content_of:  # unknown only if its one owner finished within this very step
                content = device.slots[block * size : (block + 1) * size]
                expected = [(group, prefix_hash) for prefix_hash in self.content_of[digest]]
                assert content == expected, "a cached block does not hold what its digest says"
        cached = {block for block, digest in enumerate(digest_of) if digest is not None}
        assert cached == set(blocks_of_digests(manager).values())
        assert manager.enable_prefix_caching or not cached

    def _check_order(self) -> None:
        """First come, first served: nobody who waits arrived before anybody who runs."""
        scheduler = self.engine.scheduler
        order = [*scheduler.running, *(seq for seq in scheduler.waiting if not seq.is_finished)]
        arrivals = [int(seq.request_id) for seq in order]
        assert all(a < b for a, b in pairwise(arrivals)), f"arrivals out of order: {arrivals}"
        assert {seq.request_id for seq in order} == set(unfinished_sequences(self.engine)), "a request is lost"

    def _check_rows(self) -> None:
        """The device, which has seen only deltas, agrees with the host."""
        scheduler, device = self.engine.scheduler, self.engine.runner
        used = [seq.row for seq in scheduler.running]
        assert sorted(used + free_rows(scheduler)) == list(range(device.num_rows))
        assert all(seq.row == -1 for seq in scheduler.waiting)
        for seq in scheduler.running:
            row = device.rows[seq.row]
            for on_device, table in zip(row.block_tables, seq.block_tables, strict=True):
                assert len(on_device) == len(table)
                assert all(theirs == ours for theirs, ours in zip(on_device, table, strict=True) if ours >= 0)
            assert row.num_computed == seq.num_computed_tokens
            assert row.token_ids[: len(seq.token_ids)] == seq.token_ids

    def _check_progress(self) -> None:
        """The earliest request advances: no starvation, no livelock."""
        seq = min(unfinished_sequences(self.engine).values(), key=lambda s: int(s.request_id), default=None)
        if seq is None:
            self.earliest = (None, (0, 0), 0)
            return
        progress = (len(seq.token_ids), seq.num_computed_tokens)
        last_seq, last_progress, idle = self.earliest
        idle = idle + 1 if last_seq is seq and progress == last_progress else 0
        assert idle <= 1, "the earliest request has not advanced for two steps"
        self.earliest = (seq, progress, idle)
