"""The block manager's promises one by one; tests/engine/test_schedules.py has them all together at random."""

from collections import OrderedDict
from typing import Any

import pytest
from inside import digests_of_blocks, free_blocks, replace_free_list

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams


def sequence(token_ids: list[int]) -> Sequence:
    return Sequence("0", list(token_ids), SamplingParams(), 10_000, frozenset(), {}, 0)


def table_of(seq: Sequence) -> list[int]:
    """The one block table of a sequence whose layers are one group."""
    (table,) = seq.block_tables
    return table


def num_found(manager: BlockManager, seq: Sequence) -> int:
    """How many blocks of its prefix the cache has."""
    return len(manager.find_prefix(seq)[0])


def admit(manager: BlockManager, token_ids: list[int]) -> Sequence:
    """A sequence whose prompt has been computed and published."""
    seq = sequence(token_ids)
    manager.admit(seq, manager.find_prefix(seq))
    assert manager.grow(seq, len(token_ids) - seq.num_computed_tokens) is not None
    seq.num_computed_tokens = len(token_ids)
    manager.publish(seq)
    return seq


def test_sequence_gets_as_many_blocks_as_its_tokens_need() -> None:
    manager = BlockManager(num_blocks=10, block_size=4)
    for num_tokens, num_blocks in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
        seq = admit(manager, [num_tokens] * num_tokens)
        assert len(table_of(seq)) == num_blocks == manager.num_blocks_for(num_tokens)
        manager.release(seq)
    assert manager.num_free_blocks == 10 and manager.usage == 0.0


def test_equal_prefixes_share_blocks_and_different_ones_do_not() -> None:
    manager = BlockManager(num_blocks=10, block_size=2)
    first = admit(manager, [1, 2, 3, 4, 5])
    second = admit(manager, [1, 2, 3, 4, 6])
    other = admit(manager, [9, 2, 3, 4, 5])  # only the first token differs, and it counts for every later block
    assert table_of(first)[:2] == table_of(second)[:2]
    assert table_of(first)[2] != table_of(second)[2]
    assert not set(table_of(other)) & set(table_of(first))
    assert manager.num_free_blocks == 10 - 3 - 1 - 3


def test_shared_block_is_freed_with_its_last_owner() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    first = admit(manager, [1, 2, 3])
    second = admit(manager, [1, 2, 4])
    shared = table_of(first)[0]
    manager.release(first)
    assert manager.num_free_blocks == 2 and table_of(second)[0] == shared
    manager.release(second)
    assert manager.num_free_blocks == 4


def test_whole_prompt_in_the_cache_leaves_the_last_token_to_compute() -> None:
    manager = BlockManager(num_blocks=8, block_size=2)
    manager.release(admit(manager, [1, 2, 3, 4]))
    again = sequence([1, 2, 3, 4])
    manager.admit(again, manager.find_prefix(again))
    assert again.num_computed_tokens == 2


def test_finding_a_prefix_takes_nothing() -> None:
    manager = BlockManager(num_blocks=4, block_size=1)
    manager.release(admit(manager, [1, 2, 3]))
    order = free_blocks(manager)
    (prefix,) = manager.find_prefix(sequence([1, 2, 3, 4]))
    assert len(prefix) == 3 and free_blocks(manager) == order


def test_freed_blocks_are_revived_by_the_same_prefix() -> None:
    manager = BlockManager(num_blocks=6, block_size=2)
    first = admit(manager, [1, 2, 3, 4, 5])
    blocks = table_of(first)
    manager.release(first)
    again = admit(manager, [1, 2, 3, 4, 9])
    assert table_of(again)[:2] == blocks[:2]
    assert (manager.stats.prefix_queries, manager.stats.prefix_hits, manager.stats.evictions) == (10, 4, 0)


def test_admission_counts_the_blocks_that_it_revives() -> None:
    manager = BlockManager(num_blocks=3, block_size=1)
    manager.release(admit(manager, [1, 2]))
    seq = sequence([1, 2, 3])
    assert manager.num_free_blocks_needed(seq, manager.find_prefix(seq), 64) == 3


def test_blocks_without_content_are_taken_before_cached_ones_are_evicted() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    cached = admit(manager, [1, 2, 3, 4])
    manager.release(cached)
    partial = admit(manager, [7])
    manager.release(partial)
    admit(manager, [8]), admit(manager, [9])
    assert manager.stats.evictions == 0
    assert num_found(manager, sequence([1, 2, 3, 4, 5])) == 2


def test_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    manager = BlockManager(num_blocks=5, block_size=1)
    manager.release(admit(manager, [1, 2]))
    manager.release(admit(manager, [3, 4]))
    manager.release(admit(manager, [1, 2, 9]))  # used again: now the later one
    admit(manager, [5])
    assert num_found(manager, sequence([3, 4, 0])) == 1
    admit(manager, [6])
    assert num_found(manager, sequence([3, 4, 0])) == 0
    assert num_found(manager, sequence([1, 2, 0])) == 2
    assert manager.stats.evictions == 2


def test_evicted_block_is_found_no_more() -> None:
    manager = BlockManager(num_blocks=2, block_size=1)
    manager.release(admit(manager, [1, 2]))
    manager.release(admit(manager, [3, 4]))
    assert num_found(manager, sequence([1, 2, 0])) == 0
    assert manager.stats.evictions == 2


