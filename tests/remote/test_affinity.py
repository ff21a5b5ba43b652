"""Requests that begin alike meet in one engine, as long as it has not much more to do than another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.remote.affinity import PrefixAffinity

SIZE = 4  # tokens of a block
prompts = st.lists(st.integers(0, 2), max_size=3 * SIZE)
loads = st.lists(st.none() | st.integers(0, 60), min_size=2, max_size=4)


@given(st.lists(prompts, min_size=1, max_size=8), st.data(), st.integers(0, 30))
def test_the_choice_serves_and_has_at_most_the_margin_more_than_the_least(asked, data, margin) -> None:
    size = data.draw(st.integers(1, 4))
    affinity = PrefixAffinity(SIZE, margin=margin)
    for prompt in asked:
        now = data.draw(st.lists(st.none() | st.integers(0, 60), min_size=size, max_size=size))
        chosen = affinity.choose(prompt, now)
        serving = [load for load in now if load is not None]
        assert (chosen is None) == (not serving)
        assert chosen is None or (now[chosen] is not None and now[chosen] - min(serving) <= margin)


@given(st.lists(prompts, min_size=1, max_size=8), st.lists(st.integers(0, 2), min_size=SIZE, max_size=SIZE), prompts)
def test_a_prompt_follows_its_beginning_while_loads_are_within_the_margin(before, start, tail) -> None:
    affinity = PrefixAffinity(SIZE, margin=4)
    for prompt in before:
        affinity.choose(prompt, [0, 0, 0])
    first = affinity.choose(start, [0, 0, 0])
    assert affinity.choose(start + tail[: SIZE - 1], [4 if i == first else 0 for i in range(3)]) == first


def test_the_longest_beginning_decides() -> None:
    affinity = PrefixAffinity(SIZE)
    common = [1] * SIZE
    a, b = common + [2] * SIZE, common + [3] * SIZE
    assert affinity.choose(a, [0, None]) == 0
    assert affinity.choose(b, [None, 0]) == 1
    assert affinity.choose([*a, 5], [0, 0]) == 0 and affinity.choose([*b, 5], [0, 0]) == 1


def test_a_beginning_shorter_than_a_block_is_no_reason() -> None:
    affinity = PrefixAffinity(SIZE)
    assert {affinity.choose([1] * (SIZE - 1), [0, 0, 0]) for _ in range(3)} == {0, 1, 2}


def test_an_engine_that_comes_back_gets_what_went_elsewhere_only_if_that_one_is_busy() -> None:
    affinity, prompt = PrefixAffinity(SIZE, margin=2), [1] * SIZE
    first = affinity.choose(prompt, [0, 0])
    other = affinity.choose(prompt, [None if i == first else 0 for i in range(2)])
    assert other == 1 - first == affinity.choose(prompt, [0, 0])
    assert affinity.choose(prompt, [3 if i == other else 0 for i in range(2)]) == first


def test_it_remembers_the_latest_blocks_only() -> None:
    affinity = PrefixAffinity(SIZE, most_blocks=2)
    old = affinity.choose([0] * SIZE, [0, 9])
    for i in (1, 2):
        affinity.choose([i] * SIZE, [0, 9])
    assert old == 0 and affinity.choose([0] * SIZE, [9, 0]) == 1  # forgotten: it goes to the least loaded


@pytest.mark.parametrize("loads", [[], [None], [None, None]])
def test_no_engine_is_chosen_if_none_serves(loads: list[None]) -> None:
    assert PrefixAffinity(SIZE).choose([1] * SIZE, loads) is None
