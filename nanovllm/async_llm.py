"""The asyncio front of the engine, for many callers at once: a server, or rollouts that come and go.

The engine runs in a thread of its own (`engine/engine_thread.py`), tokenizers in another; neither blocks the event
loop, which only builds the outputs that are taken. A reader who comes late gets one output for all that there is by
then: it holds nobody up, and costs no memory (`async_stream.py`).
"""

import asyncio
import gc
import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from uuid import uuid4

from nanovllm.async_stream import FairSemaphore, LoopWaker, Stream
from nanovllm.config import Config
from nanovllm.engine import weights_and_sleep
from nanovllm.engine.engine_thread import EngineThread
from nanovllm.engine.request import Request, is_last
from nanovllm.engine.stats import StepStats
from nanovllm.engine.text_engine import Prompt, TextEngine, as_request_ids, own_copy, own_params
from nanovllm.errors import EngineDeadError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.chat import chat_prompt
from nanovllm.vllm.methods import AsyncLLMMethods
from nanovllm.vllm_defaults import check_arguments


class AsyncLLM(AsyncLLMMethods):
    """A model with its engine, for asyncio.

        async with AsyncLLM("/path/to/Qwen3-0.6B") as llm:
            async for output in llm.generate("Hello", SamplingParams(max_tokens=64)):
                print(output.outputs[0].text)

    As a context manager it takes no more requests when the block is left, and lets those end that have begun, also the
    ones that still wait for their turn. When an exception leaves the block, it aborts them.

    Args:
        max_waiting: how many requests may wait for their first token; `generate` of further ones waits for its turn.
            None: any number.
        options: those of `nanovllm.config.Config`.

    Raises: as `LLM`.
    """

    def __init__(self, model: str | os.PathLike[str], *, max_waiting: int | None = None, **options: Any) -> None:
        if max_waiting is not None and (type(max_waiting) is not int or max_waiting < 1):
            raise ValueError(f"max_waiting={max_waiting!r} must be None or an integer >= 1")
        self._semaphore = FairSemaphore(max_waiting)
        self._is_closing = False
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="nanovllm-tokenizer")
        self._streams: dict[str, Stream] = {}
        self._waker: LoopWaker | None = None
        self._thread = EngineThread(TextEngine(Config.from_options(model, options)))
        # The threads know nothing of this object: dropping it, or leaving the interpreter, ends them.
        weakref.finalize(self, _shut_down, self._thread, self._tokenizing)
        try:
            self._thread.start()
        except BaseException:
            self.close()  # the error's traceback keeps it alive
            raise

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **vllm_arguments: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Complete a prompt: yields outputs with all that there is so far, the last with `finished`.

        With `output_kind=RequestOutputKind.DELTA` each has what is new since the one before, and of several
        completions only those of which something is; with FINAL_ONLY there is but the last.

        Leaving the loop early, closing the iterator or cancelling the task aborts the request.

        Args:
            prompt: a string, a list of token ids, `{"prompt": …}` or `{"prompt_token_ids": …}`.
            sampling_params: as they are at this call; None: see `get_default_sampling_params`.
            request_id: a name by which to abort it; default: a random one.
            vllm_arguments: vLLM's further ones (`lora_request`, …), where they ask for nothing: see `vllm_defaults`.

        Raises:
            TypeError, ValueError: the prompt cannot run, or a request of that id is running; or, at this call and not
                at the first output, the parameters are refused.
            RuntimeError: the engine failed under the request, which the `__cause__` explains.
            EngineDeadError: it is closed, or has failed for good.
        """
        check_arguments(AsyncLLM.generate, vllm_arguments)
        prompt = own_copy(prompt)
        params = None if sampling_params is None else own_params(sampling_params)
        return self._run(lambda: prompt, params, request_id)

    def chat(
        self,
        messages: list[dict[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **vllm_arguments: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Answer one conversation; the arguments are those of `LLM.chat`, the rest is as in `generate`."""
        messages, tools, chat_template_kwargs = map(own_copy, (messages, tools, chat_template_kwargs))

        def make_prompt() -> Prompt:
            return chat_prompt(
                self._text_engine.tokenizer,
                messages,
                chat_template=chat_template,
                chat_template_content_format=chat_template_content_format,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )

        check_arguments(AsyncLLM.chat, vllm_arguments)
        params = None if sampling_params is None else own_params(sampling_params)
        return self._run(make_prompt, params, request_id)

    async def _run(
        self, make_prompt: Callable[[], Prompt], params: SamplingParams | None, request_id: str | None
    ) -> AsyncIterator[RequestOutput]:
        request_id = uuid4().hex if request_id is None else request_id
        if not isinstance(request_id, str):
            raise TypeError(f"request_id={request_id!r:.80} must be a string or None")
        if self._is_closing:
            raise EngineDeadError("the engine is closed")
        self._thread.check()
        params = self.get_default_sampling_params() if params is None else params
        stream = Stream(self._waker_of_this_loop(), self._semaphore, params.output_kind)
        self._register(request_id, stream)
        request = None
        is_finished = False
        try:
            await self._semaphore.enter(stream)

            def make_request() -> Request:
                return self._text_engine.make_request(make_prompt(), params, request_id=request_id, is_streaming=True)

            request = await self._in_tokenizer_thread(make_request)
            stream.abandon = partial(self._thread.abort, request)
            self._thread.submit(request, stream.put)
            stream.has_entered.set_result(None)
            if stream.must_abort:
                self._thread.abort(request)
            while True:
                progress = await stream.take()
                is_finished = is_last(progress)
                output = request.output(progress)
                if is_finished:
                    break
                yield output
        finally:
            self._semaphore.leave(stream)
            stream.has_entered.cancel()
            if self._streams.get(request_id) is stream:
                del self._streams[request_id]
            if request is not None and not is_finished:
                self._thread.abort(request)
        yield output  # the last: nothing is left of the request, whether the reader comes back or not

    def _register(self, request_id: str, stream: Stream) -> None:
        """Raises ValueError if a request of that id is running for a reader who may still come."""
        other = self._streams.setdefault(request_id, stream)
        if other is stream:
            return
        if not other.is_abandoned:
            raise ValueError(f"request_id={request_id!r} is that of a request which is still running")
        self._semaphore.leave(other)
        other.has_entered.cancel()
        if other.abandon is not None:
            other.abandon()  # before the engine hears of the new one
        self._streams[request_id] = stream

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests before their time; their readers get a last output, which says so. Unknown ids are passed by.

        On return the requests' blocks are free.
        """
        ids = as_request_ids(request_id)
        for i in ids:
            if i in self._streams:
                self._streams[i].must_abort = True  # it may not have come to the engine yet
        await asyncio.wrap_future(self._thread.abort_ids(ids))

    async def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The token ids as which `generate` takes a prompt."""
        return (await self._in_tokenizer_thread(partial(self._text_engine.encode, prompt)))[1]

    async def get_tokenizer(self) -> Any:
        """The `transformers` tokenizer. Raises ValueError if the engine was made without one."""
        return self._text_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """As `LLM.get_default_sampling_params`."""
        return self._text_engine.default_sampling_params()

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As `LLM.reset_prefix_cache`."""
        await self._between_steps(lambda engine: engine.reset_prefix_cache(reset_running_requests))
        return True

    async def load_weights(self, named_tensors: Iterable[tuple[str, "torch.Tensor"]]) -> None:  # noqa: F821
        """As `LLM.load_weights`: requests must have ended."""
        await self._between_steps(weights_and_sleep.load_weights, named_tensors)

    async def sleep(self, level: int = 1) -> None:
        """As `LLM.sleep`: requests must have ended."""
        await self._between_steps(weights_and_sleep.sleep, level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """As `LLM.wake_up`."""
        await self._between_steps(weights_and_sleep.wake_up, tags)

    async def is_sleeping(self) -> bool:
        return self._text_engine.engine.runner.sleep_level > 0

    def stats(self) -> StepStats:
        """Counters since the engine started, and the state of its cache and queue. May be called in any thread."""
        return self._text_engine.engine.current_stats()

    @property
    def is_running(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_running and not self._is_closing

    @property
    def is_stopped(self) -> bool:
        """Whether it takes no requests: it was closed, or has failed for good."""
        return not self.is_running

    @property
    def errored(self) -> bool:
        """Whether it has failed for good. After a step that fails it serves the next request: see `generate`."""
        return self.dead_error is not None

    @property
    def dead_error(self) -> EngineDeadError | None:
        """What each request gets since the engine has failed for good; None if it has not."""
        return self._thread.error

    async def check_health(self) -> None:
        """Raises EngineDeadError if it takes no requests."""
        self._thread.check()

    def close(self, drain: bool = False) -> None:
        """Abort all requests, or with `drain` let those end that the engine has been given; then give the memory back.

        Blocks; may be called again.
        """
        if self._thread.is_elsewhere:
            return  # it is the parent's, and so are its threads
        self._is_closing = True
        _shut_down(self._thread, self._tokenizing, drain)
        self._tokenizing.shutdown()
        self._give_back()

    async def aclose(self, drain: bool = False) -> None:
        """`close` that does not block the event loop.

        With `drain` all requests come to their end whose iteration has begun, also those that wait for their turn.
        """
        if self._thread.is_elsewhere:
            return
        try:
            if drain:
                await asyncio.sleep(0)  # tasks that were made just before begin
            self._is_closing = True
            if drain:
                self._thread.end_pauses()  # with max_waiting, none who waits for its turn would ever come in
                for stream in list(self._streams.values()):
                    await stream.entered_or_gone()
            self._thread.close(drain)
            # shielded: others may wait for the same end
            await asyncio.shield(asyncio.wrap_future(self._thread.ended))
        except asyncio.CancelledError:
            self._thread.close()  # whoever would have waited for the requests does no longer
            raise
        self.close()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, error_type: type | None, *rest: object) -> None:
        await self.aclose(drain=error_type is None)

    @property
    def _text_engine(self) -> TextEngine:
        text_engine = self._thread.text_engine
        if text_engine is None:
            raise EngineDeadError("this AsyncLLM is closed")
        text_engine.engine.health.require_own_process()
        return text_engine

    def _waker_of_this_loop(self) -> LoopWaker:
        loop = asyncio.get_running_loop()
        if self._waker is None or self._waker.loop is not loop:
            self._waker = LoopWaker(loop)
        return self._waker

    async def _in_tokenizer_thread(self, function: Callable[[], Any]) -> Any:
        try:
            future = asyncio.get_running_loop().run_in_executor(self._tokenizing, function)
        except RuntimeError as error:
            raise EngineDeadError("the engine is closed") from error
        return await future

    async def _between_steps(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function(engine, *arguments)` in the engine's thread."""
        return await asyncio.wrap_future(self._thread.call(partial(function, self._text_engine.engine, *arguments)))

    def _give_back(self) -> None:
        text_engine, self._thread.text_engine = self._thread.text_engine, None
        if text_engine is None:
            return
        is_cuda = text_engine.engine.runner.is_cuda
        text_engine.engine.close()
        del text_engine
        gc.collect()
        if is_cuda:
            import torch

            torch.cuda.empty_cache()


def _shut_down(thread: EngineThread, tokenizing: ThreadPoolExecutor, drain: bool = False) -> None:
    if thread.is_elsewhere:
        return
    thread.close(drain)
    thread.join()
    tokenizing.shutdown(wait=False)
