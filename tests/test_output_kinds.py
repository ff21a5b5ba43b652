"""What each output of a stream has, by `SamplingParams.output_kind`; and outputs that nobody takes cost nothing."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_prompts
from inside import count_copies_of_prompts, engine_of, streams_open, text_engine_of

from nanovllm import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from nanovllm.engine.request import Request
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput

OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 64,
    # Log-probabilities are compared bit by bit, and a prompt that is found in the cache is computed in other shapes.
    "enable_prefix_caching": False,
}
PROMPTS = random_prompts([5, 33, 1], seed=5, vocab_size=256)
CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
ASKS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "without text": {"temperature": 0.0, "detokenize": False, "logprobs": 0},
    "logprobs": {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    "four": {"n": 4, "seed": 3, "logprobs": 0, "prompt_logprobs": 0},
    "stop strings": {"n": 3, "seed": 7, "stop": ["a", "5", "xyz"]},
    "stop tokens": {"n": 3, "seed": 1, "stop_token_ids": list(range(40)), "include_stop_str_in_output": True},
}
Front = Callable[[list[int], SamplingParams], list[RequestOutput]]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def llm(text_model: Path) -> Iterator[LLM]:
    with LLM(str(text_model), **OPTIONS) as llm:
        yield llm
        assert llm.stats().cache_usage == 0.0


@pytest.fixture(scope="module")
def async_llm(text_model: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(text_model), **OPTIONS)
    yield llm
    assert not streams_open(llm) and llm.is_running
    llm.close()


@pytest.fixture(scope="module")
def generated(llm: LLM) -> Callable[[str], list[RequestOutput]]:
    """`generated(ask)`: what `generate` answers to each of PROMPTS alone; made once for each `max_behind`."""

    @cache  # with steps ahead the shapes are others, and so may be a log-probability's last bit
    def make(ask: str, max_behind: int) -> list[RequestOutput]:
        params = SamplingParams(max_tokens=NUM_TOKENS, **ASKS[ask])
        return [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in PROMPTS]

    return lambda ask: make(ask, llm.engine.max_behind)


@pytest.fixture(params=[0, 1], ids=["read_at_once", "read_one_behind"])
def max_behind(request: pytest.FixtureRequest, llm: LLM, async_llm: AsyncLLM) -> None:
    for engine in (llm.engine, engine_of(async_llm)):
        engine.max_behind = request.param


@pytest.fixture(params=["stream", "async", "async and slow"])
def front(request: pytest.FixtureRequest, llm: LLM, async_llm: AsyncLLM) -> Front:
    """All outputs of a request, by whatever way they come."""

    async def read(outputs: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
        taken = []
        async for output in outputs:
            taken.append(output)
            if request.param == "async and slow":
                await asyncio.sleep(0.02)  # while the engine goes on
        return taken

    if request.param == "stream":
        return lambda prompt, params: list(llm.stream([prompt], params))
    return lambda prompt, params: asyncio.run(read(async_llm.generate(prompt, params)))


def facts(completion: CompletionOutput) -> tuple[Any, ...]:
    c = completion
    return c.index, c.text, c.token_ids, c.logprobs, c.cumulative_logprob, c.finish_reason, c.stop_reason


def joined(outputs: Iterable[RequestOutput]) -> list[tuple[Any, ...]]:
    """The completions that deltas add up to."""
    whole: dict[int, CompletionOutput] = {}
    for output in outputs:
        for part in output.outputs:
            so_far = whole.setdefault(part.index, CompletionOutput(part.index, "", []))
            so_far.text += part.text
            so_far.token_ids = so_far.token_ids + part.token_ids
            so_far.logprobs = None if part.logprobs is None else [*(so_far.logprobs or []), *part.logprobs]
            so_far.cumulative_logprob = part.cumulative_logprob
            so_far.finish_reason, so_far.stop_reason = part.finish_reason, part.stop_reason
    return [facts(whole[index]) for index in sorted(whole)]


@pytest.mark.usefixtures("max_behind")
@pytest.mark.parametrize("ask", ASKS)
def test_all_kinds_give_the_same_completions_in_their_own_way(
    generated: Callable[[str], list[RequestOutput]], front: Front, ask: str
) -> None:
    asked = {"max_tokens": NUM_TOKENS, **ASKS[ask]}
    for prompt, final in zip(PROMPTS, generated(ask), strict=True):
        expected = [facts(c) for c in final.outputs]

        outputs = front(prompt, SamplingParams(**asked))
        assert [facts(c) for c in outputs[-1].outputs] == expected
        assert all(len(output.outputs) == len(expected) for output in outputs)
        assert outputs[-1].prompt_logprobs == final.prompt_logprobs

        deltas = front(prompt, SamplingParams(**asked, output_kind=DELTA))
        assert joined(deltas) == expected
        parts = [part for output in deltas for part in output.outputs]
        assert all(part.token_ids or part.finish_reason for part in parts)
        assert len([part for part in parts if part.finish_reason]) == len(expected), "an end was told twice"
        assert deltas[0].prompt_logprobs == final.prompt_logprobs
        assert all(output.prompt_logprobs is None for output in deltas[1:])

        (only,) = front(prompt, SamplingParams(**asked, output_kind=FINAL_ONLY))
        assert [facts(c) for c in only.outputs] == expected and only.prompt_logprobs == final.prompt_logprobs

        for kind in (outputs, deltas, [only]):
            assert [output.finished for output in kind] == [False] * (len(kind) - 1) + [True]


def test_log_probabilities_that_nobody_looks_at_are_not_copied(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0)

    def count() -> int:
        return sum(type(o) is dict and any(type(v) is Logprob for v in o.values()) for o in gc.get_objects())

    before = count()
    outputs = list(llm.stream([PROMPTS[0]], params))
    assert len(outputs) == 40 and count() - before == 40
    outputs[-1].outputs[0].logprobs[0].clear()
    assert [len(o.outputs[0].logprobs) for o in outputs] == list(range(1, 41))
    assert all(o.outputs[0].logprobs[0] for o in outputs[:-1]) and not outputs[-1].outputs[0].logprobs[0]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_generate_gives_the_whole_whatever_the_kind(llm: LLM, kind: RequestOutputKind) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=9, logprobs=0, output_kind=kind)
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        assert output.finished and len(output["token_ids"]) == len(output.outputs[0].logprobs) == 9
        assert output["text"] == llm.get_tokenizer().decode(output["token_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_abort_is_told_in_every_kind(async_llm: AsyncLLM, llm: LLM, kind: RequestOutputKind) -> None:
    params = SamplingParams(n=2, seed=1, max_tokens=150, output_kind=kind)

    async def main() -> list[RequestOutput]:
        async def read() -> list[RequestOutput]:
            return [output async for output in async_llm.generate(PROMPTS[0], params, "a")]

        task = asyncio.create_task(read())
        while async_llm.stats().num_running < 2:
            await asyncio.sleep(0.001)
        await async_llm.abort("a")
        return await task

    outputs = asyncio.run(main())
    assert outputs[-1].finished and not any(output.finished for output in outputs[:-1])
    (full,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    decode = llm.get_tokenizer().decode
    for part, whole in zip(joined(outputs if kind is DELTA else outputs[-1:]), full.outputs, strict=True):
        _, text, token_ids, _, _, finish_reason, _ = part
        assert finish_reason == "abort" and token_ids == whole.token_ids[: len(token_ids)]
        assert text == decode(token_ids, skip_special_tokens=True)


def test_outputs_that_nobody_takes_are_not_built_and_the_next_has_all(
    async_llm: AsyncLLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    output = Request.output
    monkeypatch.setattr(Request, "output", lambda *args: built.append(args) or output(*args))

    async def main(kind: RequestOutputKind) -> list[RequestOutput]:
        outputs = async_llm.generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=100, output_kind=kind))
        taken = [await anext(outputs)]
        deadline = time.monotonic() + 60
        while async_llm.stats().cache_usage and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        await async_llm.abort("nobody")  # between two steps: so what the last one has to tell has been told
        taken += [output async for output in outputs]
        return taken

    for kind in (CUMULATIVE, DELTA):
        built.clear()
        taken = asyncio.run(main(kind))
        assert len(built) == len(taken) == 2
    monkeypatch.undo()
    (expected,) = llm.generate([PROMPTS[0]], SamplingParams(temperature=0.0, max_tokens=100), use_tqdm=False)
    assert joined(taken) == [facts(expected.outputs[0])]


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
@pytest.mark.parametrize("ask", ASKS)
def test_output_has_what_there_was_however_far_the_engine_has_gone_on(
    llm: LLM, ask: str, kind: RequestOutputKind
) -> None:
    # What a reader in another thread builds while the engine works, without a lock; here nothing is left to chance.
    text_engine, params = text_engine_of(llm), SamplingParams(max_tokens=24, output_kind=kind, **ASKS[ask])
    at_once, later = (text_engine.make_request(PROMPTS[1], params, is_streaming=True) for _ in range(2))
    for request in (at_once, later):
        text_engine.add(request)
    outputs, progress = [], []
    while not (at_once.is_finished and later.is_finished):
        for request in text_engine.step():
            if request is at_once:
                outputs.append(request.output(request.progress()))
            else:
                progress.append(request.progress())
    assert len(outputs) == len(progress) > 3
    for expected, output in zip(outputs, map(later.output, progress), strict=True):
        assert [facts(c) for c in output.outputs] == [facts(c) for c in expected.outputs]
        assert output.finished == expected.finished and output.prompt_logprobs == expected.prompt_logprobs


def spoil(value: Any) -> None:
    """Change whatever there is to change in an output."""
    if isinstance(value, list | dict):
        for item in list(value.values() if isinstance(value, dict) else value):
            spoil(item)
        value.clear()
    elif is_dataclass(value):
        for each in fields(value):
            spoil(getattr(value, each.name))
            setattr(value, each.name, "spoilt")


@pytest.mark.usefixtures("max_behind")
@pytest.mark.parametrize("kind", RequestOutputKind)
@pytest.mark.parametrize("ask", ["logprobs", "four", "stop strings"])
def test_an_output_is_its_readers_who_may_change_it(llm: LLM, async_llm: AsyncLLM, ask: str, kind: Any) -> None:
    params = SamplingParams(max_tokens=12, output_kind=kind, **ASKS[ask])
    expected = list(llm.stream([PROMPTS[1]], params))

    def check(output: RequestOutput, expected: RequestOutput) -> None:
        for each in ("prompt_token_ids", "prompt_logprobs", "outputs", "finished"):
            assert getattr(output, each) == getattr(expected, each)
        metrics = output.metrics
        assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time
        assert (metrics.finished_time is not None) == expected.finished
        spoil(output)

    for output, other in zip(llm.stream([PROMPTS[1]], params), expected, strict=True):
        check(output, other)
    (final,) = llm.generate([PROMPTS[1]], params, use_tqdm=False)
    spoil(final)

    async def main() -> None:
        async for output in async_llm.generate(PROMPTS[1], params):
            last = deepcopy(output)
            spoil(output)
        assert last.prompt_token_ids == PROMPTS[1] and last.prompt_logprobs == (
            expected[-1].prompt_logprobs if kind is not DELTA or len(expected) == 1 else None
        )

    asyncio.run(main())
    assert [facts(c) for c in list(llm.stream([PROMPTS[1]], params))[-1].outputs] == [
        facts(c) for c in expected[-1].outputs
    ]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_outputs_do_not_change_once_they_have_been_handed_out(llm: LLM, kind: RequestOutputKind) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, logprobs=0, output_kind=kind)
    outputs, copies = [], []
    for output in llm.stream(PROMPTS[1], params):
        outputs.append(output)
        copies.append(deepcopy(output))
    assert outputs == copies


def test_what_was_given_is_read_once_and_never_changed(llm: LLM, async_llm: AsyncLLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, truncate_prompt_tokens=3)
    expected = llm.generate([PROMPTS[1][-3:]], params, use_tqdm=False)[0]["token_ids"]
    prompt = list(PROMPTS[1])
    prompts: list[Any] = [prompt, {"prompt_token_ids": prompt}]
    stream = llm.stream(prompts, params)
    streams = [async_llm.generate(prompt, params) for prompt in prompts]
    prompt.clear(), prompts.clear()
    assert [o["token_ids"] for o in stream if o.finished] == [expected] * 2

    async def main() -> list[list[int]]:
        return [[output async for output in stream][-1]["token_ids"] for stream in streams]

    assert asyncio.run(main()) == [expected] * 2


def test_a_delta_costs_no_more_behind_a_long_prompt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = count_copies_of_prompts(monkeypatch)
    params = SamplingParams(temperature=0.0, max_tokens=5, output_kind=DELTA)
    outputs = list(llm.stream([PROMPTS[1]], params))
    assert len(outputs) == 5 and not copied
    assert all(output.prompt_token_ids == PROMPTS[1] for output in outputs) and len(copied) == 5
    assert outputs[0].prompt_token_ids is outputs[0].prompt_token_ids is not outputs[1].prompt_token_ids


def test_final_only_gives_its_turn_up_when_it_has_begun(text_model: Path) -> None:
    # max_waiting counts those that wait for their first token, of which such a stream tells nobody else.
    params = SamplingParams(temperature=0.0, max_tokens=100, output_kind=FINAL_ONLY)

    async def main() -> int:
        async with AsyncLLM(str(text_model), max_waiting=1, **OPTIONS) as llm:
            tasks = [asyncio.create_task(anext(llm.generate(prompt, params))) for prompt in PROMPTS]
            most = 0
            async with asyncio.timeout(60):
                while not all(task.done() for task in tasks):
                    most = max(most, llm.stats().num_running)
                    await asyncio.sleep(0.001)
            assert all(output.finished for output in await asyncio.gather(*tasks))
            return most

    assert asyncio.run(main()) == 3
