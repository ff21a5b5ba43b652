"""The scheduler's promises one by one; tests/engine/test_schedules.py has them all together at random."""

from collections import deque
from typing import Any

import pytest
from simulated_engine import EOS, Checker, add_request, expected_output, make_engine, run

from nanovllm.sampling_params import SamplingParams
from nanovllm.step_plan import StepPlan

FOREVER = SamplingParams(max_tokens=None, ignore_eos=True)


def next_plan(engine: Any) -> StepPlan:
    engine.step()
    return engine.runner.launched


def test_short_prompts_run_whole_in_one_step_and_sample() -> None:
    engine = make_engine(num_blocks=20, block_size=4, max_num_seqs=8, max_num_batched_tokens=64)
    for n in (3, 1, 4):
        add_request(engine, [n] * n, FOREVER)
    plan = next_plan(engine)
    assert plan.query_lens == [3, 1, 4] and (plan.num_decodes, plan.num_samples) == (0, 3)
    plan = next_plan(engine)
    assert plan.query_lens == [1, 1, 1] and (plan.num_decodes, plan.num_samples) == (3, 3)


def test_prompt_beyond_the_budget_enters_in_chunks_beside_the_decodes() -> None:
    engine = make_engine(num_blocks=40, block_size=1, max_num_seqs=8, max_num_batched_tokens=4)
    add_request(engine, [1, 2], FOREVER)
    add_request(engine, [3] * 8, FOREVER)
    plans = [next_plan(engine) for _ in range(5)]
    assert [plan.query_lens for plan in plans] == [[2, 2], [1, 3], [1, 3], [1, 1], [1, 1]]
    assert [plan.num_samples for plan in plans] == [1, 1, 2, 2, 2]


def test_prompt_as_long_as_the_budget_is_one_chunk() -> None:
    engine = make_engine(num_blocks=40, block_size=1, max_num_seqs=8, max_num_batched_tokens=4)
    add_request(engine, [1, 2, 3, 4], FOREVER)
    plan = next_plan(engine)
    assert plan.query_lens == [4] and plan.num_samples == 1


def test_max_num_seqs_caps_what_runs_and_the_next_enters_when_one_leaves() -> None:
    engine = make_engine(num_blocks=40, block_size=4, max_num_seqs=2, max_num_batched_tokens=64)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 4, 4)]
    seqs = [add_request(engine, [i + 1], p) for i, p in enumerate(params)]
    engine.step()
    assert seqs[0].is_finished and engine.current_stats().num_waiting == 1
    assert len(next_plan(engine).rows) == 2
    run(engine)


def test_admission_leaves_a_watermark_to_those_who_run() -> None:
    engine = make_engine(num_blocks=200, block_size=1, max_num_seqs=4, max_num_batched_tokens=400)
    add_request(engine, [1] * 100, FOREVER)
    add_request(engine, [2] * 99, FOREVER)  # would fit, but leaves 1 block where 1% are 2
    assert len(next_plan(engine).rows) == 1


def test_watermark_keeps_nobody_from_running_alone() -> None:
    engine = make_engine(num_blocks=200, block_size=1, max_num_seqs=4, max_num_batched_tokens=400)
    seq = add_request(engine, [1] * 199, FOREVER)
    run(engine)
    assert (seq.finish_reason, len(seq.token_ids)) == ("length", 200)


def test_latest_arrival_is_preempted_and_ends_with_the_same_tokens() -> None:
    engine = make_engine(num_blocks=6, block_size=2, max_num_seqs=3, max_num_batched_tokens=64)
    prompts = [[1, 1], [2, 2], [3, 3]]
    seqs = [add_request(engine, prompt, FOREVER) for prompt in prompts]
    checker = Checker(engine)
    while engine.has_unfinished_requests:
        checker.step()
        running = [seq for seq in seqs if seq.row >= 0]
        assert running == [seq for seq in seqs if not seq.is_finished][: len(running)]
    assert seqs[0].num_preemptions == 0 < seqs[1].num_preemptions <= seqs[2].num_preemptions
    for seq, prompt in zip(seqs, prompts, strict=True):
        assert seq.output_token_ids == expected_output(prompt, FOREVER, 12)[0]


def test_resumed_sequence_finds_its_blocks_still_cached() -> None:
    engine = make_engine(num_blocks=8, block_size=2, max_num_seqs=2, max_num_batched_tokens=64)
    first = add_request(engine, [1, 1], SamplingParams(max_tokens=8, ignore_eos=True))
    second = add_request(engine, [2, 2, 2, 2, 2], SamplingParams(max_tokens=8, ignore_eos=True))
    run(engine)
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert engine.current_stats().prefix_hits > 0
    assert second.num_cached_tokens == 0  # the user is told of the prompt's hits, not of the resumption's


def test_requests_that_arrive_together_share_their_prefix_within_the_step() -> None:
    engine = make_engine(num_blocks=40, block_size=2, max_num_seqs=4, max_num_batched_tokens=64)
    seqs = [add_request(engine, [1, 2, 3, 4, 1, 2, i], FOREVER) for i in (1, 2, 3)]
    assert next_plan(engine).query_lens == [7, 1, 1]
    assert [seq.num_cached_tokens for seq in seqs] == [0, 6, 6]
    assert seqs[0].block_tables[0][:3] == seqs[1].block_tables[0][:3] == seqs[2].block_tables[0][:3]


