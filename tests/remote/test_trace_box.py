"""An engine's thread never waits for whoever watches it, and steps when it is told to."""

import time
from collections.abc import Callable, Iterator

import pytest
from engine.simulated_engine import make_engine
from inside import digests_of_blocks, llm_over, notes_its_changes, text_engine_of

from nanovllm import SamplingParams
from nanovllm.engine.engine_thread import EngineThread
from nanovllm.engine.step_trace import StepTrace
from nanovllm.remote import trace_box
from nanovllm.remote.messages import ForgetCache, Pace, Watch
from nanovllm.remote.trace_box import TraceBox


class Watched:
    """A simulated engine in its thread, with a box."""

    def __init__(self) -> None:
        engine = make_engine(num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
        self.text_engine = text_engine_of(llm_over(engine))
        self.engine, self.ended = engine, []
        self.thread = EngineThread(self.text_engine, after_news=lambda: self.box.look())
        self.box = TraceBox(self.text_engine, self.thread)
        self.thread.start()

    def tell(self, command: Watch | Pace | ForgetCache) -> None:
        self.thread.call(lambda: self.box.obey(command)).result(10)
        self.settle()

    def submit(self, num_tokens: int) -> None:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        self.thread.submit(self.text_engine.make_request([1, 2, 3], params), self.ended.append)
        self.settle()

    def settle(self) -> None:
        """Let what was asked before, and the look after it, be done."""
        self.thread.call(lambda: None).result(10)
        self.thread.call(lambda: None).result(10)

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 10
        while self.engine.has_unfinished_requests:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        self.settle()


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.thread.close()
    made.thread.join()


def num_covered(traces: list[StepTrace]) -> int:
    """Steps that traces tell of, those counted as skipped included."""
    return sum(trace.num_skipped + bool(trace.batch) for trace in traces)


def test_no_traces_are_made_before_somebody_watches_or_after(watched: Watched) -> None:
    watched.submit(20)
    watched.wait_until_idle()
    assert not watched.box and watched.text_engine.tracer is None
    watched.tell(Watch(True, is_teaching=True))
    assert watched.box.take()[0].is_full and notes_its_changes(watched.engine.block_manager)
    watched.tell(Watch(False))
    watched.submit(20)
    watched.wait_until_idle()
    assert not watched.box and watched.text_engine.tracer is None and watched.engine.observer is None
    assert not notes_its_changes(watched.engine.block_manager)


def test_with_every_step_wanted_every_step_comes(watched: Watched) -> None:
    watched.tell(Watch(True, is_teaching=True))
    watched.submit(40)
    watched.wait_until_idle()
    traces = watched.box.take()
    assert num_covered(traces) == watched.engine.stats.num_steps == 40
    assert not any(trace.num_skipped for trace in traces)


def test_otherwise_steps_are_left_out_and_counted_and_the_end_is_seen(watched: Watched) -> None:
    watched.tell(Watch(True))
    watched.submit(200)
    watched.wait_until_idle()
    traces = watched.box.take()
    assert num_covered(traces) == 200
    assert len(traces) < 100, "30 a second are enough"
    assert traces[-1].events[-1].what == "finish" and not traces[-1].running


def test_a_full_box_stops_no_step_and_the_next_trace_makes_up_for_it(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_box, "MOST_TRACES", 5)
    watched.tell(Watch(True, is_teaching=True))
    watched.submit(100)
    watched.wait_until_idle()  # though nobody takes a trace
    first = watched.box.take()
    watched.settle()
    rest = watched.box.take()
    assert len(first) == 5 and len(rest) == 1 and rest[0].num_skipped > 90
    assert num_covered(first + rest) == 100 and not rest[0].running
    digests: dict[int, bytes | None] = {}
    for trace in first + rest:
        digests |= trace.digests
    books = digests_of_blocks(watched.engine.block_manager)
    assert {block: digest for block, digest in digests.items() if digest} == {
        block: key[0] for block, key in enumerate(books) if key is not None
    }


class TestAPausedEngine:
    @pytest.fixture
    def paused(self, watched: Watched) -> Watched:
        watched.tell(Watch(True, is_teaching=True))
        watched.tell(Pace(is_paused=True))
        watched.submit(30)
        return watched

    def test_shows_who_arrives_and_runs_commands(self, paused: Watched) -> None:
        *_, trace = paused.box.take()
        assert trace.waiting == ["A"] and [event.what for event in trace.events] == ["arrive"]
        assert paused.engine.stats.num_steps == 0
        paused.tell(ForgetCache())

    @pytest.mark.parametrize("number", [1, 3])
    def test_does_as_many_steps_as_are_asked_for(self, paused: Watched, number: int) -> None:
        paused.tell(Pace(is_paused=True, num_steps=number))
        time.sleep(0.05)
        paused.settle()
        assert paused.engine.stats.num_steps == number

    def test_keeps_no_step_for_later_if_there_is_no_work(self, watched: Watched) -> None:
        watched.tell(Pace(is_paused=True, num_steps=1))
        watched.submit(3)
        time.sleep(0.02)
        assert watched.engine.stats.num_steps == 0

    def test_goes_on_when_it_is_told(self, paused: Watched) -> None:
        paused.tell(Pace())
        paused.wait_until_idle()
        assert paused.engine.stats.num_steps == 30

    def test_comes_to_its_end_when_it_is_closed(self, paused: Watched) -> None:
        paused.thread.close(drain=True)
        paused.thread.join()
        assert paused.engine.stats.num_steps == 30


def test_a_slow_engine_waits_between_steps_and_runs_commands_meanwhile(watched: Watched) -> None:
    watched.tell(Pace(delay_s=0.05))
    watched.submit(30)
    began: Callable[[], float] = time.monotonic
    start = began()
    while began() - start < 0.2:
        asked = began()
        watched.settle()
        assert began() - asked < 0.045, "a command waits for no delay"
    assert 2 <= watched.engine.stats.num_steps <= 6
    watched.tell(Pace())
    watched.wait_until_idle()