def test_blocks_are_shared_as_soon_as_they_are_scheduled() -> None:
    manager = BlockManager(num_blocks=8, block_size=2)
    first = sequence([1, 2, 3, 4, 5])
    manager.admit(first, [[]])
    assert num_found(manager, sequence([1, 2, 3, 4, 5])) == 0  # nothing of it is scheduled
    first.num_computed_tokens = 3
    manager.publish(first)
    assert manager.find_prefix(sequence([1, 2, 3, 4, 5])) == [table_of(first)[:1]]


def test_blocks_with_tokens_still_on_the_device_are_not_published() -> None:
    manager = BlockManager(num_blocks=8, block_size=2)
    seq = admit(manager, [1, 2, 3])
    seq.num_in_flight = 1
    seq.num_computed_tokens = 4  # the fourth token is scheduled, its id unknown
    manager.publish(seq)
    assert num_found(manager, sequence([1, 2, 3, 4, 5])) == 1
    seq.append_token(4)
    manager.publish(seq)
    assert num_found(manager, sequence([1, 2, 3, 4, 5])) == 2


def test_blocks_filled_by_generation_are_shared_too() -> None:
    manager = BlockManager(num_blocks=8, block_size=2)
    seq = admit(manager, [1])
    for token_id in (2, 3, 4):
        seq.num_in_flight = 1
        seq.append_token(token_id)
        assert manager.grow(seq) is not None
        seq.num_computed_tokens += 1
    manager.publish(seq)
    manager.release(seq)
    assert num_found(manager, sequence([1, 2, 3, 4, 5])) == 2


def test_growing_takes_a_block_only_when_the_last_is_full_and_says_when_there_is_none() -> None:
    manager = BlockManager(num_blocks=2, block_size=2)
    seq = admit(manager, [1])
    assert manager.grow(seq) is not None and len(table_of(seq)) == 1
    seq.num_computed_tokens = 2
    assert manager.grow(seq) is not None and len(table_of(seq)) == 2
    seq.num_computed_tokens = 4
    assert manager.grow(seq) is None
    assert len(table_of(seq)) == 2 and manager.num_free_blocks == 0 and manager.usage == 1.0


def test_without_prefix_caching_nothing_is_shared_or_counted() -> None:
    manager = BlockManager(num_blocks=8, block_size=2, enable_prefix_caching=False)
    first = admit(manager, [1, 2, 3])
    second = admit(manager, [1, 2, 3])
    assert not set(table_of(first)) & set(table_of(second))
    assert (manager.stats.prefix_queries, manager.stats.prefix_hits) == (0, 0)


def test_forgotten_content_is_not_found_and_owners_keep_their_blocks() -> None:
    manager = BlockManager(num_blocks=8, block_size=2)
    manager.release(admit(manager, [7, 8, 9]))
    seq = admit(manager, [1, 2, 3])
    blocks = list(table_of(seq))
    manager.forget_content()
    assert table_of(seq) == blocks and manager.num_free_blocks == 6
    assert num_found(manager, sequence([1, 2, 3])) == 0 and num_found(manager, sequence([7, 8, 9])) == 0
    manager.release(seq)
    assert manager.num_free_blocks == 8


def test_digest_commits_to_all_tokens_before_and_to_where_they_are_cut() -> None:
    manager = BlockManager(num_blocks=64, block_size=2)
    prompts = [[1, 2, 3, 4], [2, 1, 3, 4], [1, 2, 4, 3], [3, 4, 1, 2], [1, 2, 1, 2], [256, 0, 3, 4], [1, 512, 3, 4]]
    for prompt in prompts:
        admit(manager, prompt)
    digests = {key[0] for key in digests_of_blocks(manager) if key is not None}
    assert all(len(digest) == 16 for digest in digests)
    # Every prefix of whole blocks is another one, and [1, 2] begins three of the prompts.
    assert len(digests) == len({tuple(p[:n]) for p in prompts for n in (2, 4)})


class CountingFree(OrderedDict):
    """A free list that refuses to be walked, and counts what is done to it."""

    operations = 0

    def __iter__(self) -> Any:
        raise AssertionError("the free list was walked")

    keys = values = items = __iter__

    def __delitem__(self, key: int) -> None:
        self.operations += 1
        super().__delitem__(key)

    def __setitem__(self, key: int, value: None) -> None:
        self.operations += 1
        super().__setitem__(key, value)


def test_reviving_a_block_from_the_middle_of_a_long_free_list_does_not_walk_it() -> None:
    manager = BlockManager(num_blocks=100_000, block_size=1)
    seq = admit(manager, [1, 2, 3])
    filler = admit(manager, list(range(10, 60_000)))
    manager.release(seq)
    manager.release(filler)
    free = CountingFree()
    for block in free_blocks(manager):
        OrderedDict.__setitem__(free, block, None)
    replace_free_list(manager, free)
    again = sequence([1, 2, 3, 4])
    manager.admit(again, manager.find_prefix(again))
    assert len(table_of(again)) == 4
    manager.release(again)
    assert free.operations <= 12


@pytest.mark.parametrize("block_size", [1, 16, 48])
def test_a_revived_prefix_is_never_taken_as_a_fresh_block_of_the_same_sequence(block_size: int) -> None:
    manager = BlockManager(num_blocks=3, block_size=block_size)
    prompt = [i for i in range(2) for _ in range(block_size)]
    manager.release(admit(manager, prompt))
    seq = admit(manager, prompt + [5])
    assert sorted(table_of(seq)) == [0, 1, 2]
