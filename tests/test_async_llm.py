"""What a user of `AsyncLLM` may rely on: the same answers as `LLM`, and nothing left behind whoever comes and goes."""

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_prompts
from inside import (
    callers_waiting,
    callers_with_turn,
    engine_of,
    outputs_not_taken,
    replace_step_of_thread,
    requests_in_thread,
    stages_of_a_step,
    streams_open,
    text_engine_of,
    text_engine_reference,
    the_open_stream,
    thread_of,
    wakeup_of_thread,
    what_is_held,
)
from safetensors.torch import load_file

from nanovllm import LLM, AsyncLLM, SamplingParams, demo_model
from nanovllm.outputs import RequestOutput

PROMPTS = random_prompts([5, 33, 1, 17, 40], seed=5, vocab_size=256)
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
LONG = SamplingParams(temperature=0.0, max_tokens=150)
OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 40,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}
TIMEOUT = 60


@pytest.fixture(scope="module")
def expected(text_model: Path) -> Callable[..., RequestOutput]:
    """What LLM says, remembered: `expected(prompt, params)`."""
    llm = LLM(str(text_model), **OPTIONS)
    known: dict[Any, RequestOutput] = {}

    def answer(prompt: list[int], params: SamplingParams = GREEDY) -> RequestOutput:
        key = (tuple(prompt), repr(params))
        if key not in known:
            (known[key],) = llm.generate([prompt], params, use_tqdm=False)
        return known[key]

    return answer


@pytest.fixture(scope="module")
def shared(text_model: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(text_model), **OPTIONS)
    yield llm
    llm.close()


@pytest.fixture(params=[0, 1], ids=["read_at_once", "read_one_behind"])
def llm(request: pytest.FixtureRequest, shared: AsyncLLM) -> Iterator[AsyncLLM]:
    """One engine through all the tests, each of which must leave it idle and alive."""
    engine_of(shared).max_behind = request.param
    yield shared
    assert shared.is_running and not shared.errored and is_idle(shared)


