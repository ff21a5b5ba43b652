"""Random schedules over the simulated device: no block is lost or has two owners, every request ends as it must."""

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_engine import VOCAB_SIZE, Checker, add_request, expected_output, make_engine

from nanovllm.cache_groups import Windows
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

NUM_SCHEDULES = int(os.environ.get("NANOVLLM_TEST_SCHEDULES", "10000"))
NUM_PARTS = 10  # so that several workers can share them

deterministic = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# Of each group of layers. Shorter than a block, no multiple of one, several groups of a kind, no layer that sees all.
MIXED_WINDOWS = ((None, 1), (None, 2), (None, 3, 3), (None, 5), (4,), (2, 7), (3, 3, 8), (None, 2, 6, 6), (None, 20))


def random_engine(rng: random.Random, windows: Windows) -> LLMEngine:
    block_size = rng.choice((1, 2, 2, 3, 4))
    num_blocks = rng.randint(2, 12) * len(windows)
    return make_engine(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=rng.choice((1, 2, 3, 4, 6, 8)),
        max_num_batched_tokens=rng.choice((1, 2, 3, 5, 8, 13, 64)),
        max_model_len=max(2, int(num_blocks * block_size * rng.choice((0.4, 0.7, 1.0)))),
        windows=windows,
        enable_prefix_caching=rng.random() < 0.75,
        max_behind=rng.randint(0, 1),
    )


def random_params(rng: random.Random) -> SamplingParams:
    max_tokens = rng.choice((None, 1, 3, 6, 12))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.randint(0, min(3, max_tokens or 3)) if rng.random() < 0.3 else 0,
        ignore_eos=rng.random() < 0.7,
        stop_token_ids=[rng.randrange(VOCAB_SIZE)] if rng.random() < 0.2 else [],
    )


class Schedule:
    """An engine under a random load, and what each of its requests must answer."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.checker = Checker(engine)
        self.requests: list[tuple[Sequence, tuple[list[int], str]]] = []
        self.aborted: set[str] = set()

    def arrive(self, prompt: list[int], params: SamplingParams, grammar: int | None = None) -> None:
        seq = add_request(self.engine, prompt, params, grammar)
        limits = (self.engine.max_model_len, self.engine.runner.nan_every)
        self.requests.append((seq, expected_output(prompt, params, *limits, grammar)))

    def abort(self, index: int) -> None:
        seq = self.requests[index][0]
        if not seq.is_finished:
            self.aborted.add(seq.request_id)
        self.engine.abort([seq])

    def fail(self) -> None:
        """The device fails in the next step, and everybody's request with it."""
        self.engine.runner.fail_next = True
        with pytest.raises(RuntimeError, match="injected"):
            while self.engine.has_unfinished_requests:
                self.engine.step()
            raise RuntimeError("injected, but the last step needed no launch")
        self.engine.runner.fail_next = False
        self.aborted |= {seq.request_id for seq, _ in self.requests if seq.finish_reason == "abort"}
        self.checker = Checker(self.engine)
        self.checker.check_idle()

    def drain(self) -> None:
        for _ in range(2000):
            if not self.engine.has_unfinished_requests:
                break
            self.checker.step()
        assert not self.engine.has_unfinished_requests, "requests that never end"
        self.checker.check_idle()
        for seq, (tokens, reason) in self.requests:
            if seq.request_id in self.aborted:
                assert seq.finish_reason == "abort"
                assert seq.output_token_ids == tokens[: len(seq.output_token_ids)]
            else:
                assert (seq.output_token_ids, seq.finish_reason) == (tokens, reason)


def run_random_schedule(rng: random.Random, windows: Windows = (None,)) -> LLMEngine:
    schedule = Schedule(random_engine(rng, windows))
    engine = schedule.engine
    engine.runner.nan_every = rng.choice((0, 0, 40))
    longest = engine.max_model_len - 1
    shared = [[rng.randrange(VOCAB_SIZE) for _ in range(longest)] for _ in range(2)]
    arrivals = sorted(rng.randint(0, 8) for _ in range(rng.randint(1, 9)))
    num_steps = 0
    while arrivals:
        while arrivals and arrivals[0] <= num_steps:
            arrivals.pop(0)
            length = max(1, int(longest * rng.random() ** 2))
            num_shared = rng.randint(0, length)
            tail = [rng.randrange(VOCAB_SIZE) for _ in range(length - num_shared)]
            grammar = rng.getrandbits(32) if rng.random() < 0.3 else None
            schedule.arrive(rng.choice(shared)[:num_shared] + tail, random_params(rng), grammar)
        if rng.random() < 0.1:
            schedule.abort(rng.randrange(len(schedule.requests))) if schedule.requests else None
        if rng.random() < 0.01:
            schedule.fail()
        if rng.random() < 0.01:
            engine.block_manager.forget_content()
        if engine.has_unfinished_requests:
            schedule.checker.step()
        num_steps += 1
    schedule.drain()
    return engine


