"""A viewer that falls behind costs no more than its queue, and finds the whole state when it comes back."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.engine.stats import StepStats
from nanovllm.engine.step_trace import Arrival, EngineShape, StepTrace
from nanovllm.errors import EngineDeadError
from nanovllm.server import feed as feed_module
from nanovllm.server.feed import Feed

SHAPE = EngineShape("cpu", 8, 16, (None,), 4, 64, 128, 1, 64, 2, 4, 2)


class Engine:
    """Stands in for `RemoteEngine`: the test makes its traces."""

    def __init__(self) -> None:
        self.facts, self.watcher, self.num_restarts = SimpleNamespace(shape=SHAPE), None, 0

    def watch(self, watcher: Any, is_teaching: bool = False) -> None:
        self.watcher = watcher


def traced(number: int) -> StepTrace:
    """Step `number`: its sequence has one block, and gives the one before back."""
    arrivals = [Arrival("A", 4, "text", 100)] if number == 1 else []
    batch = [("A", "decode", number, 1)]
    tables, digests = [("A", 0, number - 1, number - 1, [number % 8])], {number % 8: b"0123", (number - 1) % 8: None}
    return StepTrace(
        number, 0, 0.0, 0.1, batch, ["A"], [], tables, digests, number == 1, [], arrivals, {"A": ["x"]}, StepStats()
    )


async def read(events: Any) -> list[dict[str, Any]]:
    text = (await asyncio.wait_for(anext(events), 5)).decode()
    return [json.loads(line[6:]) for line in text.splitlines() if line]


def test_a_slow_viewer_gets_a_gap_and_the_whole_state_while_others_miss_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed_module, "MOST_STEPS", 4)

    async def watch() -> None:
        engine = Engine()
        feed = Feed(engine, "m", False, 1)
        slow, quick = feed.join(), feed.join()
        of_slow, of_quick = feed.events(slow), feed.events(quick)
        for events in (of_slow, of_quick):
            assert (await read(events))[0]["kind"] == "head"
        engine.watcher(traced(1))
        for events in (of_slow, of_quick):
            assert [thing["kind"] for thing in await read(events)] == ["request", "step"]
        for number in range(2, 21):
            engine.watcher(traced(number))
            assert len(slow.steps) <= 4
            assert [thing["n"] for thing in await read(of_quick)] == [number]
        gap, request, step = await read(of_slow)
        assert gap == {"kind": "gap", "steps": 18} and request["request"] == "A"
        assert step["n"] == 20 and step["full"] and step["tables"] == [["A", 0, 0, 0, [-1] * 19 + [4]]]
        assert step["digests"] == [[4], [b"0123".hex()]]
        engine.watcher(traced(21))
        assert [thing["n"] for thing in await read(of_slow)] == [21]

    asyncio.run(watch())


def test_traces_are_asked_for_while_somebody_looks() -> None:
    async def watch() -> None:
        engine = Engine()
        feed = Feed(engine, "m", True, 1)
        assert engine.watcher is None
        one, two = feed.join(), feed.join()
        feed.leave(one)
        feed.leave(one)
        assert engine.watcher is not None and feed.num_viewers == 1
        feed.leave(two)
        assert engine.watcher is None
        feed.join()
        late = engine.watcher
        late(traced(7))  # it was on its way when the last viewer left
        viewer = feed.join()
        events = feed.events(viewer)
        await read(events)
        late(traced(1))
        assert (await read(events))[-1]["n"] == 1
        feed.end()
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    asyncio.run(watch())


def test_nobody_joins_while_the_engine_does_not_serve() -> None:
    engine = Engine()
    engine.facts = None
    with pytest.raises(EngineDeadError):
        Feed(engine, "m", False, 1).join()  # type: ignore[arg-type]
