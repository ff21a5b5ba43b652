"""Ctrl-C before any statement, and again while the first is being handled: the next call finds a whole engine."""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import pytest
from engine.simulated_engine import Checker, SimulatedMatcher, expected_output, make_engine
from inside import assert_nothing_is_held, blocks_of_digests, llm_over, readers_of, requests_held
from interrupts import Interrupts

import nanovllm.engine.admission
import nanovllm.engine.block_manager
import nanovllm.engine.grammar_masks
import nanovllm.engine.health
import nanovllm.engine.llm_engine
import nanovllm.engine.new_row
import nanovllm.engine.one_caller
import nanovllm.engine.prompts
import nanovllm.engine.scheduler
import nanovllm.engine.sequence
import nanovllm.engine.text_engine
import nanovllm.llm
import nanovllm.output_stream
from nanovllm import LLM, SamplingParams

MODULES = [
    nanovllm.engine.admission,
    nanovllm.engine.block_manager,
    nanovllm.engine.grammar_masks,
    nanovllm.engine.health,
    nanovllm.engine.llm_engine,
    nanovllm.engine.new_row,
    nanovllm.engine.one_caller,
    nanovllm.engine.prompts,
    nanovllm.engine.text_engine,
    nanovllm.engine.scheduler,
    nanovllm.engine.sequence,
    nanovllm.llm,
    nanovllm.output_stream,
]
MAX_MODEL_LEN = 24
PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False)
TWO = SamplingParams(temperature=1.0, max_tokens=4, n=2, ignore_eos=True, detokenize=False)
PROMPTS = [[1, 2, 3, 4, 1], [1, 2, 3, 4, 2, 2], [3], [4, 4, 4, 4, 4, 4, 4]]


def make_llm(max_behind: int) -> LLM:
    """An `LLM` over a simulated device with so few blocks that sequences are preempted. Some have a grammar."""
    engine = make_engine(
        12, 4, max_num_seqs=4, max_num_batched_tokens=9, max_model_len=MAX_MODEL_LEN, max_behind=max_behind
    )
    engine.__class__ = EngineWithGrammars  # an attribute would make a cycle, which is freed at another time
    return llm_over(engine)


class EngineWithGrammars(nanovllm.engine.llm_engine.LLMEngine):
    """Gives long prompts a grammar."""

    def make_sequence(self, token_ids: list[int], *args: Any, **kwargs: Any) -> Any:
        seq = super().make_sequence(token_ids, *args, **kwargs)
        seq.grammar = AllowsAll() if len(token_ids) > 4 else None
        return seq


class AllowsAll(SimulatedMatcher):
    """A grammar that changes no token."""

    def __init__(self) -> None:
        super().__init__(0)

    def accept(self, token_ids: list[int]) -> bool:
        self.accepted += token_ids
        return True

    def fill(self, row: Any) -> None:
        row.fill(-1)


def work(llm: LLM, streams: list[Iterator[Any]]) -> None:
    """A bit of everything that changes an engine's books."""
    streams.append(llm.stream(PROMPTS[:2], [PARAMS, TWO]))
    for _ in range(3):
        check(next(streams[-1]))
    for output in llm.generate(PROMPTS, [PARAMS, TWO, PARAMS, PARAMS], use_tqdm=False):
        check(output)
    streams.append(llm.stream(PROMPTS[2:], PARAMS))
    llm.abort(next(streams[-1]).request_id)
    llm.reset_prefix_cache()
    check(next(streams[0]))
    streams.pop(0).close()
    for output in streams.pop():
        check(output)


def check(output: Any) -> None:
    for completion in output.outputs:
        tokens, reason = expected_output(output.prompt_token_ids, PARAMS, MAX_MODEL_LEN)
        assert completion.token_ids == tokens[: len(completion.token_ids)]
        assert completion.finish_reason in (None, reason, "abort")


def interrupted(interrupts: Interrupts, gaps: list[int], llm: LLM) -> None:
    """`work`, interrupted there, and then what the caller may rely on."""
    streams: list[Iterator[Any]] = []
    interrupts.arm(gaps)
    with suppress(KeyboardInterrupt):  # which Python drops if it comes in a __del__
        work(llm, streams)
    assert len(interrupts.due) < len(gaps)
    while interrupts.due:  # in the calls that follow
        with suppress(KeyboardInterrupt):
            llm.abort("nobody")
    llm.abort("nobody")
    readers = readers_of(llm)
    assert not any(stream is None or stream.is_over for stream in readers)
    assert requests_held(llm) <= set(chain(*readers.values())), "nobody waits for them"
    del readers
    for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False):
        check(output)
        assert output.outputs[0].finish_reason == "length"
    for output in chain(*streams):  # they have been ended, or go on
        check(output)
    del streams
    llm.reset_prefix_cache()
    engine = llm.engine
    Checker(engine).check_idle()
    assert not engine.has_unfinished_requests and not engine.is_changing
    assert not blocks_of_digests(engine.block_manager)
    assert_nothing_is_held(llm)


@pytest.fixture(params=[0, 1], ids=["read_at_once", "read_one_behind"])
def ticking(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Interrupts, Callable[[], LLM], list[tuple[str, int]]]]:
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)  # pytest's keeps what raised in its __del__
    interrupts = Interrupts()
    with interrupts.in_code_of(MODULES):
        interrupts.arm([])
        llm = make_llm(request.param)
        interrupts.arm([])
        streams: list[Iterator[Any]] = []
        work(llm, streams)
        yield interrupts, lambda: make_llm(request.param), list(interrupts.passed)


def test_one_before_each_statement(ticking: Any) -> None:
    interrupts, make, passed = ticking
    draw = random.Random(0)
    places: dict[tuple[str, int], list[int]] = {}
    for index, statement in enumerate(passed):
        places.setdefault(statement, []).append(index)
    assert len({module for module, _ in places}) == len(MODULES) and len(places) > 200
    for indices in places.values():
        interrupted(interrupts, [draw.choice(indices)], make())


def test_another_while_the_first_is_handled(ticking: Any) -> None:
    interrupts, make, passed = ticking
    draw = random.Random(1)
    seen: Counter[tuple[str, int]] = Counter()
    for index in draw.sample(range(len(passed)), 400):
        if seen[passed[index]] < 4:
            gaps = [draw.choice([0, 1, draw.randrange(40)]) for _ in range(draw.randint(1, 3))]
            interrupted(interrupts, [index, *gaps], make())
            seen[passed[index]] += 1
    assert len(seen) > 50
