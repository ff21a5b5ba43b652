"""Requests that begin alike meet in one engine, as long as it has not much more to do than another."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.server.affinity import CHARS, beginning, choose

beginnings = st.binary(min_size=1, max_size=40)
fields = st.sampled_from(["system", "instructions", "prompt", "messages", "input", "role", "content"])
json_values = st.recursive(
    st.none() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields, inner, max_size=3),
    max_leaves=8,
)
loads = st.lists(st.none() | st.integers(0, 60), min_size=1, max_size=8)


@given(beginnings, loads, st.integers(0, 30))
def test_the_choice_serves_and_has_at_most_the_margin_more_than_the_least(
    start: bytes, loads: list[int | None], margin: int
) -> None:
    chosen = choose(start, loads, margin)
    serving = [load for load in loads if load is not None]
    if not serving:
        assert chosen is None
    else:
        assert chosen is not None and loads[chosen] is not None and loads[chosen] - min(serving) <= margin


@given(beginnings, st.integers(1, 8), st.data())
def test_loads_within_the_margin_do_not_part_requests_that_begin_alike(start: bytes, size: int, data: Any) -> None:
    within = data.draw(st.lists(st.integers(5, 9), min_size=size, max_size=size))
    assert choose(start, within, margin=4) == choose(start, [0] * size, margin=4)


@given(beginnings, st.integers(2, 8), st.data())
def test_an_engine_that_ends_takes_along_only_its_own_requests(start: bytes, size: int, data: Any) -> None:
    before = choose(start, [0] * size)
    lost = data.draw(st.integers(0, size - 1))
    after = choose(start, [None if i == lost else 0 for i in range(size)])
    assert after != lost and (after == before or before == lost)


@given(loads)
def test_a_request_without_a_beginning_goes_to_the_least_loaded(loads: list[int | None]) -> None:
    chosen = choose(b"", loads)
    serving = [load for load in loads if load is not None]
    assert (chosen is None) == (not serving) and (chosen is None or loads[chosen] == min(serving))


def test_each_engine_wins_its_share_of_distinct_beginnings() -> None:
    wins = [0] * 4
    for i in range(2000):
        wins[choose(b"prompt %d" % i, [0] * 4)] += 1
    assert min(wins) > 400, wins


def chat(*contents: str, system: str = "Be kind.") -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    said = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"model": "m", "messages": [{"role": "system", "content": system}, *said]}


class TestBeginning:
    def test_all_turns_of_a_conversation_have_one(self) -> None:
        assert beginning(chat("a")) == beginning(chat("a", "b", "c")) != beginning(chat("b"))

    def test_conversations_under_long_instructions_differ(self) -> None:
        long = "x" * 5 * CHARS
        assert beginning(chat("a", system=long)) != beginning(chat("b", system=long))

    @pytest.mark.parametrize("field", ["prompt", "input"])
    @pytest.mark.parametrize("common", ["x" * CHARS, list(range(CHARS)), [{"role": "user", "content": "x" * CHARS}]])
    def test_what_comes_after_a_long_beginning_does_not_part_requests(self, field: str, common: Any) -> None:
        bodies = [{field: common + common[:n]} for n in (0, 1)]
        assert beginning(bodies[0]) == beginning(bodies[1]) != b""

    def test_of_several_prompts_the_first_decides(self) -> None:
        assert beginning({"prompt": ["a", "b"]}) == beginning({"prompt": "a"}) != beginning({"prompt": ["b", "a"]})
        assert beginning({"prompt": [[1, 2], [3]]}) == beginning({"prompt": [1, 2]})

    def test_each_apis_instructions_are_of_it(self) -> None:
        for name in ("system", "instructions"):
            assert beginning({name: "a", "input": "x"}) != beginning({name: "b", "input": "x"})

    @given(json_values)
    @settings(max_examples=30)
    def test_any_json_has_one(self, body: Any) -> None:
        assert len(beginning(body)) < 1 << 20
