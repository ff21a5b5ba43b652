"""Errors that a client sees: a status and a message in the shape of the API that was called, never a traceback."""

import json
import logging
import re
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanovllm.errors import EngineDeadError

logger = logging.getLogger(__name__)

# Status -> (OpenAI's type, Anthropic's type).
_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("server_error", "overloaded_error"),
}
RETRY_AFTER_S = 1


class ApiError(Exception):
    """Ends a request with this status and message. `param`: the field of the body that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def as_api_error(error: BaseException) -> ApiError:
    """What an error of ours, of pydantic or of the engine means to a client. Logs those that are our fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine has ended, and is being started again", code="engine_lost")
    if isinstance(error, ValueError | TypeError):
        named = re.match(r"(\w+)=", str(error))
        return ApiError(400, str(error), named and named[1])
    logger.error("a request has failed", exc_info=error)
    return ApiError(500, "the server failed to answer; its log says why")


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The body of the response, in Anthropic's shape below /v1/messages, otherwise in OpenAI's."""
    openai_type, anthropic_type = _TYPES.get(error.status, _TYPES[400 if error.status < 500 else 500])
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": anthropic_type, "message": error.message}}
    return {"error": {"message": error.message, "type": openai_type, "param": error.param, "code": error.code}}


def error_headers(error: ApiError) -> dict[str, str]:
    if error.status in (429, 503):
        return {"retry-after": str(RETRY_AFTER_S)}
    return {"www-authenticate": "Bearer"} if error.status == 401 else {}


async def respond(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler of all errors."""
    is_of_body = isinstance(error, RequestValidationError) and error.errors()[0]["loc"][0] == "body"
    if is_of_body and "json" not in request.headers.get("content-type", ""):  # then the body was not read as JSON
        error = ApiError(415, "the request needs the header content-type: application/json")
    error = as_api_error(error)
    return JSONResponse(error_body(error, request.url.path), error.status, error_headers(error))


def encode_error(error: BaseException, path: str) -> bytes:
    """The JSON of an error that comes after a stream has begun."""
    return json.dumps(error_body(as_api_error(error), path)).encode()


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first of pydantic's complaints, in a sentence. It does not repeat the value, which may be a long prompt."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {'.'.join(place)}", ".".join(place))
    where = ".".join(place) or "the body"
    return ApiError(400, f"{where}: {first['msg'].removeprefix('Value error, ')}", where)
