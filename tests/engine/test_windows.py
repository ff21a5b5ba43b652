"""A cache whose layers have windows: which blocks a sequence holds, gives back, finds again, and needs at most."""

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_engine import Checker, add_request, expected_output, make_engine

from nanovllm.cache_groups import Windows, group_layers, longest_hit, most_blocks, most_blocks_in_all
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

FOREVER = SamplingParams(max_tokens=None, ignore_eos=True)
deterministic = settings(derandomize=True, deadline=None, database=None)


def sequence(token_ids: list[int]) -> Sequence:
    return Sequence("0", list(token_ids), FOREVER, 1 << 30, frozenset(), {}, 0)


def compute(manager: BlockManager, seq: Sequence, num_tokens: int) -> bool:
    """Take blocks for the next tokens and compute them. False if too few blocks are free."""
    if manager.grow(seq, num_tokens) is None:
        return False
    seq.num_computed_tokens += num_tokens
    manager.publish(seq)
    return True


def admit(manager: BlockManager, token_ids: list[int], chunk: int = 1 << 30) -> Sequence:
    """A sequence whose prompt has been computed in chunks."""
    seq = sequence(token_ids)
    manager.admit(seq, manager.find_prefix(seq))
    while num_left := len(token_ids) - seq.num_computed_tokens:
        assert compute(manager, seq, min(chunk, num_left))
    return seq


def held(seq: Sequence, group: int) -> list[int]:
    """The logical blocks that a sequence holds in a group."""
    return [i for i, block in enumerate(seq.block_tables[group]) if block >= 0]


def seen(queries: range, window: int | None, block_size: int) -> list[int]:
    """The logical blocks in which a query sees a token, one pair at a time."""
    first = {q: 0 if window is None else max(0, q - window + 1) for q in queries}
    return sorted({p // block_size for q in queries for p in range(first[q], q + 1)})


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([None] * 4, [(None, [0, 1, 2, 3])]),
        ([4096] * 3, [(4096, [0, 1, 2])]),
        ([128, None, 128, None], [(None, [1, 3]), (128, [0, 2])]),
        ([8, 8, 8, 8, 8, None, 8, 8], [(None, [5])] + [(8, [i]) for i in (0, 1, 2, 3, 4, 6, 7)]),
        ([8, 8, None] * 2 + [8], [(None, [2, 5]), (8, [0, 1]), (8, [3, 4]), (8, [6])]),
        ([9, 8, 9, 8], [(8, [1, 3]), (9, [0, 2])]),
    ],
    ids=["all see all", "one window", "every second", "one in six", "a group with room to spare", "two windows"],
)
def test_layers_with_equal_windows_share_block_tables_and_all_groups_have_equal_blocks(
    windows: list[int | None], expected: list[tuple[int | None, list[int]]]
) -> None:
    groups = group_layers(windows)
    assert list(zip(groups.windows, groups.layers, strict=True)) == expected
    assert groups.num_layers == max(map(len, groups.layers))


WINDOWS = st.lists(st.one_of(st.none(), st.integers(1, 30)), min_size=1, max_size=4).map(tuple)


@deterministic
@given(WINDOWS, st.integers(1, 8), st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_a_sequence_holds_what_it_sees_and_nothing_else(windows: Windows, block_size: int, chunks: list[int]) -> None:
    """Decodes as well as chunks; in a group without window the whole prompt from the start."""
    manager = BlockManager(1000, block_size, windows=windows)
    seq = sequence(list(range(sum(chunks))))
    manager.admit(seq, manager.find_prefix(seq))
    for num_tokens in [*chunks, *[1] * 20]:
        start = seq.num_computed_tokens
        assert compute(manager, seq, num_tokens)
        queries = range(start, seq.num_computed_tokens)
        for group, window in enumerate(windows):
            needed = seen(queries, window, block_size)
            if window is None:
                needed = list(range(max(len(needed), manager.num_blocks_for(sum(chunks)))))
            assert held(seq, group) == needed
            assert len(held(seq, group)) <= most_blocks(sum(chunks) + 20, window, max(chunks), block_size)
        assert manager.num_blocks - manager.num_free_blocks == sum(len(held(seq, g)) for g in range(len(windows)))
    manager.release(seq)
    assert manager.num_free_blocks == manager.num_blocks


@deterministic
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 9))
def test_the_most_blocks_of_a_windowed_group_are_no_more_than_some_chunk_needs(
    window: int, chunk: int, block_size: int
) -> None:
    worst = max(len(seen(range(start, start + chunk), window, block_size)) for start in range(100, 100 + block_size))
    assert most_blocks(10_000, window, chunk, block_size) == worst


