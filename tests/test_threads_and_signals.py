"""Several threads, forked children, Ctrl-C twice, engines that are dead: each is told apart, and nothing is lost."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_prompts
from engine.simulated_engine import add_request, make_engine
from inside import (
    engine_of,
    pids_of_ranks,
    requests_in_thread,
    streams_open,
    submit_to_thread,
    text_engine_of,
    what_is_held,
)

from nanovllm import LLM, AsyncLLM, EngineDeadError, RankError, RequestOutputKind, SamplingParams
from nanovllm.outputs import RequestOutput

PROMPTS = random_prompts([5, 33, 1, 17], seed=5, vocab_size=256)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 40,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}
ROOT = Path(__file__).parents[1]
TIMEOUT = 60
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.fixture(scope="module")
def shared(text_model: Path) -> Iterator[tuple[LLM, list[list[int]]]]:
    """An engine, and what it answers undisturbed."""
    with LLM(str(text_model), **OPTIONS) as llm:
        yield llm, answers(llm)


def answers(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def is_idle(llm: LLM) -> bool:
    return not what_is_held(llm)


class Busy:
    """A thread that generates, and is held amid its third step for as long as the `with` lasts."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self.result = llm, None
        self._is_there, self._may_go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.result = answers(self._llm)

    def __enter__(self) -> None:
        runner, steps = self._llm.engine.runner, iter(range(2))

        def launch(plan: Any) -> Any:
            if next(steps, None) is None:
                del runner.launch
                self._is_there.set()
                assert self._may_go.wait(TIMEOUT)
            return runner.launch(plan)

        runner.launch = launch
        self._thread.start()
        assert self._is_there.wait(TIMEOUT)

    def __exit__(self, *exc_info: object) -> None:
        self._may_go.set()
        self._thread.join(TIMEOUT)


class TestThreads:
    def test_call_beside_another_is_refused_and_the_other_goes_on_unharmed(
        self, shared: tuple[LLM, list[list[int]]]
    ) -> None:
        llm, expected = shared
        stream = llm.stream(PROMPTS[0], LONG)
        begun = next(stream).outputs[0].token_ids
        busy = Busy(llm)
        with busy:
            for call in (
                lambda: answers(llm),
                lambda: llm.chat([{"role": "user", "content": "Hi"}], GREEDY, False, chat_template=TEMPLATE),
                lambda: llm.log_likelihood(PROMPTS, use_tqdm=False),
                lambda: llm.stream(PROMPTS[0], GREEDY),
                lambda: next(stream),
                lambda: llm.abort("0"),
                lambda: llm.encode_prompt("Hi"),
                lambda: llm.load_weights([]),
                lambda: llm.sleep(),
                lambda: llm.wake_up(),
                lambda: llm.reset_prefix_cache(),
                lambda: llm.collective_rpc("reload_weights"),
                lambda: llm.apply_model(id),
                lambda: llm.llm_engine.step(),
                lambda: llm.llm_engine.add_request("a", PROMPTS[0], GREEDY),
                lambda: llm.close(),
            ):
                with pytest.raises(RuntimeError, match="another thread is in a call.*AsyncLLM"):
                    call()
            assert llm.stats().num_running == 5
            llm.check_health()
        assert busy.result == expected
        parts = list(stream)
        assert parts[0].outputs[0].token_ids[:1] == begun and parts[-1].outputs[0].finish_reason == "length"
        assert answers(llm) == expected and is_idle(llm)

    def test_threads_may_take_turns(self, shared: tuple[LLM, list[list[int]]]) -> None:
        llm, expected = shared
        stream = llm.stream(PROMPTS[1], LONG)
        results: list[Any] = [next(stream)]

        def turn() -> None:
            results.append(answers(llm))
            results.append(next(stream))

        for _ in range(3):
            thread = threading.Thread(target=turn)
            thread.start()
            thread.join(TIMEOUT)
        assert results[1::2] == [expected] * 3
        assert list(stream)[-1].outputs[0].token_ids[:12] == expected[1] and is_idle(llm)

    def test_stream_that_is_left_in_another_thread_ends_before_the_next_step(
        self, shared: tuple[LLM, list[list[int]]]
    ) -> None:
        llm, expected = shared
        closed, dropped = llm.stream(PROMPTS[0], LONG), llm.stream(PROMPTS[1], LONG)
        next(closed), next(dropped)
        busy = Busy(llm)
        with busy:
            closed.close()
            del dropped
            assert llm.stats().num_running == 6
        assert busy.result == expected and is_idle(llm)
        assert list(closed) == []

    def test_garbage_collected_amid_a_step_changes_nothing_before_its_end(
        self, shared: tuple[LLM, list[list[int]]]
    ) -> None:
        llm, expected = shared
        cycle: list[Any] = [llm.stream(PROMPTS[0], LONG)]
        next(cycle[0])
        cycle.append(cycle)
        schedule, seen = llm.engine.scheduler.schedule, []

        def collect() -> Any:
            del llm.engine.scheduler.schedule
            seen.append(llm.stats().num_waiting + llm.stats().num_running)
            gc.collect()
            seen.append(llm.stats().num_waiting + llm.stats().num_running)
            return schedule()

        llm.engine.scheduler.schedule = collect
        del cycle
        assert answers(llm) == expected
        assert seen[0] == seen[1] and is_idle(llm)

    def test_call_from_within_a_call_is_refused_and_stats_are_not(
        self, shared: tuple[LLM, list[list[int]]], text_model: Path
    ) -> None:
        llm, expected = shared
        weights = dict(llm.engine.runner.model.named_parameters())
        name = next(name for name in weights if name.endswith("norm.weight"))

        def tensors(call: Callable[[], Any]) -> Iterator[tuple[str, torch.Tensor]]:
            call()
            yield "model.norm.weight", weights["model.norm.weight"].clone()

        assert name
        llm.load_weights(tensors(llm.stats))
        with pytest.raises(RuntimeError, match="this thread is in a call of this LLM already.*load_weights"):
            llm.load_weights(tensors(lambda: llm.generate(PROMPTS, use_tqdm=False)))
        assert answers(llm) == expected and is_idle(llm)


