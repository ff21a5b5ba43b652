"""vLLM's `AsyncLLM`: made of EngineArgs, paused, and asked about itself."""

import asyncio
import time
from pathlib import Path

import pytest

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.vllm import AsyncEngineArgs, AsyncLLMEngine

LONG = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)


@pytest.fixture
def args(text_model: Path) -> AsyncEngineArgs:
    return AsyncEngineArgs(
        model=str(text_model), dtype="float32", skip_tokenizer_init=True, block_size=16, num_gpu_blocks_override=64
    )


async def run(llm: AsyncLLM, request_id: str, times: list[float] | None = None) -> tuple[list[int], str | None]:
    async for output in llm.generate([65, 66], LONG, request_id):
        last = output.outputs[0]
        if times is not None:
            times.append(time.monotonic())
    return last.token_ids, last.finish_reason


async def until(times: list[float], count: int) -> None:
    while len(times) < count:
        await asyncio.sleep(0.001)


def test_it_is_made_of_engine_args_and_says_what_it_is(args: AsyncEngineArgs) -> None:
    async def main() -> None:
        engine = AsyncLLMEngine.from_engine_args(args, usage_context=None)
        try:
            assert engine.model_config.max_model_len == 320
            assert (await engine.get_vllm_config()).cache_config.num_gpu_blocks == 64
            assert await engine.is_tracing_enabled() is False and await engine.do_log_stats() is None
            assert await engine.collective_rpc(lambda worker: worker.rank) == [0]
            assert await engine.reset_prefix_cache() is True
            assert not await engine.is_sleeping()
        finally:
            engine.shutdown()
        with pytest.raises(NotImplementedError, match="stat_loggers"):
            AsyncLLM.from_engine_args(args, stat_loggers=[object])

    asyncio.run(main())


def test_kept_requests_stand_still_and_go_on_where_they_were(args: AsyncEngineArgs) -> None:
    async def main() -> None:
        async with AsyncLLM.from_engine_args(args) as llm:
            expected = await run(llm, "alone")
            times: list[float] = []
            task = asyncio.create_task(run(llm, "kept", times))
            await until(times, 5)
            await llm.pause_generation(mode="keep")
            assert await llm.is_paused()
            await asyncio.sleep(0.05)  # what had come by then is read
            count = len(times)
            late = asyncio.create_task(run(llm, "late"))
            await asyncio.sleep(0.2)
            assert len(times) == count < 60 and not late.done()
            await llm.resume_generation()
            assert await task == await late == expected
            assert llm.stats().num_preemptions >= 1  # its cache was forgotten with the others'

    asyncio.run(main())


def test_a_pause_ends_requests_or_lets_them_end(args: AsyncEngineArgs) -> None:
    async def main() -> None:
        async with AsyncLLM.from_engine_args(args) as llm:
            times: list[float] = []
            task = asyncio.create_task(run(llm, "aborted", times))
            await until(times, 1)
            await llm.pause_generation()
            assert (await task)[1] == "abort"
            await llm.resume_generation()
            times = []
            task = asyncio.create_task(run(llm, "waited for", times))
            await until(times, 1)
            await llm.pause_generation(mode="wait")
            assert task.done() and task.result()[1] == "length"
            with pytest.raises(ValueError, match="mode='stop'"):
                await llm.pause_generation(mode="stop")

    asyncio.run(main())


def test_a_reader_may_wait_for_its_own_request_to_end(args: AsyncEngineArgs) -> None:
    async def main() -> None:
        async with AsyncLLM.from_engine_args(args) as llm:
            outputs = llm.generate([65, 66], LONG)
            await anext(outputs)
            await asyncio.wait_for(llm.pause_generation(mode="wait"), timeout=10)
            assert (await anext(outputs)).finished

    asyncio.run(main())


@pytest.mark.parametrize("max_waiting", [None, 1])
def test_a_paused_engine_can_be_closed_and_drained(args: AsyncEngineArgs, max_waiting: int | None) -> None:
    async def main() -> None:
        llm = AsyncLLM(**args.given(), max_waiting=max_waiting)
        times: list[float] = []
        tasks = [asyncio.create_task(run(llm, "a", times))]
        await until(times, 1)
        await llm.pause_generation(mode="keep")
        tasks += [asyncio.create_task(run(llm, request_id)) for request_id in ("b", "c")]
        await asyncio.sleep(0.05)
        await asyncio.wait_for(llm.aclose(drain=True), timeout=60)
        assert [reason for _, reason in await asyncio.gather(*tasks)] == ["length"] * 3

    asyncio.run(main())
