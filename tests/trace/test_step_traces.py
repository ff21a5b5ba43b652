"""A trace says what the engine's books say, after every step, whatever the schedule; and costs nothing unobserved."""

import random
from collections import Counter

from engine.simulated_engine import add_request, make_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inside import llm_over, text_engine_of
from traced_schedules import traced_schedule

from nanovllm import SamplingParams
from nanovllm.engine import step_tracer
from nanovllm.engine.step_trace import StepTrace
from nanovllm.engine.step_tracer import names

WINDOWS = [(None,), (None, 2), (4,), (None, 3, 3)]
deterministic = settings(
    derandomize=True, deadline=None, database=None, max_examples=200, suppress_health_check=list(HealthCheck)
)


def test_traces_agree_with_the_books_after_every_step() -> None:
    rng, seen = random.Random(0), Counter()
    for number in range(600):
        seed, windows = rng.getrandbits(64), WINDOWS[number % 8 // 5 * (number % 3 + 1)]
        try:
            seen += traced_schedule(random.Random(seed), windows)
        except Exception as error:
            raise AssertionError(f"traced_schedule(random.Random({seed}), {windows})") from error
    # The promise is worth little if the schedules did not come to these.
    events = ("arrive", "admit", "hit", "chunk", "preempt", "evict", "finish", "abort", "shared")
    assert min(seen[what] for what in events) > 20, seen


def test_traces_of_some_steps_only_agree_with_the_books_all_the_same() -> None:
    rng, seen = random.Random(1), Counter()
    for number in range(300):
        seed, windows = rng.getrandbits(64), WINDOWS[number % len(WINDOWS)]
        try:
            seen += traced_schedule(random.Random(seed), windows, has_gaps=True)
        except Exception as error:
            raise AssertionError(f"traced_schedule(random.Random({seed}), {windows}, has_gaps=True)") from error
    assert seen["shared"] > 20


@deterministic
@given(st.randoms(use_true_random=False), st.sampled_from(WINDOWS))
def test_shrinkable_schedules_agree_with_the_books(rng: random.Random, windows: tuple[int | None, ...]) -> None:
    traced_schedule(rng, windows)


def test_nothing_is_made_while_nobody_listens(monkeypatch) -> None:
    monkeypatch.setattr(step_tracer, "StepTracer", None)  # making one fails
    engine = make_engine(num_blocks=8, block_size=2, max_num_seqs=2, max_num_batched_tokens=8)
    text_engine = text_engine_of(llm_over(engine))
    text_engine.add(text_engine.make_request([1, 2, 3], SamplingParams(max_tokens=4)))
    while engine.has_unfinished_requests:
        text_engine.step()
    assert text_engine.tracer is None


def test_a_listener_that_comes_late_begins_with_all_blocks_and_knows_no_arrivals() -> None:
    engine = make_engine(num_blocks=8, block_size=2, max_num_seqs=2, max_num_batched_tokens=8)
    text_engine, traces = text_engine_of(llm_over(engine)), []
    text_engine.add(text_engine.make_request([1, 2, 3, 4], SamplingParams(max_tokens=9, ignore_eos=True)))
    for _ in range(3):
        text_engine.step()
    engine.observer = traces.append
    text_engine.step()
    first: StepTrace = traces[0]
    assert first.is_full and first.tables == [("A", 0, 0, 0, engine.scheduler.running[0].block_tables[0])]
    assert [arrival.name for arrival in first.arrivals] == ["A"] and not first.events
    text_engine.step()
    assert not traces[1].is_full


def test_steps_that_nobody_traced_are_counted_and_their_changes_come_with_the_next_trace() -> None:
    engine = make_engine(num_blocks=8, block_size=2, max_num_seqs=2, max_num_batched_tokens=8)
    text_engine, traces = text_engine_of(llm_over(engine)), []
    take = traces.append
    text_engine.add(text_engine.make_request([1, 2], SamplingParams(max_tokens=12, ignore_eos=True)))
    for observer in (take, None, None, None, take):
        engine.observer = observer
        text_engine.step()
    assert [trace.num_skipped for trace in traces] == [0, 3]
    ((*_, num_kept, _, added),) = traces[1].tables
    assert (num_kept, len(added)) == (1, 2), "two blocks were taken meanwhile"


def test_between_steps_only_a_change_makes_a_trace() -> None:
    engine = make_engine(num_blocks=8, block_size=2, max_num_seqs=2, max_num_batched_tokens=8)
    text_engine, traces = text_engine_of(llm_over(engine)), []
    engine.observer = traces.append
    request = text_engine.make_request([1, 2], SamplingParams(max_tokens=12, ignore_eos=True))
    text_engine.add(request)
    text_engine.step()
    tracer = text_engine.tracer
    assert tracer.between_steps() is None
    text_engine.abort([request])
    trace = tracer.between_steps()
    assert [event.what for event in trace.events] == ["abort"] and not trace.batch and not trace.running
    assert tracer.between_steps() is None
    engine.reset_prefix_cache()
    assert set(tracer.between_steps().digests.values()) == {None}


def test_an_observer_that_raises_leaves_a_whole_engine() -> None:
    engine = make_engine(num_blocks=8, block_size=2, max_num_seqs=2, max_num_batched_tokens=8)
    text_engine = text_engine_of(llm_over(engine))

    def refuse(trace: StepTrace) -> None:
        raise ZeroDivisionError

    text_engine.add(text_engine.make_request([1, 2], SamplingParams(max_tokens=3, ignore_eos=True)))
    engine.observer = refuse
    try:
        text_engine.step()
    except ZeroDivisionError:
        engine.observer = None
    assert engine.observer is None and engine.has_unfinished_requests
    while engine.has_unfinished_requests:
        text_engine.step()
    assert engine.block_manager.num_free_blocks == 8
    assert add_request(engine, [1], SamplingParams(max_tokens=1))


def test_names_are_short_and_go_on() -> None:
    made = names()
    assert [next(made) for _ in range(53)][24:] == ["Y", "Z", *(f"{c}1" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "A2"]
