"""N engines of one model, each in a process of its own, behind the methods of `AsyncLLM` that a server needs."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self, TypeVar

from nanovllm.config import Config
from nanovllm.engine.prompts import Prompt, text_and_ids, truncated
from nanovllm.errors import EngineDeadError
from nanovllm.models.model_path import resolve_model_path
from nanovllm.remote.affinity import PrefixAffinity
from nanovllm.remote.devices import devices_of_engines
from nanovllm.remote.engine import RemoteEngine
from nanovllm.remote.messages import Orders
from nanovllm.remote.request import RemoteRequest
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.chat import chat_prompt
from nanovllm.text.token_decoder import TokenDecoder
from nanovllm.text.tokenizer import load_tokenizer

T = TypeVar("T")


class Engines:
    """The engines and their tokenizer.

        async with Engines("/path/to/Qwen3-0.6B", {}, size=2) as llm:
            request = await llm.submit("Hello", SamplingParams(max_tokens=64), "1")
            while not (output := await request.next_output()).finished:
                print(output.outputs[0].text)

    The block begins when all engines serve, and ends them. All of it is of one event loop. Prompts become token ids
    here, in a thread; everything else about a request is checked in its engine.

    Args:
        options: of each engine, see `nanovllm.config.Config`.

    Raises: in the constructor as `Config`; on entry as `AsyncLLM`, or ChildProcessError.
    """

    def __init__(self, model: str, options: dict[str, Any], size: int = 1, log_level: int = 0) -> None:
        if type(size) is not int or size < 1:
            raise ValueError(f"data_parallel_size={size!r} must be an integer >= 1")
        self.config = Config.from_options(model, options)
        self._path = str(resolve_model_path(self.config.model, self.config.revision))
        self._tokenizer: Any = None
        self._decoder: TokenDecoder | None = None
        devices = devices_of_engines(size, options)
        self.all = [RemoteEngine(Orders(i, model, options, log_level), devices[i]) for i in range(size)]
        self._affinity: PrefixAffinity | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="nanovllm-tokenizer")

    async def __aenter__(self) -> Self:
        self._keepers = [asyncio.ensure_future(engine.keep()) for engine in self.all]
        ready = asyncio.ensure_future(self._wait_until_ready())
        try:
            if not self.config.skip_tokenizer_init:  # which takes seconds, as do the engines
                self._tokenizer = await self._in_tokenizer_thread(partial(load_tokenizer, self.config, self._path))
                self._decoder = TokenDecoder(self._tokenizer)
            await asyncio.wait({ready, *self._keepers}, return_when=asyncio.FIRST_COMPLETED)
            for keeper in self._keepers:
                if keeper.done():
                    keeper.result()
        except BaseException:
            await self.__aexit__()
            raise
        finally:
            ready.cancel()
        facts = self.all[0].facts
        self.max_model_len, self._default_sampling = facts.shape.max_model_len, facts.default_sampling
        if len(self.all) > 1:
            self._affinity = PrefixAffinity(facts.shape.block_size)
        return self

    async def __aexit__(self, *_: object) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)  # the first error is raised already
        for engine in self.all:
            if engine.process is not None:  # a keeper that was cancelled while it waited for its end did not
                await asyncio.to_thread(engine.process.wait)
        self._tokenizing.shutdown(wait=False)

    async def _wait_until_ready(self) -> None:
        for engine in self.all:
            await engine.is_ready.wait()

    async def submit(self, prompt: Prompt, params: SamplingParams, request_id: str) -> RemoteRequest:
        """Run a prompt; `leave` it if its reader leaves. What is wrong with it, `next_output` raises.

        Raises TypeError or ValueError if it is no prompt, EngineDeadError if no engine serves.
        """
        arrival_time = time.monotonic()
        text, token_ids = await self._in_tokenizer_thread(partial(self._encode, prompt))
        token_ids = truncated(token_ids, params, self.max_model_len)
        loads = [None if engine.facts is None else engine.num_requests for engine in self.all]
        if self._affinity is not None:
            index = self._affinity.choose(token_ids, loads)
        else:
            index = None if loads[0] is None else 0
        if index is None:
            raise EngineDeadError("no engine serves")
        return self.all[index].add(text, token_ids, params, request_id, arrival_time, self._decoder)

    def leave(self, request: RemoteRequest) -> None:
        """Abort a request, unless it is finished."""
        self.all[request.engine_index].leave(request)

    async def encode_prompt(self, prompt: Prompt) -> list[int]:
        """As `AsyncLLM.encode_prompt`."""
        return (await self._in_tokenizer_thread(partial(self._encode, prompt)))[1]

    async def chat_prompt(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """The prompt of a conversation, with its text and token ids: see `nanovllm.text.chat.chat_prompt`."""
        return await self._in_tokenizer_thread(partial(chat_prompt, self.tokenizer, messages, **options))

    async def get_tokenizer(self) -> Any:
        """As `AsyncLLM.get_tokenizer`."""
        return self.tokenizer

    @property
    def max_num_seqs(self) -> int:
        """How many completions all engines run at once."""
        return len(self.all) * self.config.max_num_seqs

    @property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer. Raises ValueError if the engine was made without one."""
        if self._tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: this engine has no tokenizer; give token ids")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """As `AsyncLLM.get_default_sampling_params`."""
        return SamplingParams(**self._default_sampling)

    async def check_health(self) -> None:
        """Raises EngineDeadError if no engine serves."""
        if all(engine.facts is None for engine in self.all):
            raise EngineDeadError("no engine serves")

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text, token_ids = text_and_ids(prompt, "prompt")
        return text, self.tokenizer.encode(text) if token_ids is None else token_ids

    async def _in_tokenizer_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function)
