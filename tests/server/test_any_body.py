"""Whatever a body says, /v1/messages and /v1/responses answer it or refuse it: the fault is never the server's."""

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from response_checks import WEATHER
from scripted import ScriptedServer

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
BODIES = {
    "/v1/messages": {
        "model": "demo", "max_tokens": 8, "system": [{"type": "text", "text": "Be brief."}], "stop_sequences": ["a"],
        "temperature": 1, "top_k": 3, "top_p": 0.5, "thinking": {"type": "enabled", "budget_tokens": 9},
        "metadata": {"user_id": "u"}, "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "output_config": {"effort": "low"},
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t", "signature": ""}, {"type": "text", "text": "y"},
                {"type": "tool_use", "id": "a", "name": "f", "input": {"a": "b"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "z"}]}]},
        ],
    },
    "/v1/responses": {
        "model": "demo", "instructions": "Be brief.", "max_output_tokens": 8, "temperature": 1, "top_p": 0.5,
        "tools": [WEATHER], "tool_choice": "auto", "text": {"format": {"type": "text"}}, "truncation": "auto",
        "reasoning": {"effort": "low", "summary": "auto"}, "metadata": {"a": "b"}, "top_logprobs": 2,
        "include": ["message.output_text.logprobs"], "chat_template_kwargs": {"a": 1}, "seed": 1, "stop": ["a"],
        "logit_bias": {"1": 2}, "bad_words": ["b"],
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "z"},
        ],
    },
}  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a\x00\ud800{", max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "a", "role"]), inner),
    max_leaves=3,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all parts of a body."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_body_with_junk_in_it_is_answered_or_refused(
    scripted: ScriptedServer, path: str, data: st.DataObject
) -> None:
    body = copy.deepcopy(BODIES[path]) | {"stream": data.draw(st.booleans())}
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(places(body)[1:]))
        holder = body
        for key in way:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[last] = data.draw(JUNK)
        else:
            del holder[last]
    headers = {"content-type": "application/json"}
    answer = scripted.http.post(path, content=json.dumps(body), headers=headers)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code == 200:
        assert "error" not in answer.text.replace('"error":null', "").replace("is_error", ""), answer.text
    else:
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
def test_the_body_is_answered_as_it_stands(scripted: ScriptedServer, path: str) -> None:
    answer = scripted.http.post(path, json=BODIES[path])
    assert answer.status_code == 200, answer.text


def test_the_openapi_document_has_the_endpoints(scripted: ScriptedServer) -> None:
    paths = scripted.http.get("/openapi.json").json()["paths"]
    assert {path for path in paths if path.startswith(("/v1/messages", "/v1/responses"))} == {
        "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/input_items",
    }  # fmt: skip
