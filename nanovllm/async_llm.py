"""The asyncio front, for many callers at once: a server, or rollouts that start and end at any time.

The engine runs in its own thread (`engine/engine_thread.py`), and the tokenizer in another. Neither blocks the event
loop, which only builds the outputs that readers take. A slow reader gets one output for all tokens that it has missed:
it delays no other request, and costs no memory (`async_stream.py`).
"""

import asyncio
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
from nanovllm.engine.prompts import Prompt, as_request_ids, copy_containers, copy_params
from nanovllm.engine.request import Request, is_last
from nanovllm.engine.stats import StepStats
from nanovllm.engine.text_engine import TextEngine, free_device_memory
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

    At the end of the block it takes no more requests, and finishes those that have begun, including those that wait
    for their turn. If an exception ends the block, it aborts them.

    Args:
        max_waiting: this many requests may wait for their first token; `generate` of a further one waits for its turn.
            None: any number.
        options: see `nanovllm.config.Config`.

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
        # The threads hold no reference to this object: they end when it is dropped, or the interpreter ends.
        weakref.finalize(self, _shut_down, self._thread, self._tokenizing)
        try:
            self._thread.start()
        except BaseException:
            self.close()  # dropping it is not enough: the error's traceback holds it
            raise

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **vllm_arguments: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Complete a prompt. Yields outputs with all tokens so far; the last has `finished` set.

        `output_kind=RequestOutputKind.DELTA`: an output has only what is new, and only the completions that have
        something new. FINAL_ONLY: only the last output comes.

        Leaving the loop early, closing the iterator or cancelling the task aborts the request.

        Args:
            prompt: a string, a list of token ids, `{"prompt": …}` or `{"prompt_token_ids": …}`.
            sampling_params: copied at this call; None: see `get_default_sampling_params`.
            request_id: for `abort`; None: a random one.
            vllm_arguments: vLLM's further arguments (`lora_request`, …), if they ask for nothing: see `vllm_defaults`.

        Raises:
            TypeError, ValueError: the prompt cannot run, or a running request has this id. Refused parameters raise at
                this call, not at the first output.
            RuntimeError: the engine failed during the request; `__cause__` is the failure.
            EngineDeadError: the engine is closed, or has failed for good.
        """
        check_arguments(AsyncLLM.generate, vllm_arguments)
        prompt = copy_containers(prompt)
        params = None if sampling_params is None else copy_params(sampling_params)
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
        """Answer one conversation. The arguments are those of `LLM.chat`; the rest is as in `generate`."""
        messages, tools, chat_template_kwargs = map(copy_containers, (messages, tools, chat_template_kwargs))

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
        params = None if sampling_params is None else copy_params(sampling_params)
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
        yield output  # the last, after the cleanup: the reader may never resume this generator

    def _register(self, request_id: str, stream: Stream) -> None:
        """Raises ValueError if a request with this id is running, unless its event loop was closed."""
        other = self._streams.setdefault(request_id, stream)
        if other is stream:
            return
        if not other.is_abandoned:
            raise ValueError(f"request_id={request_id!r} is that of a request which is still running")
        self._semaphore.leave(other)
        other.has_entered.cancel()
        if other.abandon is not None:
            other.abandon()  # the engine aborts it before it gets the new one
        self._streams[request_id] = stream

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests early. Their readers get a last output with finish_reason "abort". Ignores unknown ids.

        When this returns, the requests' blocks are free.
        """
        ids = as_request_ids(request_id)
        for i in ids:
            if i in self._streams:
                self._streams[i].must_abort = True  # the engine may not have it yet
        await asyncio.wrap_future(self._thread.abort_ids(ids))

    async def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, as `generate` makes them."""
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
        """As `LLM.load_weights`: all requests must have ended."""
        await self._between_steps(weights_and_sleep.load_weights, named_tensors)

    async def sleep(self, level: int = 1) -> None:
        """As `LLM.sleep`: all requests must have ended."""
        await self._between_steps(weights_and_sleep.sleep, level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """As `LLM.wake_up`."""
        await self._between_steps(weights_and_sleep.wake_up, tags)

    async def is_sleeping(self) -> bool:
        return self._text_engine.engine.runner.sleep_level > 0

    def stats(self) -> StepStats:
        """Counters since the engine started, and the state of its cache and queue. Any thread may call this."""
        return self._text_engine.engine.current_stats()

    @property
    def is_running(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.is_running and not self._is_closing

    @property
    def is_stopped(self) -> bool:
        """Whether the engine takes no requests: it was closed, or has failed for good."""
        return not self.is_running

    @property
    def errored(self) -> bool:
        """Whether the engine has failed for good. After a failed step it still serves the next request."""
        return self.dead_error is not None

    @property
    def dead_error(self) -> EngineDeadError | None:
        """The error that every request raises once the engine has failed for good; None if it has not."""
        return self._thread.error

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine takes no requests."""
        self._thread.check()

    def close(self, drain: bool = False) -> None:
        """Abort all requests, or with `drain` finish those that the engine has; then give the memory back.

        It blocks. You may call it again.
        """
        if self._thread.is_in_forked_child:
            return  # engine and threads are the parent's
        self._is_closing = True
        _shut_down(self._thread, self._tokenizing, drain)
        self._tokenizing.shutdown()
        self._give_back()

    async def aclose(self, drain: bool = False) -> None:
        """`close` without blocking the event loop.

        With `drain` it finishes every request whose iteration has begun, including those that wait for their turn.
        """
        if self._thread.is_in_forked_child:
            return
        try:
            if drain:
                await asyncio.sleep(0)  # lets tasks that were just created begin
            self._is_closing = True
            if drain:
                self._thread.end_pauses()  # in a pause, waiting requests would never get their turn
                for stream in list(self._streams.values()):
                    await stream.entered_or_gone()
            self._thread.close(drain)
            # shielded, since other tasks may wait for the same future
            await asyncio.shield(asyncio.wrap_future(self._thread.ended))
        except asyncio.CancelledError:
            self._thread.close()  # this task no longer waits for the requests: abort them
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
        free_device_memory(is_cuda)


def _shut_down(thread: EngineThread, tokenizing: ThreadPoolExecutor, drain: bool = False) -> None:
    if thread.is_in_forked_child:
        return
    thread.close(drain)
    thread.join()
    tokenizing.shutdown(wait=False)
