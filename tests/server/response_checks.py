"""Asks /v1/responses of a scripted server, and checks the form of each answer and of each event."""

import json
from typing import Any, Literal

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from scripted import ScriptedServer

USER = {"type": "message", "role": "user", "content": "import os\n"}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Rome"}}\n</tool_call>'
EVENT = TypeAdapter(ResponseStreamEvent)


class Resource(BaseModel):
    """What a response must have, by the specification's schema `ResponseResource`; null only where it may be."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: str
    incomplete_details: dict[str, str] | None
    model: str
    previous_response_id: str | None
    instructions: str | None
    output: list[dict[str, Any]]
    error: dict[str, str] | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    truncation: Literal["auto", "disabled"]
    parallel_tool_calls: bool
    text: dict[str, Any]
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    temperature: float
    reasoning: dict[str, Any] | None
    user: str | None
    usage: dict[str, Any] | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    store: bool
    background: bool
    service_tier: str
    metadata: dict[str, str]
    safety_identifier: str | None
    prompt_cache_key: str | None


def checked(body: dict[str, Any]) -> dict[str, Any]:
    assert set(Resource.model_fields) <= set(body)
    Resource.model_validate(body, strict=True)
    Response.model_validate(body)
    ids = [item["id"] for item in body["output"]]
    assert len(set(ids)) == len(ids) and all(item["status"] for item in body["output"])
    return body


def post(server: ScriptedServer, **asked: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/responses", json={"model": "demo", "input": [USER], **asked})
    assert answer.status_code == 200, answer.text
    return checked(answer.json())


def stream(server: ScriptedServer, **asked: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All events, each of the form that it must have, and the response of the last."""
    answer = server.http.post("/v1/responses", json={"model": "demo", "input": [USER], "stream": True, **asked})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
    *told, done, nothing = answer.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    events = []
    for one in told:
        name, data = one.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "error":
            EVENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert checked(events[0]["response"])["status"] == "in_progress"
    return events, checked(events[-1]["response"])


def without_ids(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in output]


def message(text: str, status: str = "completed") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "role": "assistant", "status": status, "content": [part]}


def replay(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a client makes of the deltas alone, checked against what the events say at the end of each."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif kind == "content_part.added":
            assert event["content_index"] == len(items[-1]["content"])
            items[-1]["content"].append(event["part"])
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            part = items[-1]["content"][event["content_index"]]
            part["text"] += event["delta"]
            part.get("logprobs", []).extend(event.get("logprobs", ()))
        elif kind == "function_call_arguments.delta":
            items[-1]["arguments"] += event["delta"]
        elif kind.endswith("_text.done"):
            part = items[-1]["content"][event["content_index"]]
            assert part["text"] == event["text"]
            # those of tokens whose text is held back, until it is clear that it belongs to no message
            part.get("logprobs", []).extend(event.get("logprobs", ())[len(part.get("logprobs", ())) :])
        elif kind == "content_part.done":
            assert items[-1]["content"][event["content_index"]] == event["part"]
        elif kind == "output_item.done":
            items[-1]["status"] = event["item"]["status"]
            assert items[-1] == event["item"]
        if "item_id" in event:
            assert (event["item_id"], event["output_index"]) == (items[-1]["id"], len(items) - 1)
    return items
