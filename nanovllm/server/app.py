"""Puts the server together: endpoints, errors, guard."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from nanovllm.remote.engines import Engines
from nanovllm.server import anthropic, chat, completions, responses, utility
from nanovllm.server.errors import ApiError, respond
from nanovllm.server.guard import Guard
from nanovllm.server.page import add_page
from nanovllm.server.response_store import ResponseStore
from nanovllm.server.settings import ServerSettings
from nanovllm.server.state import ServerState


def make_app(llm: Engines, settings: ServerSettings) -> FastAPI:
    """An ASGI application over engines, which stay their caller's: the application does not end them."""
    app = FastAPI(title="nano-vLLM", redoc_url=None)
    app.state.server = ServerState(llm, settings)
    app.state.responses = ResponseStore(settings.limits.stored_responses)
    for part in (completions, chat, responses, anthropic, utility):
        app.include_router(part.router)
    for error in (ApiError, RequestValidationError, HTTPException, ValueError, TypeError, RuntimeError):
        app.add_exception_handler(error, respond)
    if settings.page:
        add_page(app, app.state.server)
    app.add_middleware(Guard, settings=settings)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app
