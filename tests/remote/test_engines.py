"""An engine in a process of its own gives the same outputs as one in this process, and fails alone."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from leftovers import children_of

from nanovllm import LLM, EngineDeadError, RequestOutput, SamplingParams, demo_model
from nanovllm.outputs import RequestMetrics
from nanovllm.remote import engine as remote_engine
from nanovllm.remote.engines import Engines
from nanovllm.sampling_params import RequestOutputKind

OPTIONS = {"device": "cpu", "dtype": "float32", "num_kvcache_blocks": 64, "max_num_seqs": 8, "max_logprobs": -1}
GREEDY = {"temperature": 0.0, "max_tokens": 12}
ASKS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded, n=3": {"temperature": 0.8, "seed": 7, "n": 3, "max_tokens": 12},
    "logprobs": GREEDY | {"logprobs": 2, "prompt_logprobs": 1},
    "stop string": GREEDY | {"stop": ["e"], "include_stop_str_in_output": True},
    "without text": GREEDY | {"detokenize": False},
    "truncated": GREEDY | {"truncate_prompt_tokens": 3},
    "JSON": {"temperature": 1.0, "seed": 1, "max_tokens": 12, "structured_outputs": {"json_object": True}},
}
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def engines(run: Run) -> Iterator[Engines]:
    """One engine, which the tests share. Like the one here it computes on one thread, or sums would differ a little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        llm = Engines(str(demo_model()), OPTIONS)
        run(llm.__aenter__())
        yield llm
        run(llm.__aexit__())


@pytest.fixture(scope="module")
def here() -> Iterator[LLM]:
    with LLM(str(demo_model()), **OPTIONS) as llm:
        yield llm


def params_of(ask: dict[str, Any], **more: Any) -> SamplingParams:
    from nanovllm import StructuredOutputsParams

    ask = ask | more
    if "structured_outputs" in ask:
        ask["structured_outputs"] = StructuredOutputsParams(**ask["structured_outputs"])
    return SamplingParams(**ask)


async def outputs_of(llm: Engines, prompt: Any, params: SamplingParams, request_id: str = "r") -> list[RequestOutput]:
    request, outputs = await llm.submit(prompt, params, request_id), []
    while not outputs or not outputs[-1].finished:
        outputs.append(await request.next_output())
    return outputs


def comparable(output: RequestOutput) -> RequestOutput:
    """Without its times, its id, and how much the cache had."""
    return replace(output, metrics=None, request_id="", num_cached_tokens=0)


@pytest.mark.parametrize("ask", ASKS)
def test_the_last_output_is_that_of_an_engine_here(run: Run, engines: Engines, here: LLM, ask: str) -> None:
    for kind in (RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY):
        outputs = run(outputs_of(engines, "Once upon a time", params_of(ASKS[ask], output_kind=kind)))
        (expected,) = here.generate("Once upon a time", params_of(ASKS[ask]), use_tqdm=False)
        assert comparable(outputs[-1]) == comparable(expected)
        assert kind is RequestOutputKind.CUMULATIVE or len(outputs) == 1


@pytest.mark.parametrize("ask", ASKS)
def test_deltas_join_to_the_whole(run: Run, engines: Engines, here: LLM, ask: str) -> None:
    outputs = run(outputs_of(engines, "Two birds", params_of(ASKS[ask], output_kind=RequestOutputKind.DELTA)))
    (expected,) = here.generate("Two birds", params_of(ASKS[ask]), use_tqdm=False)
    for i, whole in enumerate(expected.outputs):
        parts = [part for output in outputs for part in output.outputs if part.index == i]
        assert "".join(part.text for part in parts) == whole.text
        assert [token for part in parts for token in part.token_ids] == whole.token_ids
        assert [entry for part in parts for entry in part.logprobs or []] == (whole.logprobs or [])
        assert parts[-1].finish_reason == whole.finish_reason and parts[-1].stop_reason == whole.stop_reason


def test_a_reader_that_falls_behind_gets_one_output_with_all_that_it_has_missed(run: Run, engines: Engines) -> None:
    async def read_late() -> list[RequestOutput]:
        request = await engines.submit("A", params_of(GREEDY, output_kind=RequestOutputKind.DELTA), "late")
        while not request.is_finished:
            await asyncio.sleep(0.01)
        return [await request.next_output()]

    (output,) = run(read_late())
    assert output.finished and len(output.outputs[0].token_ids) == 12


def test_times_count_from_the_prompts_arrival_in_this_process(run: Run, engines: Engines) -> None:
    began = time.monotonic()
    metrics = run(outputs_of(engines, "A", params_of(GREEDY)))[-1].metrics
    assert isinstance(metrics, RequestMetrics) and metrics.num_generation_tokens == 12
    assert began <= metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time
    assert metrics.first_token_time <= metrics.finished_time <= time.monotonic()


@pytest.mark.parametrize(
    ("prompt", "ask", "error", "says"),
    [
        ("", {}, ValueError, "prompt is empty"),
        ([10**6], {}, ValueError, "prompt has the token id 1000000"),
        (7, {}, TypeError, "prompt=7 must be"),
        ("x", {"stop_token_ids": [10**6]}, ValueError, "stop_token_ids has 1000000"),
        ("x", {"structured_outputs": {"regex": "("}}, ValueError, r"regex='\('"),
    ],
)
def test_what_is_wrong_with_a_request_is_raised_and_nothing_else_is_lost(
    run: Run, engines: Engines, prompt: Any, ask: dict[str, Any], error: type, says: str
) -> None:
    async def beside() -> list[Any]:
        good = outputs_of(engines, "A", params_of(GREEDY), "good")
        bad = outputs_of(engines, prompt, params_of(GREEDY | ask), "bad")
        return await asyncio.gather(good, bad, return_exceptions=True)

    good, bad = run(beside())
    assert isinstance(bad, error), bad
    with pytest.raises(error, match=says):
        raise bad
    assert good[-1].finished and engines.all[0].num_requests == 0