def test_aborted_requests_leave_at_once_running_or_waiting() -> None:
    engine = make_engine(num_blocks=8, block_size=2, max_num_seqs=1, max_num_batched_tokens=64)
    running, waiting, last = (add_request(engine, [i] * 3, FOREVER) for i in (1, 2, 3))
    engine.step()
    engine.abort([running, waiting])
    assert running.finish_reason == waiting.finish_reason == "abort"
    assert engine.block_manager.num_free_blocks == 8
    run(engine)
    assert last.finish_reason == "length"
    engine.abort([running, last])  # again, and after the end: nothing happens
    assert last.finish_reason == "length"


def test_surplus_token_of_a_stopped_sequence_is_dropped() -> None:
    engine = make_engine(num_blocks=64, block_size=1, max_num_seqs=4, max_num_batched_tokens=64, max_behind=1)
    prompts = [[a, b] for a in range(5) for b in range(5)]
    seqs = [add_request(engine, prompt, SamplingParams(max_tokens=None)) for prompt in prompts]
    run(engine)
    assert "stop" in {seq.finish_reason for seq in seqs}
    for seq, prompt in zip(seqs, prompts, strict=True):
        assert (seq.output_token_ids, seq.finish_reason) == expected_output(prompt, SamplingParams(max_tokens=None), 64)
        assert EOS not in seq.output_token_ids[:-1]


@pytest.mark.parametrize("max_behind", [0, 1])
def test_length_is_known_beforehand_so_no_surplus_token_is_computed(max_behind: int) -> None:
    engine = make_engine(16, 4, 4, 64, max_behind=max_behind)
    for i in range(3):
        add_request(engine, [i + 1] * 3, SamplingParams(max_tokens=5, ignore_eos=True))
    run(engine)
    stats = engine.current_stats()
    assert (stats.num_prefill_tokens, stats.num_decode_tokens) == (9, 12)


def test_overlapped_loop_takes_no_more_steps_than_the_other_but_the_surplus() -> None:
    steps = []
    for max_behind in (0, 1):
        engine = make_engine(16, 4, 4, 64, max_behind=max_behind)
        for i in range(3):
            add_request(engine, [i + 1] * 3, SamplingParams(max_tokens=5, ignore_eos=True))
        run(engine)
        steps.append(engine.stats.num_steps)
    assert steps == [5, 5]


class CountingDeque(deque):
    """A queue that refuses to be walked or cut from the middle, and counts what is done at its ends."""

    operations = 0

    def __getitem__(self, index: int) -> Any:
        assert index in (0, -1), "the queue was indexed in its middle"
        self.operations += 1
        return super().__getitem__(index)

    def popleft(self) -> Any:
        self.operations += 1
        return super().popleft()

    def _refuse(self, *args: Any) -> Any:
        raise AssertionError("the queue was walked")

    __iter__ = __contains__ = remove = index = count = insert = __delitem__ = _refuse


def test_cost_of_a_step_does_not_grow_with_the_queue() -> None:
    engine = make_engine(num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=32)
    seqs = [add_request(engine, [1, 2, 3, 4, i % 5], SamplingParams(max_tokens=3)) for i in range(10_000)]
    waiting = CountingDeque(engine.scheduler.waiting)
    engine.scheduler.waiting = waiting
    for _ in range(20):
        before = waiting.operations
        engine.step()
        assert waiting.operations - before <= 3 * 4 + 1
    untouched = [seq for seq in seqs[200:] if seq.block_digests or seq.row >= 0]
    assert not untouched, "the scheduler looked at sequences whose turn is far off"
    engine.abort(seqs[300:])  # walks nothing either
    assert engine.current_stats().num_waiting < 300


def test_aborted_queue_is_skipped_at_once_when_its_turn_comes() -> None:
    engine = make_engine(num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=32)
    doomed = [add_request(engine, [1, 2], FOREVER) for _ in range(1000)]
    last = add_request(engine, [3, 4], SamplingParams(max_tokens=1))
    engine.abort(doomed)
    engine.step()
    assert last.finish_reason == "length"


def test_failed_step_aborts_every_request_and_the_engine_serves_the_next() -> None:
    for max_behind in (0, 1):
        engine = make_engine(8, 2, 4, 64, max_behind=max_behind)
        seqs = [add_request(engine, [i + 1] * 3, FOREVER) for i in range(3)]
        engine.step()
        engine.runner.fail_next = True
        with pytest.raises(RuntimeError, match="injected"):
            engine.step()
        assert all(seq.finish_reason == "abort" for seq in seqs)
        assert not engine.has_unfinished_requests and engine.current_stats().cache_usage == 0.0
        again = add_request(engine, [1, 2, 3], FOREVER)
        run(engine)
        assert again.output_token_ids == expected_output([1, 2, 3], FOREVER, 16)[0]