@deterministic
@given(WINDOWS, st.integers(1, 6), st.lists(st.integers(0, 15), max_size=14), st.integers(0, 3))
def test_the_longest_hit_is_the_longest_that_has_all_that_is_seen_after_it(
    windows: Windows, block_size: int, cached_in: list[int], num_rare: int
) -> None:
    """`cached_in`: for each block the groups that have it, as bits."""
    cached_in = [15 if i % (num_rare + 1) else bits for i, bits in enumerate(cached_in)]
    digests = [bytes([i]) for i in range(len(cached_in))]
    block_with = [
        {digest: i for i, digest in enumerate(digests) if cached_in[i] >> group & 1} for group in range(len(windows))
    ]

    def is_hit(k: int) -> bool:
        reach = [range(k) if w is None else range(max(0, k * block_size - w + 1) // block_size, k) for w in windows]
        return all(digests[i] in block_with[group] for group, blocks in enumerate(reach) for i in blocks)

    assert longest_hit(windows, block_size, digests, block_with) == max(filter(is_hit, range(len(digests) + 1)))


def test_a_prefix_hit_needs_only_the_last_blocks_of_a_windowed_group() -> None:
    manager = BlockManager(num_blocks=40, block_size=2, windows=(None, 3))
    manager.release(admit(manager, list(range(20)), chunk=4))
    seq = sequence([*range(16), 99])
    full, windowed = manager.find_prefix(seq)
    assert len(full) == len(windowed) == 8 and -1 not in full
    assert windowed[:7] == [-1] * 7 and windowed[7] >= 0  # positions 14 and 15 are all that position 16 sees
    assert manager.num_free_blocks_needed(seq, [full, windowed], 4) == 9 + 2
    manager.admit(seq, [full, windowed])
    assert seq.num_computed_tokens == 16 and manager.stats.prefix_hits == 16
    assert manager.grow(seq, 1) == [(1, 8, seq.block_tables[1][8])]


def test_a_hit_ends_where_a_window_lacks_a_block_that_others_have_taken() -> None:
    manager = BlockManager(num_blocks=16, block_size=1, windows=(None, 2))
    manager.release(admit(manager, [1, 2, 3, 4, 5], chunk=1))  # 5 blocks and 5, of which windows gave 3 back early
    admit(manager, [9] * 3, chunk=1)  # takes the 6 blocks that nobody has used
    assert manager.stats.evictions == 0 and len(manager.find_prefix(sequence([1, 2, 3, 4, 5, 6]))[0]) == 5
    admit(manager, [8], chunk=1)  # takes two that the window gave back first
    assert manager.stats.evictions == 2
    assert [len(manager.find_prefix(sequence([1, 2, 3, 4, 5, 6][:n]))[0]) for n in (6, 5, 4, 3, 2)] == [5, 4, 3, 0, 0]


def test_groups_of_one_window_hold_and_give_back_the_same_logical_blocks() -> None:
    manager = BlockManager(num_blocks=100, block_size=3, windows=(None, 5, 5))
    seq = admit(manager, list(range(30)), chunk=7)
    for _ in range(20):
        assert held(seq, 1) == held(seq, 2) and not set(seq.block_tables[1][-2:]) & set(seq.block_tables[2])
        assert compute(manager, seq, 1)


def test_a_chunk_without_blocks_takes_its_own_prompt_out_of_the_batch_and_no_decode_of_the_step() -> None:
    engine = make_engine(30, 1, 4, 6, max_model_len=16, windows=(4, 4))
    first = add_request(engine, [1], FOREVER)
    checker = Checker(engine)
    checker.step()
    second = add_request(engine, [2] * 15, FOREVER)
    manager = engine.block_manager
    checker.step()
    assert second.row >= 0 and 0 < second.num_computed_tokens < 15  # under way
    others = admit(manager, list(range(50, 50 + manager.num_free_blocks // 2)))  # somebody takes what is free
    computed = first.num_computed_tokens
    engine.step()
    assert (first.num_preemptions, second.num_preemptions) == (0, 1) and first.num_computed_tokens == computed + 1
    manager.release(others)
    while engine.has_unfinished_requests:
        checker.step()
    for seq, prompt in ((first, [1]), (second, [2] * 15)):
        assert seq.output_token_ids == expected_output(prompt, FOREVER, engine.max_model_len)[0]


@deterministic
@given(WINDOWS, st.integers(1, 4), st.integers(1, 9), st.integers(2, 30), st.integers(0, 1))
def test_a_cache_that_just_holds_the_longest_sequence_serves_any_number(
    windows: Windows, block_size: int, budget: int, longest: int, max_behind: int
) -> None:
    num_blocks = most_blocks_in_all(longest, windows, budget, block_size)
    engine = make_engine(num_blocks, block_size, 3, budget, longest, max_behind=max_behind, windows=windows)
    assert engine.max_model_len == longest
    seqs = [add_request(engine, [i % 5] * n, FOREVER) for i, n in enumerate((longest - 1, 1, (longest + 1) // 2))]
    checker = Checker(engine)
    for _ in range(1000):
        if not engine.has_unfinished_requests:
            break
        checker.step()
    assert all(len(seq.token_ids) == longest for seq in seqs)


@pytest.mark.parametrize("window", [512, 1024])
def test_gemma_3_at_32k_tokens_holds_three_times_the_sequences_that_full_tables_hold(window: int) -> None:
    """26 layers, every sixth of which sees all. Both sides get the same bytes and chunks of 2,048 tokens."""
    block_size, length, chunk = 256, 32_000, 2048
    groups = group_layers([None if i % 6 == 5 else window for i in range(26)])
    num_layer_blocks = 26 * 8 * length // block_size  # eight sequences in full tables

    def sequences_held(windows: Windows, layers_of_a_block: int) -> int:
        manager = BlockManager(num_layer_blocks // layers_of_a_block, block_size, windows=windows)
        for number in count():
            seq = sequence([number] * (length - 768))
            prefix = manager.find_prefix(seq)
            if manager.num_free_blocks_needed(seq, prefix, chunk) > manager.num_free_blocks:
                return number
            manager.admit(seq, prefix)
            chunks = [chunk] * (len(seq.token_ids) // chunk) + [len(seq.token_ids) % chunk] + [1] * 768
            if not all(compute(manager, seq, num_tokens) for num_tokens in chunks):
                return number
        raise AssertionError("not reached")

    full, by_groups = sequences_held((None,), 26), sequences_held(groups.windows, groups.num_layers)
    print(f"window {window}: {full} sequences in full tables, {by_groups} in groups")
    assert full == 8 and by_groups >= 3 * full
