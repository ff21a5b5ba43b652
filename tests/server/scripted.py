"""A server in this process, whose model says what a test tells it: a text in pieces, and why it ends."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx
import openai
import uvicorn
from transformers import AutoTokenizer

from nanovllm import RequestOutput, SamplingParams, demo_model
from nanovllm.outputs import CompletionOutput, Logprob
from nanovllm.sampling_params import RequestOutputKind
from nanovllm.server.app import make_app
from nanovllm.server.launch import listen
from nanovllm.server.settings import Limits, ServerSettings
from nanovllm.text.chat import chat_prompt

TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool.function.name }}{{ '\\n' }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %} ({{ m.reasoning_content }}){% endif %}"
    " {{ m.content }}{% for c in m.tool_calls or [] %} {{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    "{% if enable_thinking is defined %} thinking={{ enable_thinking }}{% endif %}"
    "{% if reasoning_effort is defined %} effort={{ reasoning_effort }}{% endif %}"
)


class TextSide:
    """What endpoints ask of an engine besides tokens."""

    def __init__(self) -> None:
        self.config, self.max_num_seqs, self.all = SimpleNamespace(model="demo"), 16, []
        self.max_model_len = 200
        self.tokenizer = AutoTokenizer.from_pretrained(demo_model())

    async def get_tokenizer(self) -> Any:
        return self.tokenizer

    async def chat_prompt(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        return chat_prompt(self.tokenizer, messages, **options)

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.5)


class ScriptedServer:
    """Attributes:
    prompts, params: what the model was asked, in order.
    num_cached: tokens of each prompt that "came from the cache".
    """

    def __init__(self) -> None:
        self.settings = ServerSettings(
            served_model_names=["demo"], chat_template=TEMPLATE, reasoning_parser="qwen3", tool_call_parser="hermes",
            ping_interval_s=0.1, page=False, limits=Limits(stored_responses=8, stop_strings=2, tools=2),
        )  # fmt: skip
        app = make_app(TextSide(), self.settings)  # type: ignore[arg-type]
        app.state.server.run = self._run
        self.state = app.state.server
        listener = listen("127.0.0.1", 0)
        self.url = "http://{}:{}".format(*listener.getsockname())
        config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.anthropic = anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0)
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.num_cached = 3
        self.say("Hello.")

    def say(
        self,
        *pieces: str,
        end: str = "stop",
        because: str | int | None = None,
        pause_s: float = 0.0,
        failure: Exception | None = None,
    ) -> None:
        """Script all answers from now on.

        Args:
            pieces: each is the text of a token.
            end, because: `finish_reason` and `stop_reason`.
            pause_s: before the last piece.
            failure: raised in place of the last piece.
        """
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self._script = (pieces, end, because, pause_s, failure)

    async def _run(self, prompt: dict[str, Any], params: SamplingParams, request_id: str) -> AsyncIterator[Any]:
        pieces, end, because, pause_s, failure = self._script
        self.prompts.append(prompt["prompt"])
        self.params.append(params.clone())
        if params.output_kind is RequestOutputKind.FINAL_ONLY:
            if failure is not None:
                raise failure
            yield self._output(prompt, pieces, params, end, because)
            return
        for i, piece in enumerate(pieces):
            is_last = i == len(pieces) - 1
            if is_last:
                await asyncio.sleep(pause_s)
                if failure is not None:
                    raise failure
            yield self._output(prompt, (piece,), params, end if is_last else None, because if is_last else None)

    def _output(
        self, prompt: dict[str, Any], pieces: tuple[str, ...], params: SamplingParams, end: Any, because: Any
    ) -> RequestOutput:
        ids = list(range(len(pieces)))
        values = [{i: Logprob(-0.5, 1, piece)} for i, piece in zip(ids, pieces, strict=True)]
        completion = CompletionOutput(
            index=0, text="".join(pieces), token_ids=ids, finish_reason=end, stop_reason=because,
            logprobs=values if params.logprobs is not None else None,
        )  # fmt: skip
        return RequestOutput(
            request_id="", prompt=prompt["prompt"], prompt_token_ids=prompt["prompt_token_ids"], prompt_logprobs=None,
            outputs=[completion], finished=end is not None, num_cached_tokens=self.num_cached,
        )  # fmt: skip

    def close(self) -> None:
        for client in (self.openai, self.anthropic, self.http):
            client.close()
        self._server.should_exit = True
        self._thread.join()
