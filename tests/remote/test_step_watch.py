"""A step that does not end is noticed; an engine without work, paused, or on a CPU is let be."""

from types import SimpleNamespace

import pytest

from nanovllm.engine.pacing import Pacing
from nanovllm.remote.step_watch import LONGEST_STEP_S, StepWatch


def watched(device: str = "cuda") -> tuple[SimpleNamespace, Pacing, StepWatch]:
    """An engine with work, its pacing, and what watches it, with a look each hundred seconds."""
    engine = SimpleNamespace(
        runner=SimpleNamespace(device=device), stats=SimpleNamespace(num_steps=0), has_unfinished_requests=True
    )
    pacing = Pacing()
    return engine, pacing, StepWatch(engine, pacing, look_s=100.0)


def test_work_without_a_step_is_a_stall_after_the_longest_step() -> None:
    _, _, watch = watched()
    assert [watch.is_stalled() for _ in range(4)] == [False, False, False, True]


def test_a_step_ends_the_count() -> None:
    engine, _, watch = watched()
    for engine.stats.num_steps in range(1, 20):
        assert not watch.is_stalled()
    assert [watch.is_stalled() for _ in range(4)] == [False, False, False, True]


@pytest.mark.parametrize("why", ["idle", "paused", "cpu"])
def test_an_engine_that_need_not_step_is_not_stalled(why: str) -> None:
    engine, pacing, watch = watched("cpu" if why == "cpu" else "cuda")
    engine.has_unfinished_requests = why != "idle"
    pacing.is_paused = why == "paused"
    assert not any(watch.is_stalled() for _ in range(50))


def test_every_device_has_its_longest_step() -> None:
    assert set(LONGEST_STEP_S) == {"cuda", "cpu"}
