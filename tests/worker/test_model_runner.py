"""What a device's rows and cache must not let through from one request to another."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inside import fetched_tokens, wrap_sending

from nanovllm import SamplingParams
from nanovllm.step_plan import StepPlan
from nanovllm.worker.cuda_graph import MAX_CHUNKS, StepShape, StepShapes
from nanovllm.worker.input_batch import InputBatch


@pytest.mark.parametrize(
    "options", [{}, {"num_kvcache_blocks": 14}, {"max_num_batched_tokens": 33}, {"with_graphs": True}]
)
def test_nan_left_in_the_cache_by_others_is_never_seen(
    checkpoint: Callable[..., Path], make_llm: Callable[..., Any], options: dict[str, Any]
) -> None:
    """A request whose numbers overflowed leaves NaN in its blocks; whoever gets them next answers as ever."""
    rng = random.Random(0)
    prompts = [[rng.randrange(211) for _ in range(n)] for n in (1, 15, 16, 17, 40, 70)]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    llm = make_llm(checkpoint("plain"), **options)
    clean = [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]
    llm.reset_prefix_cache()
    with torch.inference_mode():
        llm.engine.runner.kv_cache.fill_(float("nan"))
    assert [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)] == clean


def test_a_batch_whose_sending_was_interrupted_is_sent_again(
    checkpoint: Callable[..., Path], make_llm: Callable[..., Any]
) -> None:
    """The device has the decode's batch; the next request begins with the prompt's, the last that the host knows of."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    llm = make_llm(checkpoint("plain"))
    clean = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]["token_ids"]
    llm.reset_prefix_cache()
    calls = []

    def interrupted(send: Callable[..., None], *args: Any) -> None:
        send(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    wrap_sending(llm.engine.runner.batch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]["token_ids"] == clean


def test_padding_lies_behind_the_decodes_and_behind_the_chunks() -> None:
    batch = InputBatch(num_rows=9, max_model_len=50, max_blocks=4, device="cpu", num_slots=2)
    assert batch.live_rows.tolist() == [-1] * (9 + MAX_CHUNKS) and not batch.query_start.any()
    plan = StepPlan(rows=[4, 2, 7, 0, 8], query_lens=[1, 1, 1, 30, 5], num_decodes=3, num_samples=5)

    def entries(shape: StepShape) -> tuple[list[int], list[int]]:
        batch.apply(plan, 0, shape)
        return batch.live_rows[: shape.num_seqs].tolist(), batch.query_start[: shape.num_seqs + 1].diff().tolist()

    assert entries(StepShape(3, 2, 35)) == (plan.rows, plan.query_lens)
    assert entries(StepShape(3, 4, 35)) == ([*plan.rows, -1, -1], [*plan.query_lens, 0, 0])
    assert entries(StepShape(5, 4, 64)) == ([4, 2, 7, -1, -1, 0, 8, -1, -1], [1, 1, 1, 1, 1, 30, 5, 0, 29])
    plan = StepPlan(rows=[4, 2], query_lens=[1, 1], num_decodes=2, num_samples=2)
    assert entries(StepShape(4)) == ([4, 2, -1, -1], [1, 1, 1, 1])


def test_tokens_of_padding_are_left_out(checkpoint: Callable[..., Path], make_llm: Callable[..., Any]) -> None:
    runner = make_llm(checkpoint("plain")).engine.runner
    with torch.inference_mode():
        runner.sampled.copy_(torch.arange(len(runner.sampled)))
    for num_decodes, num_samples, shape, expected in [
        (3, 3, StepShape(4), [0, 1, 2]),
        (3, 5, StepShape(3, 2, 9), [0, 1, 2, 3, 4]),
        (3, 5, StepShape(6, 4, 9), [0, 1, 2, 6, 7]),
        (0, 2, StepShape(6, 4, 9), [6, 7]),
        (2, 2, StepShape(2, 1, 9), [0, 1]),  # the prompt is cut short
    ]:
        plan = StepPlan(num_decodes=num_decodes, num_samples=num_samples)
        assert fetched_tokens(runner, plan, shape) == expected


def test_a_step_gets_the_next_shape_that_holds_it() -> None:
    shapes = StepShapes.for_graphs(num_rows=100, max_num_batched_tokens=1024)
    assert shapes.mixed_decodes == [16, 64, 100] and shapes.chunk_tokens == [256, 512, 768, 1024]
    assert len(set(shapes.with_chunks())) == 12

    def pad(decodes: int, chunks: list[int], num_samples: int | None = None, has_extras: bool = False) -> Any:
        rows = list(range(decodes + len(chunks)))
        plan = StepPlan(rows=rows, query_lens=[1] * decodes + chunks, num_decodes=decodes)
        plan.num_samples = len(rows) if num_samples is None else num_samples
        return shapes.pad(plan, has_extras)

    assert pad(17, []) == pad(17, [], has_extras=True) == StepShape(32)
    assert pad(0, [256]) == StepShape(16, MAX_CHUNKS, 256)
    assert pad(17, [200, 57]) == StepShape(64, MAX_CHUNKS, 512)
    assert pad(99, [1024]) == StepShape(100, MAX_CHUNKS, 1024)
    assert pad(3, [1025]) is None
    assert pad(3, [9] * MAX_CHUNKS) is None  # no entry would be left for padding
    assert pad(3, [100], num_samples=3) is None


def test_a_step_that_must_not_be_padded_has_no_graph_even_if_it_has_the_shape_of_one() -> None:
    shapes = StepShapes.for_graphs(num_rows=100, max_num_batched_tokens=1024)
    plan = StepPlan(rows=list(range(32)), query_lens=[1] * 16 + [64] * 16, num_decodes=16, num_samples=32)
    assert StepShape.of(plan) in shapes.with_chunks()
    assert shapes.pad(plan) is None and shapes.pad(plan, has_extras=True) is None


@given(data=st.data(), num_rows=st.integers(1, 1100), budget=st.sampled_from([64, 256, 1000, 16384]))
def test_any_plan_fits_its_shape(data: st.DataObject, num_rows: int, budget: int) -> None:
    """All its entries have a place, and tokens of padding an entry to belong to."""
    shapes = StepShapes.for_graphs(num_rows, budget)
    num_decodes = data.draw(st.integers(0, num_rows))
    chunks = data.draw(st.lists(st.integers(1, 900), min_size=not num_decodes, max_size=20))
    num_seqs = num_decodes + len(chunks)
    plan = StepPlan(rows=list(range(num_seqs)), query_lens=[1] * num_decodes + chunks, num_decodes=num_decodes)
    plan.num_samples = num_seqs - data.draw(st.integers(0, bool(chunks)))
    padded = shapes.pad(plan, has_extras=data.draw(st.booleans()))
    shape = padded or StepShape.of(plan)
    assert shape.num_decodes >= num_decodes and shape.num_chunks >= len(chunks)
    surplus = shape.num_chunk_tokens - sum(chunks)
    assert surplus >= 0 and (surplus == 0 or shape.num_chunks > len(chunks))
    assert padded is None or (padded in shapes.all() and plan.num_samples == num_seqs)
