"""The small endpoints: models, tokenizing, health, version, metrics."""

import asyncio
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import Field, model_validator

from nanovllm.server.errors import ApiError
from nanovllm.server.openai_fields import Fields, TokenIds
from nanovllm.server.state import ServerState, state_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The names that this server's model has."""
    state = state_of(request)
    return {"object": "list", "data": [_model(state, name) for name in state.names]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    state = state_of(request)
    state.check_model(name)
    return _model(state, name)


def _model(state: ServerState, name: str) -> dict[str, Any]:
    model = {"id": name, "object": "model", "created": state.created, "owned_by": "nano-vllm"}
    return model | {"root": state.llm.config.model, "parent": None, "max_model_len": state.max_model_len}


class TokenizeFields(Fields):
    """The body of /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None  # by default: to a text, and not to what the chat template writes
    return_token_strs: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_one_of_both(self) -> "TokenizeFields":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, and not both")
        return self


@router.post("/tokenize")
async def tokenize(fields: TokenizeFields, request: Request) -> dict[str, Any]:
    """The token ids of a text or a conversation."""
    state = state_of(request)
    state.check_model(fields.model)
    tokenizer = await state.llm.get_tokenizer()
    if fields.messages is not None:
        given = ("chat_template", "chat_template_kwargs", "tools", "continue_final_message", "add_generation_prompt")
        options = {name: getattr(fields, name) for name in given}
        options["chat_template"] = options["chat_template"] or state.settings.chat_template
        prompt: Any = await state.llm.chat_prompt(fields.messages, **options)
        prompt = prompt["prompt"] if fields.add_special_tokens else prompt
    elif fields.add_special_tokens is False:
        encode = partial(tokenizer.encode, fields.prompt, add_special_tokens=False)
        prompt = {"prompt_token_ids": await asyncio.to_thread(encode)}  # a long text must not hold up the loop
    else:
        prompt = fields.prompt
    ids = await state.llm.encode_prompt(prompt)
    body = {"count": len(ids), "max_model_len": state.max_model_len, "tokens": ids}
    return body | {"token_strs": tokenizer.convert_ids_to_tokens(ids) if fields.return_token_strs else None}


class DetokenizeFields(Fields):
    """The body of /detokenize."""

    model: str | None = None
    tokens: TokenIds


@router.post("/detokenize")
async def detokenize(fields: DetokenizeFields, request: Request) -> dict[str, Any]:
    """The text of token ids."""
    state = state_of(request)
    state.check_model(fields.model)
    tokenizer = await state.llm.get_tokenizer()
    outside = [token_id for token_id in fields.tokens if token_id >= len(tokenizer)]
    if outside:
        raise ApiError(400, f"tokens has {outside[0]}: ids are below {len(tokenizer)}", "tokens")
    return {"prompt": tokenizer.decode(fields.tokens)}


@router.get("/health")
@router.get("/ping")
async def health(request: Request) -> PlainTextResponse:
    """Status 200 while the engine serves, otherwise 503."""
    await state_of(request).llm.check_health()
    return PlainTextResponse("")


@router.get("/version")
async def get_version() -> dict[str, str]:
    return {"version": version("nano-vllm")}


@router.get("/metrics")
async def metrics(request: Request) -> PlainTextResponse:
    """Counters and times, for Prometheus."""
    state = state_of(request)
    return PlainTextResponse(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
