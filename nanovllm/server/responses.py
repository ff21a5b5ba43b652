"""/v1/responses: items in, items out, as OpenAI and the Open Responses specification have it."""

import asyncio
from collections.abc import AsyncGenerator
from itertools import count
from typing import Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from nanovllm.outputs import CompletionOutput
from nanovllm.server.calls import respond_to
from nanovllm.server.conversation import Conversation, answer, prompt_of, stream_answer
from nanovllm.server.errors import ApiError, as_api_error, error_body
from nanovllm.server.response_context import (
    Items,
    chat_tool,
    chat_tool_choice,
    items_of,
    latest_that_fit,
    messages_of,
    template_of,
)
from nanovllm.server.response_fields import ResponseFields, echo, params
from nanovllm.server.response_items import OutputItems, pieces_of
from nanovllm.server.response_store import ResponseStore, StoredResponse
from nanovllm.server.sse import DONE, event
from nanovllm.server.state import ServerState, state_of
from nanovllm.server.token_logprobs import token_logprobs
from nanovllm.server.usage import Usage

router = APIRouter()


@router.post("/v1/responses", response_model=None)
async def create_response(fields: ResponseFields, request: Request) -> Response:
    """Answer items, and those of an earlier response before them."""
    state = state_of(request)
    state.check_model(fields.model)
    return await respond_to(request, _Call(fields, state, store_of(request)), fields.stream)


@router.get("/v1/responses/{response_id}")
async def get_response(response_id: str, request: Request, stream: Literal["false"] = "false") -> dict[str, Any]:
    """A response that is stored. It does not stream a second time."""
    return store_of(request).get(response_id).body


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> dict[str, Any]:
    """Forget a response. Those that go on from it stay."""
    store_of(request).delete(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    request: Request,
    after: str | None = None,
    limit: int = Query(default=20, ge=1, le=100),
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """A page of the items that a stored response was made from, those of earlier responses too."""
    items = store_of(request).get(response_id).input_items
    items = items if order == "asc" else items[::-1]
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise ApiError(404, f"after={after!r:.100} is the id of none of the items", "after")
    begin = 0 if after is None else ids.index(after) + 1
    page = items[begin : begin + limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, **ends, "has_more": begin + limit < len(items)}


def store_of(request: Request) -> ResponseStore:
    return request.app.state.responses


class _Call:
    """One request to the endpoint, and its answer in the form of responses.

    Raises ApiError, ValueError or TypeError if the body is wrong, or the earlier response is not there.
    """

    num_completions = 1

    def __init__(self, fields: ResponseFields, state: ServerState, store: ResponseStore) -> None:
        state.check_sampling(fields)
        self.fields, self.state, self.store = fields, state, store
        self.id, self.created = f"resp_{uuid4().hex}", state.now()
        self.params = params(fields, state.llm.get_default_sampling_params())
        before: Items = []
        if fields.previous_response_id is not None:
            before = store.get(fields.previous_response_id, "previous_response_id").conversation
        self.input_items = [*before, *items_of(fields)]
        self.output, self.usage, self.num_reasoning = OutputItems(), Usage(), 0

    async def answer(self) -> dict[str, Any]:
        """The whole response."""
        output, (message,) = await answer(self.state, await self._asked())
        completion = output.outputs[0]
        self.usage.add_prompt(output)
        self.usage.completion_tokens = len(completion.token_ids)
        self.output.expect(self._logprobs(completion))
        for piece in pieces_of(message):
            self.output.add(piece)
        self.output.end(completion.finish_reason == "stop")
        return await self._ended(completion)

    async def events(self) -> AsyncGenerator[bytes]:
        """The response as events, each with what is new. An error after the first is an event, too."""
        numbers = count()

        def told(data: dict[str, Any]) -> bytes:
            return event({"type": data["type"], "sequence_number": next(numbers), **data}, data["type"])

        has_begun = False
        try:
            async for news in stream_answer(self.state, await self._asked()):
                if not has_begun:
                    has_begun = True
                    self.usage.add_prompt(news.output)
                    for kind in ("response.created", "response.in_progress"):
                        yield told({"type": kind, "response": self._body("in_progress")})
                self.usage.completion_tokens += len(news.completion.token_ids)
                self.output.expect(self._logprobs(news.completion))
                for piece in news.pieces:
                    for one in self.output.add(piece):
                        yield told(one)
            for one in self.output.end(news.completion.finish_reason == "stop"):
                yield told(one)
            body = await self._ended(news.completion)
            yield told({"type": f"response.{body['status']}", "response": body})
        except Exception as error:
            if not has_begun:
                raise
            known = as_api_error(error)
            yield told({"type": "error", **error_body(known, "/v1/responses")})
            yield told({"type": "response.failed", "response": self._failed(known.message)})
        yield DONE

    async def _asked(self) -> Conversation:
        fields = self.fields
        if fields.truncation == "auto":
            window = self.state.max_model_len
            for_answer = min(fields.max_output_tokens or window, window // 4)
            self.input_items = await latest_that_fit(self.input_items, window - for_answer, self._prompt_length)
        return self._conversation(self.input_items)

    def _conversation(self, items: Items) -> Conversation:
        fields = self.fields
        return Conversation(
            messages=messages_of(items, fields.instructions),
            params=self.params,
            request_id=self.id,
            tools=[chat_tool(tool) for tool in fields.tools] if fields.tools else None,
            tool_choice=chat_tool_choice(fields.tool_choice),
            parallel_tool_calls=fields.parallel_tool_calls is not False,
            template=template_of(fields),
        )

    async def _prompt_length(self, items: Items) -> int:
        return len((await prompt_of(self.state, self._conversation(items)))["prompt_token_ids"])

    async def _ended(self, completion: CompletionOutput) -> dict[str, Any]:
        """The response once its output is complete, which is stored then."""
        reason = completion.finish_reason
        if reason not in ("stop", "length"):
            return self._failed(f"the answer ended early: {completion.stop_reason or reason}")
        self.num_reasoning = await self._count_reasoning()
        body = self._body("completed" if reason == "stop" else "incomplete")
        if reason == "length":
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        if body["store"]:
            self.store.put(StoredResponse(body, self.input_items))
        return body

    def _failed(self, message: str) -> dict[str, Any]:
        return self._body("failed") | {"error": {"code": "server_error", "message": message}}

    def _logprobs(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        if not self.fields.has_logprobs:
            return []
        return token_logprobs(completion, self.fields.top_logprobs or 0)

    async def _count_reasoning(self) -> int:
        """The tokens of the reasoning's text, counted by the tokenizer: its tags are not among them."""
        if not self.output.reasoning:
            return 0
        tokenizer = await self.state.llm.get_tokenizer()
        return len(await asyncio.to_thread(tokenizer.encode, self.output.reasoning, add_special_tokens=False))

    def _body(self, status: str) -> dict[str, Any]:
        """The response as it is now."""
        is_over = status != "in_progress"
        head = {"id": self.id, "object": "response", "created_at": self.created, "status": status}
        head["completed_at"] = self.state.now() if status == "completed" else None
        return head | {
            "error": None,
            "incomplete_details": None,
            "model": self.state.names[0],
            "output": self.output.items,
            "usage": self._usage() if is_over else None,
            **echo(self.fields, self.params),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.num_reasoning},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