def test_a_request_that_is_left_frees_its_blocks(run: Run, engines: Engines) -> None:
    async def leave() -> None:
        asked = params_of(GREEDY, temperature=1.0, max_tokens=400, ignore_eos=True, n=4)
        request = await engines.submit("A", asked, "left")
        await request.next_output()
        assert engines.all[0].stats.num_running
        engines.leave(request)
        engines.leave(request)  # again: nothing happens
        async with asyncio.timeout(10):
            while engines.all[0].stats.num_running or engines.all[0].stats.cache_usage:
                await asyncio.sleep(0.01)

    run(leave())


def test_counters_come_also_when_no_request_has_news(run: Run, engines: Engines) -> None:
    async def count() -> None:
        before = engines.all[0].stats.num_steps
        asked = params_of(GREEDY, max_tokens=200, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
        request = await engines.submit("A", asked, "quiet")
        async with asyncio.timeout(20):
            while engines.all[0].stats.num_steps < before + 20:
                await asyncio.sleep(0.01)
        assert not request.is_finished
        engines.leave(request)

    run(count())


def test_an_engine_that_is_killed_fails_its_requests_and_comes_back(run: Run, engines: Engines) -> None:
    async def kill() -> None:
        (pid,) = children_of(os.getpid(), "remote.process")
        request = await engines.submit("A", params_of(GREEDY, max_tokens=400, ignore_eos=True), "lost")
        await request.next_output()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="has ended before its answer was complete"):
            while True:
                await request.next_output()
        with pytest.raises(EngineDeadError, match="no engine serves"):
            await engines.check_health()
        with pytest.raises(EngineDeadError, match="no engine serves"):
            await engines.submit("A", params_of(GREEDY), "early")
        async with asyncio.timeout(60):
            while engines.all[0].facts is None:
                await asyncio.sleep(0.05)
        await engines.check_health()
        assert engines.all[0].num_restarts == 1
        assert (await outputs_of(engines, "A", params_of(GREEDY)))[-1].finished

    run(kill())


HANGING = """
import time
from nanovllm.engine.engine_thread import EngineThread
from nanovllm.remote.step_watch import LONGEST_STEP_S
LONGEST_STEP_S["cpu"] = 1.0
step = EngineThread._step
def hang(thread):
    while any(request.request_id == "hangs" for request in thread._listeners):
        time.sleep(1)
    step(thread)
EngineThread._step = hang
"""


def test_an_engine_whose_step_does_not_end_fails_its_requests_and_comes_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_engine, "PROGRAM", remote_engine.PROGRAM.replace("run({fd})", HANGING + "run({fd})"))

    async def hang() -> None:
        async with Engines(str(demo_model()), OPTIONS) as engines:
            await asyncio.sleep(1.5)  # without work it waits, and does not hang
            assert (await outputs_of(engines, "A", params_of(GREEDY)))[-1].finished
            request = await engines.submit("A", params_of(GREEDY), "hangs")
            async with asyncio.timeout(30):
                with pytest.raises(EngineDeadError, match="has ended before its answer was complete"):
                    await request.next_output()
                while engines.all[0].facts is None:
                    await asyncio.sleep(0.05)
            assert engines.all[0].num_restarts == 1
            assert (await outputs_of(engines, "A", params_of(GREEDY)))[-1].finished

    run(hang())


class TestTheStart:
    def test_raises_what_keeps_the_engine_from_serving(self, run: Run) -> None:
        engines = Engines(str(demo_model()), OPTIONS | {"max_model_len": 10**7})

        async def start() -> None:
            async with engines:
                raise AssertionError("it serves")

        with pytest.raises(ValueError, match="max_model_len=10000000"):
            run(start())
        assert engines.all[0].process.returncode is not None

    def test_fails_if_a_process_ends(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote_engine, "PROGRAM", "raise SystemExit({parent} * 0 + 3)")
        engines = Engines(str(demo_model()), OPTIONS, size=2)

        async def start() -> None:
            async with engines:
                raise AssertionError("it serves")

        with pytest.raises(ChildProcessError, match=r"engine \d has ended before it served"):
            run(start())
        assert all(engine.process.returncode is not None for engine in engines.all)

    @pytest.mark.parametrize("size", [0, -1, 1.5, True])
    def test_refuses_a_number_of_engines_that_cannot_be(self, size: Any) -> None:
        with pytest.raises(ValueError, match="data_parallel_size=.* must be an integer >= 1"):
            Engines(str(demo_model()), OPTIONS, size=size)

    def test_refuses_options_before_a_process_is_started(self) -> None:
        with pytest.raises(ValueError, match="max_num_seqs=0"):
            Engines(str(demo_model()), OPTIONS | {"max_num_seqs": 0})


def test_a_model_without_a_tokenizer_takes_token_ids(run: Run, checkpoint: Callable[[str], Path]) -> None:
    async def ask() -> None:
        options = {"device": "cpu", "num_kvcache_blocks": 8, "skip_tokenizer_init": True, "max_num_seqs": 2}
        async with Engines(str(checkpoint("plain")), options) as llm:
            outputs = await outputs_of(llm, [1, 2, 3], params_of(GREEDY))
            assert len(outputs[-1].outputs[0].token_ids) == 12 and outputs[-1].outputs[0].text == ""
            with pytest.raises(ValueError, match="skip_tokenizer_init=True"):
                await llm.submit("text", params_of(GREEDY), "r")

    run(ask())