def is_idle(llm: AsyncLLM) -> bool:
    """Nothing runs, no block is held, and neither the engine nor its fronts remember any request."""
    deadline = time.monotonic() + TIMEOUT
    while engine_of(llm).has_unfinished_requests and time.monotonic() < deadline:
        time.sleep(0.01)
    return not what_is_held(llm)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end, and see that no task is left, nor one that nobody looked at."""

    async def guarded() -> Any:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        async with asyncio.timeout(TIMEOUT):
            result = await main
        for _ in range(3):
            await asyncio.sleep(0)  # what a dropped generator has started comes to its end
        gc.collect()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert complaints == []
        return result

    return asyncio.run(guarded())


async def last(outputs: Any) -> RequestOutput:
    return [output async for output in outputs][-1]


def same(output: RequestOutput, other: RequestOutput) -> bool:
    return [(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in output.outputs] == [
        (c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in other.outputs
    ]


class TestGenerate:
    def test_outputs_grow_into_what_llm_gives(self, llm: AsyncLLM, expected: Callable[..., RequestOutput]) -> None:
        async def main() -> None:
            parts = [output async for output in llm.generate(PROMPTS[1], GREEDY, "mine")]
            assert {part.request_id for part in parts} == {"mine"}
            assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
            assert all(b["text"].startswith(a["text"]) for a, b in zip(parts, parts[1:], strict=False))
            assert all(len(a["token_ids"]) < len(b["token_ids"]) for a, b in zip(parts, parts[1:], strict=False))
            assert same(parts[-1], expected(PROMPTS[1]))
            assert parts[-1].prompt_token_ids == PROMPTS[1] and parts[-1].metrics.finished_time is not None

        run(main())

    def test_many_producers_get_each_their_own(self, llm: AsyncLLM, expected: Callable[..., RequestOutput]) -> None:
        async def main() -> None:
            outputs = await asyncio.gather(*[last(llm.generate(prompt, GREEDY)) for prompt in PROMPTS * 6])
            for output, prompt in zip(outputs, PROMPTS * 6, strict=True):
                assert same(output, expected(prompt))
            assert len({output.request_id for output in outputs}) == 30

        run(main())

    def test_n_completions_stop_strings_and_text_prompts(self, llm: AsyncLLM, text_model: Path) -> None:
        plain = run(last(llm.generate("Hello", GREEDY)))
        params = [
            SamplingParams(n=3, max_tokens=16, seed=3),
            SamplingParams(temperature=0.0, max_tokens=16, stop=plain["text"][4:6]),
            SamplingParams(temperature=0.0, max_tokens=16, detokenize=False, logprobs=1),
        ]

        async def main() -> list[RequestOutput]:
            return await asyncio.gather(*[last(llm.generate({"prompt": "Hello"}, p)) for p in params])

        outputs = run(main())
        with LLM(str(text_model), **OPTIONS) as other:
            for output, reference in zip(outputs, other.generate(["Hello"] * 3, params, use_tqdm=False), strict=True):
                assert same(output, reference) and output.prompt == "Hello"
        assert outputs[1]["finish_reason"] == "stop" and outputs[2].outputs[0].logprobs

    def test_what_cannot_run_is_refused(self, llm: AsyncLLM) -> None:
        async def main() -> None:
            for prompt, params, error, cause in (
                ([], None, ValueError, "prompt is empty"),
                (None, None, TypeError, "prompt=None must be"),
                ([1] * 5000, None, ValueError, "max_model_len"),
                (PROMPTS[0], {"temperature": 0}, TypeError, "must be a SamplingParams"),
                (PROMPTS[0], SamplingParams(stop_token_ids=[300]), ValueError, "stop_token_ids has 300"),
            ):
                with pytest.raises(error, match=cause):
                    await last(llm.generate(prompt, params, "same id"))
            async with aclosing(llm.generate(PROMPTS[0], LONG, "a")) as outputs:
                await anext(outputs)
                for request_id in (5, b"a", ["a"], True):
                    with pytest.raises(TypeError, match="request_id=.* must be a string or None"):
                        await last(llm.generate(PROMPTS[0], GREEDY, request_id))
                with pytest.raises(ValueError, match=r"request_id='\\ud800' has a lone surrogate"):
                    await last(llm.generate(PROMPTS[0], GREEDY, "\ud800"))
                for request_id in (5, None, b"a", ["a", 5], [["a"]]):
                    with pytest.raises(TypeError, match="request_id=.* must be a string or a list of strings"):
                        await llm.abort(request_id)
                for messages in (None, 5, "Hi", [], [[{"role": "user", "content": "Hi"}]]):
                    with pytest.raises(TypeError, match=r"messages=.* must be a list of dicts"):
                        await last(llm.chat(messages, GREEDY))
                assert (await last(outputs))["finish_reason"] == "length"

        run(main())

    def test_request_ids_are_unique_among_those_that_run(
        self, llm: AsyncLLM, expected: Callable[..., RequestOutput]
    ) -> None:
        async def main() -> None:
            async with aclosing(llm.generate(PROMPTS[0], LONG, "a")) as first:
                await anext(first)
                with pytest.raises(ValueError, match="request_id='a' is that of a request which is still running"):
                    await last(llm.generate(PROMPTS[1], GREEDY, "a"))
                assert (await anext(first)).request_id == "a"
            for _ in range(2):  # the id is free as soon as the last output is there
                outputs = llm.generate(PROMPTS[1], GREEDY, "a")
                async for output in outputs:
                    if output.finished:
                        break
                assert same(output, expected(PROMPTS[1])) and not streams_open(llm)
            two = SamplingParams(n=2, max_tokens=4)
            async with aclosing(llm.generate(PROMPTS[0], LONG, "1_b")) as first:
                await anext(first)
                with pytest.raises(ValueError, match="request_id='1_b' is"):  # the name of its second completion
                    await last(llm.generate(PROMPTS[1], two, "b"))

        run(main())

    def test_chat_and_tokenizer(self) -> None:
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
        with LLM(demo_model(), **OPTIONS) as other:
            (reference,) = other.chat([{"role": "user", "content": "Hi"}], GREEDY, False, chat_template=template)

        async def main() -> None:
            async with AsyncLLM(demo_model(), **OPTIONS) as llm:
                outputs = llm.chat([{"role": "user", "content": "Hi"}], GREEDY, chat_template=template)
                output = await last(outputs)
                assert same(output, reference) and output.prompt == reference.prompt == "<user>Hi<assistant>"
                assert await llm.encode_prompt(output.prompt) == output.prompt_token_ids
                assert (await llm.get_tokenizer()).decode(output["token_ids"]) == output["text"]
                messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
                outputs = llm.chat(messages, GREEDY, chat_template=template, chat_template_content_format="string")
                messages[0]["content"].clear()  # after the call they are the caller's again
                messages.clear()
                assert same(await last(outputs), reference)
                with pytest.raises(ValueError, match="the chat template does not take"):
                    await last(llm.chat([{"role": "user", "content": "Hi"}], GREEDY))
                async for _ in llm.chat([{"role": "user", "content": "Hi"}], LONG, "c", chat_template=template):
                    break

        run(main())

    def test_prefix_cache_can_be_reset(self, llm: AsyncLLM) -> None:
        async def main() -> list[int]:
            cached = []
            for _ in range(2):
                await llm.reset_prefix_cache()
                for _ in range(2):
                    cached.append((await last(llm.generate(PROMPTS[1], GREEDY))).num_cached_tokens)
            return cached

        assert run(main()) == [0, 32, 0, 32]

    def test_several_event_loops_one_after_another_and_side_by_side(
        self, llm: AsyncLLM, expected: Callable[..., RequestOutput]
    ) -> None:
        results: list[RequestOutput] = []

        def one_loop() -> None:
            for prompt in PROMPTS:
                results.append(asyncio.run(last(llm.generate(prompt, GREEDY))))

        threads = [threading.Thread(target=one_loop) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        assert len(results) == 15
        for output in results:
            assert same(output, expected(output.prompt_token_ids))


class TestLeaving:
    def test_by_break_close_or_cancellation_gives_the_blocks_back(self, llm: AsyncLLM) -> None:
        async def read(num_taken: int, request_id: str) -> None:
            async for _ in llm.generate(PROMPTS[1], LONG, request_id):
                num_taken -= 1
                if num_taken <= 0:
                    break

        async def hang(request_id: str) -> None:
            async for _ in llm.generate(PROMPTS[1], LONG, request_id):
                await asyncio.sleep(TIMEOUT)

        async def main() -> None:
            await asyncio.gather(read(1, "a"), read(5, "b"))
            outputs = llm.generate(PROMPTS[1], LONG, "c")
            await anext(outputs)
            await outputs.aclose()
            for delay in (0, 0, 0.001, 0.02, 0.05):
                task = asyncio.create_task(hang("d"))
                await asyncio.sleep(delay)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await asyncio.sleep(0)
            assert not streams_open(llm)
            await llm.abort([])  # behind the aborts
            assert is_idle(llm)

        run(main())
        assert llm.stats().num_running == 0

    def test_before_the_engine_has_seen_it_leaves_nothing(self, llm: AsyncLLM) -> None:
        async def main() -> None:
            for _ in range(20):
                task = asyncio.create_task(last(llm.generate("Hello", LONG)))
                for _ in range(random.Random(0).randrange(4)):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        run(main())

    def test_loop_that_ends_over_its_requests_leaves_nothing(self, llm: AsyncLLM) -> None:
        async def main() -> None:
            outputs = [llm.generate(prompt, LONG) for prompt in PROMPTS]
            tasks = [asyncio.create_task(last(o)) for o in outputs]
            await anext(llm.generate(PROMPTS[0], LONG))
            assert tasks

        asyncio.run(main())
        loop = asyncio.new_event_loop()  # one that does not even cancel its tasks
        outputs = llm.generate(PROMPTS[1], LONG)
        loop.run_until_complete(anext(outputs))
        loop.close()
        del outputs
        gc.collect()

    def test_abort_ends_the_request_for_its_reader(self, llm: AsyncLLM) -> None:
        async def main() -> None:
            started = asyncio.Event()

            async def read(request_id: str) -> RequestOutput:
                outputs = []
                async for output in llm.generate(PROMPTS[1], LONG, request_id):
                    outputs.append(output)
                    started.set()
                return outputs[-1]

            tasks = {i: asyncio.create_task(read(i)) for i in "abc"}
            await started.wait()
            await llm.abort("a")
            await llm.abort(["b", "unknown"])
            ends = {i: await tasks[i] for i in "abc"}
            assert [ends[i]["finish_reason"] for i in "abc"] == ["abort", "abort", "length"]
            assert all(end.finished for end in ends.values())
            early = asyncio.create_task(read("d"))
            await asyncio.sleep(0)
            await llm.abort("d")  # it may be with the tokenizer still
            assert (await early)["finish_reason"] == "abort"

        run(main())


class TestBackpressure:
    def test_slow_reader_gets_the_latest_output_and_holds_nobody_up(
        self, llm: AsyncLLM, expected: Callable[..., RequestOutput]
    ) -> None:
        async def main() -> None:
            slow = llm.generate(PROMPTS[0], LONG)
            assert not (await anext(slow)).finished
            stream = the_open_stream(llm)
            fast = [await last(llm.generate(prompt, LONG)) for prompt in PROMPTS[1:3]]
            assert all(same(o, expected(o.prompt_token_ids, LONG)) for o in fast)
            while not llm.stats().cache_usage == 0.0:
                await asyncio.sleep(0.01)
            assert outputs_not_taken(stream) == 1
            rest = [output async for output in slow]
            assert len(rest) == 1 and same(rest[0], expected(PROMPTS[0], LONG))

        run(main())

    def test_blocked_event_loop_costs_no_memory(
        self, llm: AsyncLLM, expected: Callable[..., RequestOutput], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def main() -> None:
            calls = []
            loop = asyncio.get_running_loop()
            call = loop.call_soon_threadsafe
            outputs = [llm.generate(prompt, LONG) for prompt in PROMPTS]
            for output in outputs:
                await anext(output)
            monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: calls.append(args) or call(*args))
            deadline = time.monotonic() + TIMEOUT
            while llm.stats().cache_usage and time.monotonic() < deadline:
                time.sleep(0.01)  # in the loop's own thread
            assert len(calls) <= 1
            monkeypatch.undo()
            for output, prompt in zip(outputs, PROMPTS, strict=True):
                rest = [o async for o in output]
                assert len(rest) <= 1 + 1 and same(rest[-1], expected(prompt, LONG))

        run(main())

    def test_max_waiting_makes_generate_wait(self, text_model: Path, expected: Callable[..., RequestOutput]) -> None:
        async def main() -> None:
            async with AsyncLLM(str(text_model), max_waiting=3, **{**OPTIONS, "max_num_seqs": 2}) as llm:
                most = 0

                async def read(prompt: list[int]) -> RequestOutput:
                    nonlocal most
                    outputs = []
                    async for output in llm.generate(prompt, GREEDY):
                        outputs.append(output)
                        most = max(most, llm.stats().num_waiting)
                    return outputs[-1]

                outputs = await asyncio.gather(*[read(prompt) for prompt in PROMPTS * 6])
                assert all(same(o, expected(p)) for o, p in zip(outputs, PROMPTS * 6, strict=True))
                assert most <= 3
                tasks = [asyncio.create_task(read(prompt)) for prompt in PROMPTS * 4]
                await asyncio.sleep(0.01)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert same(await read(PROMPTS[0]), expected(PROMPTS[0]))
                assert callers_with_turn(llm) == callers_waiting(llm) == 0, "a turn was lost"

        run(main())
        for value in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match="max_waiting"):
                AsyncLLM(str(text_model), max_waiting=value)

    def test_max_waiting_is_the_engines_whatever_loops_its_callers_run_in(
        self, text_model: Path, expected: Callable[..., RequestOutput]
    ) -> None:
        results: list[RequestOutput] = []
        with_turn = []

        async def one_loop() -> None:
            async def read(prompt: list[int]) -> None:
                async for output in llm.generate(prompt, GREEDY):
                    with_turn.append(callers_with_turn(llm))
                    if output.finished:
                        results.append(output)

            await asyncio.gather(*[read(prompt) for prompt in PROMPTS * 2])

        llm = AsyncLLM(str(text_model), max_waiting=2, **{**OPTIONS, "max_num_seqs": 2})
        threads = [threading.Thread(target=asyncio.run, args=(one_loop(),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        assert len(results) == 30 and 1 <= max(with_turn) <= 2
        assert all(same(output, expected(output.prompt_token_ids)) for output in results)
        assert callers_with_turn(llm) == callers_waiting(llm) == 0
        llm.close()

    def test_loop_that_ends_over_those_that_wait_keeps_no_turn(
        self, text_model: Path, expected: Callable[..., RequestOutput]
    ) -> None:
        llm = AsyncLLM(str(text_model), max_waiting=1, **OPTIONS)
        loop = asyncio.new_event_loop()

        async def begin() -> list[asyncio.Task]:
            tasks = [asyncio.create_task(last(llm.generate(prompt, LONG))) for prompt in PROMPTS]
            while not requests_in_thread(llm):
                await asyncio.sleep(0)
            return tasks

        tasks = loop.run_until_complete(begin())
        assert callers_waiting(llm) > 0
        loop.close()  # without cancelling its tasks
        for _ in range(3):
            assert same(run(last(llm.generate(PROMPTS[1], GREEDY))), expected(PROMPTS[1]))
        asyncio.run(asyncio.wait_for(llm.aclose(drain=True), TIMEOUT))
        for task in tasks:
            task._log_destroy_pending = False

    def test_idle_engine_sleeps(self, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
        run(last(llm.generate(PROMPTS[0], GREEDY)))
        assert is_idle(llm)
        wakes = []
        condition = wakeup_of_thread(llm)
        wait = condition.wait
        monkeypatch.setattr(condition, "wait", lambda *args: wakes.append(args) or wait(*args))
        run(last(llm.generate(PROMPTS[0], GREEDY)))  # so that the next wait is a counted one
        time.sleep(0.2)
        assert wakes in ([(None,)], [(None,), (None,)])  # without a timeout
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1


class TestFailure:
    def test_of_a_step_reaches_every_waiter_and_the_next_request_is_served(
        self, llm: AsyncLLM, expected: Callable[..., RequestOutput]
    ) -> None:
        async def main() -> None:
            for owner, name in stages_of_a_step(llm):
                cause = RuntimeError(f"{name} failed")
                generators = [llm.generate(prompt, LONG) for prompt in PROMPTS * 3]  # some of them wait
                tasks = [asyncio.create_task(last(generator)) for generator in generators]
                while requests_in_thread(llm) < 15:
                    await asyncio.sleep(0.001)

                def fail(*args: Any, cause: BaseException = cause, owner: Any = owner, name: str = name) -> None:
                    delattr(owner, name)
                    raise cause

                setattr(owner, name, fail)
                errors = await asyncio.gather(*tasks, return_exceptions=True)
                assert len(errors) == 15
                for error in errors:
                    assert type(error) is RuntimeError and f"{name} failed" in str(error)
                    assert error.__cause__ is cause
                assert len(set(map(id, errors))) == 15
                assert llm.stats().cache_usage == 0.0 and llm.is_running and not llm.errored
                assert same(await last(llm.generate(PROMPTS[1], GREEDY)), expected(PROMPTS[1]))

        run(main())

    def test_of_one_requests_admission_is_its_own(self, llm: AsyncLLM, expected: Callable[..., RequestOutput]) -> None:
        async def main() -> None:
            engine = engine_of(llm)
            add, bad = engine.add, []

            def fail_at_the_second(seq: Any) -> None:
                bad.append(seq)
                if len(bad) == 2:
                    raise MemoryError("no room")
                add(seq)

            engine.add = fail_at_the_second
            try:
                results = await asyncio.gather(
                    *[last(llm.generate(prompt, GREEDY)) for prompt in PROMPTS[:3]], return_exceptions=True
                )
            finally:
                del engine.add
            assert [type(r) for r in results].count(MemoryError) == 1
            assert all(same(r, expected(r.prompt_token_ids)) for r in results if isinstance(r, RequestOutput))

        run(main())

    def test_of_the_thread_itself_is_said_to_everyone(self, text_model: Path) -> None:
        async def main() -> None:
            llm = AsyncLLM(str(text_model), **OPTIONS)
            task = asyncio.create_task(last(llm.generate(PROMPTS[0], LONG)))
            while not llm.stats().num_running:
                await asyncio.sleep(0.001)

            def die() -> None:
                raise SystemError("broken")

            replace_step_of_thread(llm, die)
            with pytest.raises(RuntimeError, match="broken"):
                await task
            assert llm.errored and not llm.is_running
            with pytest.raises(RuntimeError, match="the engine is dead.*broken"):
                await last(llm.generate(PROMPTS[0], GREEDY))
            with pytest.raises(RuntimeError, match="the engine is dead.*broken"):
                await llm.reset_prefix_cache()
            await llm.aclose()

        run(main())


class TestBetweenRollouts:
    def test_new_weights_and_sleep(self, llm: AsyncLLM, expected: Callable[..., RequestOutput], text_model: Path):
        weights = load_file(text_model / "model.safetensors")

        async def answer() -> list[int]:
            return (await last(llm.generate(PROMPTS[1], GREEDY))).outputs[0].token_ids

        async def main() -> None:
            await llm.load_weights({name: torch.zeros_like(tensor) for name, tensor in weights.items()}.items())
            assert await answer() == [0] * 16
            await llm.sleep(level=2)
            assert await llm.is_sleeping()
            with pytest.raises(RuntimeError, match=r"call wake_up\(\)"):
                await answer()
            await llm.wake_up()
            assert not await llm.is_sleeping()
            with pytest.raises(RuntimeError, match=r"call load_weights\(\)"):
                await answer()
            await llm.load_weights(weights.items())
            assert await answer() == expected(PROMPTS[1]).outputs[0].token_ids

        run(main())

    def test_are_refused_while_requests_run(self, llm: AsyncLLM, expected: Callable[..., RequestOutput]):
        async def main() -> None:
            async with aclosing(llm.generate(PROMPTS[0], LONG)) as outputs:
                await anext(outputs)
                with pytest.raises(RuntimeError, match="1 requests are unfinished"):
                    await llm.sleep()
                with pytest.raises(RuntimeError, match="1 requests are unfinished"):
                    await llm.load_weights([])
                output = await last(outputs)
            assert output.outputs[0].token_ids == expected(PROMPTS[0], LONG).outputs[0].token_ids

        run(main())


class TestShutdown:
    def test_giving_up_on_a_drain_aborts_what_runs(self, text_model: Path) -> None:
        async def main() -> None:
            llm = AsyncLLM(str(text_model), **OPTIONS)
            task = asyncio.create_task(last(llm.generate(PROMPTS[0], LONG)))
            while not requests_in_thread(llm):
                await asyncio.sleep(0.001)
            text_engine = text_engine_of(llm)
            slow = text_engine.step
            text_engine.step = lambda: time.sleep(0.05) or slow()  # 150 steps: 7.5 s
            others = asyncio.create_task(llm.aclose(drain=True))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(llm.aclose(drain=True), 0.01)
            start = time.monotonic()
            assert (await task).outputs[0].finish_reason == "abort"
            await others
            assert time.monotonic() - start < 5
            assert not thread_of(llm).is_alive()

        run(main())

    def test_aborts_or_waits_as_asked(self, text_model: Path, expected: Callable[..., RequestOutput]) -> None:
        async def main(drain: bool) -> list[RequestOutput]:
            llm = AsyncLLM(str(text_model), **OPTIONS)
            tasks = [asyncio.create_task(last(llm.generate(prompt, LONG))) for prompt in PROMPTS * 3]
            while requests_in_thread(llm) < 15:
                await asyncio.sleep(0.001)
            await llm.aclose(drain)
            with pytest.raises(RuntimeError, match="closed"):
                await last(llm.generate(PROMPTS[0], GREEDY))
            assert not llm.is_running and not llm.errored
            return await asyncio.gather(*tasks)

        threads = threading.active_count()
        for drain in (False, True):
            outputs = run(main(drain))
            for output, prompt in zip(outputs, PROMPTS * 3, strict=True):
                assert output.finished
                if drain:
                    assert same(output, expected(prompt, LONG))
                else:
                    assert output["finish_reason"] == "abort"
            assert threading.active_count() == threads

    def test_of_the_context_waits_unless_an_error_leaves_it(self, text_model: Path) -> None:
        async def main(fails: bool) -> str:
            with_error = None
            try:
                async with AsyncLLM(str(text_model), **OPTIONS) as llm:
                    task = asyncio.create_task(last(llm.generate(PROMPTS[0], LONG)))
                    while not llm.stats().num_running:
                        await asyncio.sleep(0.001)
                    if fails:
                        raise KeyError("mine")
            except KeyError as error:
                with_error = error
            assert (with_error is not None) == fails
            return (await task)["finish_reason"]

        assert run(main(False)) == "length"
        assert run(main(True)) == "abort"

    def test_of_the_context_waits_for_requests_whose_turn_has_not_come(
        self, text_model: Path, expected: Callable[..., RequestOutput]
    ) -> None:
        async def main() -> None:
            async with AsyncLLM(str(text_model), max_waiting=1, **{**OPTIONS, "max_num_seqs": 1}) as llm:
                tasks = [asyncio.create_task(last(llm.generate(prompt, GREEDY))) for prompt in PROMPTS * 2]
                tasks.append(asyncio.create_task(last(llm.generate("Hello", GREEDY))))
                # The block is left before any of them has run a line.
            assert not llm.is_running
            outputs = await asyncio.gather(*tasks)
            assert all(same(o, expected(p)) for o, p in zip(outputs, PROMPTS * 2, strict=False))
            assert outputs[-1].finished and outputs[-1].prompt == "Hello"
            with pytest.raises(RuntimeError, match="the engine is closed"):
                await last(llm.generate(PROMPTS[0], GREEDY))

        run(main())

    def test_takes_no_new_requests_while_it_waits(
        self, text_model: Path, expected: Callable[..., RequestOutput]
    ) -> None:
        async def main() -> None:
            llm = AsyncLLM(str(text_model), max_waiting=1, **{**OPTIONS, "max_num_seqs": 1})
            tasks = [asyncio.create_task(last(llm.generate(prompt, LONG))) for prompt in PROMPTS]
            closing = asyncio.create_task(llm.aclose(drain=True))
            while llm.is_running:
                await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="the engine is closed"):
                await last(llm.generate(PROMPTS[0], GREEDY))
            tasks[2].cancel()  # one that waits for its turn: nobody waits for it any more
            await closing
            outputs = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(outputs.pop(2), asyncio.CancelledError)
            prompts = PROMPTS[:2] + PROMPTS[3:]
            assert all(same(o, expected(p, LONG)) for o, p in zip(outputs, prompts, strict=True))

        run(main())

    @pytest.mark.parametrize("how", ["aclose", "close", "cancel"])
    def test_without_a_drain_refuses_those_that_wait_for_their_turn(self, text_model: Path, how: str) -> None:
        async def main() -> None:
            llm = AsyncLLM(str(text_model), max_waiting=1, **{**OPTIONS, "max_num_seqs": 1})
            tasks = [asyncio.create_task(last(llm.generate(prompt, LONG))) for prompt in PROMPTS]
            while not llm.stats().num_running:
                await asyncio.sleep(0.001)
            if how == "cancel":  # of the drain
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(llm.aclose(drain=True), 0.001)
            elif how == "close":
                llm.close(drain=True)  # it blocks the loop that would let them in
            else:
                await llm.aclose()
            outputs = await asyncio.gather(*tasks, return_exceptions=True)
            assert outputs[0]["finish_reason"] == ("length" if how == "close" else "abort")
            for output in outputs[1:]:
                if isinstance(output, BaseException):
                    assert isinstance(output, RuntimeError) and "closed" in str(output)
                else:
                    assert output.finished
            assert isinstance(outputs[-1], RuntimeError)
            await llm.aclose()

        run(main())

    def test_blocking_close_gives_the_memory_back(self, text_model: Path) -> None:
        llm = AsyncLLM(str(text_model), **OPTIONS)
        run(last(llm.generate(PROMPTS[0], GREEDY)))
        runner = engine_of(llm).runner
        parts = [weakref.ref(part) for part in (text_engine_of(llm), engine_of(llm), runner.model, runner.kv_cache)]
        del runner
        llm.close()
        llm.close(drain=True)
        assert [part() for part in parts] == [None] * len(parts)
        for method in (llm.stats, llm.reset_prefix_cache):
            with pytest.raises(RuntimeError, match="closed"):
                result = method()
                asyncio.run(result)

    def test_dropping_the_last_reference_ends_its_threads(self, text_model: Path) -> None:
        threads = threading.active_count()
        llm = AsyncLLM(str(text_model), **OPTIONS)
        run(last(llm.generate(PROMPTS[0], GREEDY)))
        part = text_engine_reference(llm)
        assert threading.active_count() > threads
        del llm
        gc.collect()
        deadline = time.monotonic() + TIMEOUT
        while threading.active_count() > threads and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() == threads and part() is None

    def test_interpreter_leaves_with_one_open(self, text_model: Path) -> None:
        code = (
            "import asyncio\nfrom nanovllm import AsyncLLM, SamplingParams\n"
            f"llm = AsyncLLM({str(text_model)!r}, **{OPTIONS!r})\n"
            "async def main():\n    async for o in llm.generate([1, 2], SamplingParams(max_tokens=50)):\n"
            "        break\n"
            "asyncio.run(main()); print('left')"
        )
        root = Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=TIMEOUT, check=True
        )
        assert done.stdout == "left\n" and "Traceback" not in done.stderr


def test_stress_of_500_requests_with_cancellations_in_a_tiny_cache(text_model: Path) -> None:
    """Readers come and go at random: those that stay get what LLM gives, and nothing is left of any."""
    rng = random.Random(1)
    prompts = random_prompts([rng.randrange(1, 60) for _ in range(40)], seed=8, vocab_size=256)
    prompts += [prompts[0][:40] + prompt[:10] for prompt in prompts[:20]]  # shared prefixes
    jobs = [
        (prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens))
        for prompt, max_tokens in [(rng.choice(prompts), rng.choice([1, 7, 20, 40])) for _ in range(500)]
    ]
    different = {repr(job): job for job in jobs}
    with LLM(str(text_model), **{**OPTIONS, "num_kvcache_blocks": 256, "max_num_seqs": 32}) as llm:
        asked = [list(column) for column in zip(*different.values(), strict=True)]
        known = dict(zip(different, llm.generate(*asked, use_tqdm=False), strict=True))
    counts = {"read": 0, "left": 0, "cancelled": 0, "aborted": 0}

    async def main() -> None:
        options = {**OPTIONS, "num_kvcache_blocks": 14, "max_num_batched_tokens": 48}
        async with AsyncLLM(str(text_model), max_waiting=50, **options) as llm:
            engine_of(llm).max_behind = 1

            async def read(i: int) -> None:
                prompt, params = jobs[i]
                mode = rng.choice(["read"] * 10 + ["left", "cancelled", "aborted", "aborted", "slow"])
                await asyncio.sleep(rng.random() * 2)
                output = None
                async for output in llm.generate(prompt, params, str(i)):
                    if mode == "left" and rng.random() < 0.2:
                        counts["left"] += 1
                        return
                    if mode == "aborted" and not output.finished:
                        await llm.abort(str(i))
                        counts["aborted"] += 1
                    if mode == "cancelled" and rng.random() < 0.2:
                        asyncio.current_task().cancel()
                    if mode == "slow":
                        await asyncio.sleep(rng.random() * 0.1)
                if output["finish_reason"] == "abort":
                    assert mode == "aborted"
                    full = known[repr(jobs[i])]["token_ids"]
                    assert full[: len(output["token_ids"])] == output["token_ids"]
                else:
                    assert same(output, known[repr(jobs[i])])
                    counts["read"] += 1

            async def canceller(tasks: list[asyncio.Task]) -> None:
                for _ in range(40):
                    await asyncio.sleep(rng.random() * 0.1)
                    rng.choice(tasks).cancel()

            tasks = [asyncio.create_task(read(i)) for i in range(500)]
            await canceller(tasks)
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert error is None or isinstance(error, asyncio.CancelledError)
                counts["cancelled"] += error is not None
            await llm.abort([])
            assert is_idle(llm)
            assert llm.stats().num_preemptions > 5 and llm.stats().evictions > 50

    threads = threading.active_count()
    run(main())
    assert threading.active_count() == threads
    assert counts["read"] > 250 and min(counts.values()) > 10, counts