@pytest.mark.parametrize("part", range(NUM_PARTS))
@pytest.mark.parametrize("has_windows", [False, True], ids=["one_group", "windows"])
def test_random_schedules_lose_no_block_and_every_request_ends_with_its_tokens(part: int, has_windows: bool) -> None:
    rng = random.Random(part)
    seen: Counter[str] = Counter()
    for number in range(NUM_SCHEDULES // NUM_PARTS // 2):  # half of them with windows
        seed, windows = rng.getrandbits(64), rng.choice(MIXED_WINDOWS) if has_windows else (None,)
        try:
            engine = run_random_schedule(random.Random(seed), windows)
        except Exception as error:
            raise AssertionError(f"schedule {number}: run_random_schedule(random.Random({seed}), {windows})") from error
        stats = engine.current_stats()
        seen["preempted"] += stats.num_preemptions > 0
        seen["shared a prefix"] += stats.prefix_hits > 0
        seen["evicted"] += stats.evictions > 0
    # The promise is worth little if the schedules did not come to these.
    assert min(seen[what] for what in ("preempted", "shared a prefix", "evicted")) > NUM_SCHEDULES // NUM_PARTS // 40, (
        seen
    )


@settings(deterministic, max_examples=600)
@given(st.randoms(use_true_random=False), st.sampled_from([(None,), *MIXED_WINDOWS]))
def test_shrinkable_schedules_lose_no_block_and_every_request_ends_with_its_tokens(
    rng: random.Random, windows: Windows
) -> None:
    run_random_schedule(rng, windows)


def windows_of_groups() -> st.SearchStrategy[Windows]:
    return st.lists(st.one_of(st.none(), st.integers(1, 12)), min_size=1, max_size=4).map(tuple)


class EngineMachine(RuleBasedStateMachine):
    """Hypothesis chooses what happens next; the invariants hold after each of its choices."""

    @initialize(
        num_blocks=st.integers(2, 8),
        block_size=st.integers(1, 3),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 9),
        caching=st.booleans(),
        max_behind=st.integers(0, 1),
        windows=st.one_of(st.just((None,)), windows_of_groups()),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        caching: bool,
        max_behind: int,
        windows: Windows,
    ) -> None:
        num_blocks *= len(windows)
        engine = make_engine(num_blocks, block_size, max_num_seqs, budget, None, caching, max_behind, windows)
        assume(engine.max_model_len >= 2)
        self.schedule = Schedule(engine)
        self.schedule.engine.runner.nan_every = 20

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8),  # so few tokens that prefixes meet
        max_tokens=st.one_of(st.none(), st.integers(1, 6)),
        ignore_eos=st.booleans(),
        grammar=st.one_of(st.none(), st.integers(0, 9)),
    )
    def arrive(self, prompt: list[int], max_tokens: int | None, ignore_eos: bool, grammar: int | None) -> None:
        prompt = prompt[: self.schedule.engine.max_model_len - 1]
        self.schedule.arrive(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos), grammar)

    @precondition(lambda self: self.schedule.engine.has_unfinished_requests)
    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            if self.schedule.engine.has_unfinished_requests:
                self.schedule.checker.step()

    @precondition(lambda self: self.schedule.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.schedule.abort(data.draw(st.integers(0, len(self.schedule.requests) - 1)))

    @rule()
    def reset_prefix_cache(self) -> None:
        self.schedule.engine.block_manager.forget_content()

    @rule()
    def fail(self) -> None:
        self.schedule.fail()

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "schedule"):
            self.schedule.checker.check()

    def teardown(self) -> None:
        if hasattr(self, "schedule"):
            self.schedule.drain()


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(deterministic, max_examples=400, stateful_step_count=30)