SCRIPT = """
import asyncio, gc, multiprocessing, os, random, signal, sys, threading, time
from nanovllm import LLM, AsyncLLM, EngineDeadError, SamplingParams
path, options = {path!r}, {options!r}
llm = LLM(path, **options)
def answer():
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    return llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs[0].token_ids
"""


def run_script(model: Path, code: str, how: str = "-c", **options: Any) -> Any:
    """A program of the user's that has an `llm`, and no `if __name__ == "__main__":`."""
    lines = code.strip("\n").split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    program = SCRIPT.format(path=str(model), options={**OPTIONS, **options})
    program += "\n".join(line[indent:] for line in lines)
    return subprocess.run(
        [sys.executable, how, *([program] if how == "-c" else [])],
        input=program if how == "-" else None,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
class TestPrograms:
    """Several promises each, since a program takes seconds to import PyTorch."""

    def test_from_a_pipe_has_ranks_which_its_forked_children_leave_alone(self, text_model: Path) -> None:
        done = run_script(
            text_model,
            """
            other = AsyncLLM(path, **{**options, "tensor_parallel_size": 1})
            async def last():
                return [o async for o in other.generate([1, 2, 3], SamplingParams(max_tokens=5))][-1]
            def in_child(end):
                global llm, other
                assert other.errored and not other.is_running
                calls = [answer, llm.sleep, llm.reset_prefix_cache, lambda: llm.abort("a"), llm.check_health]
                calls += [last, other.sleep, other.check_health, lambda: other.encode_prompt("Hi")]
                for call in calls:
                    try:
                        asyncio.run(call())
                    except EngineDeadError as error:
                        assert "forked" in str(error)
                    else:
                        os._exit(9)
                if end == "close":
                    for _ in range(2):
                        llm.close()
                        other.close()
                        asyncio.run(other.aclose())
                if end == "drop":
                    llm = other = None
                    gc.collect()
            def work():
                global llm
                llm = LLM(path, **options)
                sys.exit(6 if answer() == before else 4)
            before = answer()
            for end in ("exit", "close", "drop"):
                pid = os.fork()
                if not pid:
                    signal.alarm(10)
                    in_child(end)
                    sys.exit(5)  # with all that the interpreter does at its end
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5, end
                assert answer() == before
            # Of multiprocessing's one may be daemonic, as a Pool's are, and have ranks of its own.
            for target, args, code in ((in_child, ("drop",), 0), (work, (), 6)):
                child = multiprocessing.get_context("fork").Process(target=target, args=args, daemon=True)
                child.start()
                child.join(30)
                assert child.exitcode == code
            assert answer() == before and asyncio.run(last()).finished
            other.close()
            llm.close()
            print("whole")
            """,
            how="-",
            tensor_parallel_size=2,
        )
        assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr
        assert "Traceback" not in done.stderr

    def test_interrupted_twice_goes_on_and_leaves_while_a_daemon_thread_generates(self, text_model: Path) -> None:
        done = run_script(
            text_model,
            """
            prompts = [[i + 1] * (3 + 5 * i) for i in range(5)]
            params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop="no such text")
            def answers():
                return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
            expected, draw, num_hit = answers(), random.Random(0), 0
            start = time.monotonic()
            answers()
            usual = time.monotonic() - start
            def interrupt(*delays):
                for delay in delays:
                    time.sleep(delay)
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            def attempt():
                try:
                    stream = llm.stream(prompts[:2], params)
                    next(stream)
                    answers()
                except KeyboardInterrupt:
                    return 1
                return 0
            for _ in range(40):
                thread = threading.Thread(target=interrupt, args=(draw.uniform(0, usual), draw.choice([0, 1e-4, 1e-3])))
                is_over = False
                while not is_over:
                    try:
                        if not thread.ident:
                            thread.start()
                        num_hit += attempt()
                        thread.join()
                        is_over = True
                    except KeyboardInterrupt:
                        num_hit += 1
                assert answers() == expected
                stats = llm.stats()
                assert (stats.cache_usage, stats.num_running, stats.num_waiting) == (0.0, 0, 0)
            assert num_hit >= 40
            started = threading.Event()
            def loop():
                while True:
                    answers()
                    started.set()
            threading.Thread(target=loop, daemon=True).start()
            started.wait()
            print("left")
            """,
        )
        assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr

    def test_may_close_the_engine_in_a_signals_handler_amid_a_step(self, text_model: Path) -> None:
        done = run_script(
            text_model,
            """
            def end(*_):
                llm.close()
                sys.exit(3)
            signal.signal(signal.SIGTERM, end)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            while True:
                answer()
            """,
            tensor_parallel_size=2,
        )
        assert (done.returncode, done.stderr) == (3, "")


class TestHealth:
    def test_device_that_has_failed_for_good_is_said_at_once_and_a_step_that_failed_is_not_that(self) -> None:
        engine = make_engine(20, 4, max_num_seqs=4, max_num_batched_tokens=16)
        engine.check_health()
        engine.runner.fail_next = True
        add_request(engine, [1, 2, 3], GREEDY)
        with pytest.raises(RuntimeError, match="injected"):
            engine.step()
        engine.check_health()
        assert engine.error is None
        add_request(engine, [1, 2, 3], GREEDY)
        engine.runner.is_lost = True
        with pytest.raises(EngineDeadError, match=ILLEGAL) as caught:
            engine.step()
        assert ILLEGAL in str(caught.value.__cause__) and not engine.has_unfinished_requests
        steps, engine.runner.launch = engine.stats.num_steps, None
        for call in (engine.check_health, lambda: add_request(engine, [1, 2, 3], GREEDY)):
            with pytest.raises(EngineDeadError, match=ILLEGAL):
                call()
        assert engine.stats.num_steps == steps

    def test_of_llm_is_its_engines(self, text_model: Path) -> None:
        llm = LLM(str(text_model), **OPTIONS)
        break_device(llm.engine)
        with pytest.raises(EngineDeadError, match=ILLEGAL):
            answers(llm)
        for call in (llm.check_health, lambda: answers(llm), lambda: llm.stream(PROMPTS, GREEDY)):
            with pytest.raises(EngineDeadError, match=ILLEGAL):
                call()
        llm.close()
        with pytest.raises(EngineDeadError, match="closed"):
            llm.check_health()

    def test_of_async_llm_is_its_engines(self, text_model: Path) -> None:
        async def main() -> None:
            async with AsyncLLM(str(text_model), **OPTIONS) as llm:
                await llm.check_health()
                assert llm.is_running and not llm.is_stopped and not llm.errored and llm.dead_error is None
                break_device(engine_of(llm))
                ends = await asyncio.gather(*[last(llm.generate(p, LONG)) for p in PROMPTS], return_exceptions=True)
                for end in ends:
                    assert isinstance(end, EngineDeadError) and ILLEGAL in str(end)
                assert not llm.is_running and llm.is_stopped and llm.errored
                assert isinstance(llm.dead_error, EngineDeadError)
                steps = llm.stats().num_steps
                for call in (llm.check_health(), last(llm.generate(PROMPTS[0], GREEDY))):
                    with pytest.raises(EngineDeadError, match=ILLEGAL):
                        await call
                assert llm.stats().num_steps == steps
            assert not llm.is_running and not llm.errored  # it was closed
            with pytest.raises(EngineDeadError, match="closed"):
                await llm.check_health()

        asyncio.run(main())

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_rank_lost_while_nobody_calls_is_seen(self, text_model: Path, nothing_is_left: None) -> None:
        async def main() -> None:
            llm = AsyncLLM(str(text_model), tensor_parallel_size=2, **OPTIONS)
            os.kill(pids_of_ranks(llm)[0], signal.SIGKILL)
            deadline = time.monotonic() + 10
            while llm.is_running and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert llm.errored and isinstance(llm.dead_error, RankError)
            for call in (llm.check_health(), last(llm.generate(PROMPTS[0], GREEDY)), llm.sleep()):
                with pytest.raises(RankError, match="was killed by signal 9"):
                    await call
            await llm.aclose()

        asyncio.run(main())


def break_device(engine: Any) -> None:
    """From the third step on all that it is asked to do fails."""

    def fail(*args: Any) -> None:
        raise RuntimeError(ILLEGAL)

    launch, steps = engine.runner.launch, iter(range(2))

    def launch_twice(plan: Any) -> Any:
        if next(steps, None) is None:
            engine.runner.check_device = fail
            fail()
        return launch(plan)

    engine.runner.launch = launch_twice


async def last(outputs: Any) -> RequestOutput:
    return [output async for output in outputs][-1]


class TestAsync:
    def test_id_of_a_request_whose_loop_was_closed_is_free_again(self, text_model: Path) -> None:
        with LLM(str(text_model), **OPTIONS) as other:
            expected = other.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        llm = AsyncLLM(str(text_model), **OPTIONS)
        for params in (LONG, SamplingParams(temperature=0.0, max_tokens=150, output_kind=RequestOutputKind.FINAL_ONLY)):
            loop = asyncio.new_event_loop()
            reader = llm.generate(PROMPTS[0], params, "a")
            task = loop.create_task(anext(reader))
            while not requests_in_thread(llm):
                loop.run_until_complete(asyncio.sleep(0.001))
            loop.close()  # over the request; its generator is alive, and is never told
            assert asyncio.run(last(llm.generate(PROMPTS[1], GREEDY, "a"))).outputs[0].token_ids == expected
            assert not streams_open(llm) and not requests_in_thread(llm)
            task._log_destroy_pending = False
            del reader, task
        llm.close()

    def test_request_whose_loop_was_closed_is_ended_soon(self, text_model: Path) -> None:
        llm = AsyncLLM(str(text_model), **OPTIONS)
        loop = asyncio.new_event_loop()
        reader = llm.generate(PROMPTS[0], LONG)
        loop.run_until_complete(anext(reader))
        loop.close()
        deadline = time.monotonic() + TIMEOUT
        while engine_of(llm).has_unfinished_requests and time.monotonic() < deadline:
            time.sleep(0.001)
        assert llm.stats().num_decode_tokens < 140 and llm.stats().cache_usage == 0.0
        llm.close()

    def test_listener_that_raises_loses_its_request_and_nobody_elses(self, text_model: Path) -> None:
        llm = AsyncLLM(str(text_model), **OPTIONS)

        def bad(item: Any) -> None:
            raise ZeroDivisionError

        async def main() -> RequestOutput:
            for prompt in PROMPTS:
                request = text_engine_of(llm).make_request(prompt, LONG, request_id=None, is_streaming=True)
                submit_to_thread(llm, request, bad)
            output = await last(llm.generate(PROMPTS[0], GREEDY))
            await llm.abort("nobody")
            return output

        assert asyncio.run(main()).outputs[0].finish_reason == "length"
        assert llm.is_running and llm.stats().cache_usage == 0.0 and not requests_in_thread(llm)
        llm.close()

    def test_two_engines_side_by_side(self, text_model: Path) -> None:
        async def main() -> list[RequestOutput]:
            async with AsyncLLM(str(text_model), **OPTIONS) as one, AsyncLLM(str(text_model), **OPTIONS) as two:
                return await asyncio.gather(
                    *[last(e.generate(p, GREEDY, "a")) for p in PROMPTS[:1] for e in (one, two)]
                )

        one, two = asyncio.run(main())
        assert one.outputs[0].token_ids == two.outputs[0].token_ids

    def test_construction_that_is_interrupted_leaves_no_thread_and_no_rank(
        self, text_model: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_left: None
    ) -> None:
        threads = threading.active_count()

        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        for place in (
            "nanovllm.engine.engine_thread.EngineThread.start",
            "nanovllm.engine.text_engine.TokenDecoder",
        ):
            with monkeypatch.context() as patch:
                patch.setattr(place, interrupt)
                with pytest.raises(KeyboardInterrupt) as caught:  # whose traceback keeps what there was
                    AsyncLLM(str(text_model), tensor_parallel_size=2, **OPTIONS)
                assert threading.active_count() == threads, place
                del caught
