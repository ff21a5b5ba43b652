"""Remembers responses of /v1/responses, so that a request can go on where an earlier one ended."""

import json
from dataclasses import dataclass
from typing import Any

from nanovllm.server.errors import ApiError

MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response as it was answered.

    Attributes:
        input_items: all that the model read, those of the responses before it too, without the instructions.
    """

    body: dict[str, Any]
    input_items: list[dict[str, Any]]

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The items that a request goes on from."""
        return [*self.input_items, *self.body["output"]]


class ResponseStore:
    """The latest responses, by their ids. It forgets the oldest if there are more than `most`, or too many bytes.

    A later response has the items of those before it, and so outlives them.
    """

    def __init__(self, most: int, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._responses: dict[str, tuple[StoredResponse, int]] = {}  # in the order of their arrival
        self._num_bytes = 0

    def put(self, response: StoredResponse) -> None:
        """Remember a response, unless it alone has too many bytes."""
        num_bytes = len(json.dumps(response.input_items)) + len(json.dumps(response.body))
        self._responses[response.body["id"]] = (response, num_bytes)
        self._num_bytes += num_bytes
        while len(self._responses) > self._most or self._num_bytes > self._most_bytes:
            self._forget(next(iter(self._responses)))

    def get(self, response_id: str, param: str = "response_id") -> StoredResponse:
        """Raises ApiError if it is not there; `param` is the name of the parameter that has the id."""
        if response_id not in self._responses:
            message = f"Response with id '{response_id:.100}' not found: it was not stored, or is no longer"
            raise ApiError(404, message, param, f"{param.removesuffix('_id')}_not_found")
        return self._responses[response_id][0]

    def delete(self, response_id: str) -> None:
        """Forget a response. Raises ApiError if it is not there."""
        self.get(response_id)
        self._forget(response_id)

    def _forget(self, response_id: str) -> None:
        self._num_bytes -= self._responses.pop(response_id)[1]
