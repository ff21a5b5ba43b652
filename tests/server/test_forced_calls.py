"""Each API can force a call or a schema: the grammar that the model is held to, and the answer's form."""

from typing import Any

import pytest
from scripted import ScriptedServer

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
USER = {"role": "user", "content": "Rome?"}
TOOLS = {
    "messages": [{"name": "weather", "input_schema": SCHEMA}],
    "responses": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
}
NAMED = {"messages": {"type": "tool", "name": "weather"}, "responses": {"type": "function", "name": "weather"}}
ANY = {"messages": {"type": "any"}, "responses": "required"}
PARALLEL = {"messages": {"disable_parallel_tool_use": True}, "responses": {"parallel_tool_calls": False}}
ARGUMENTS = '{"city": "Rome"}'
BOTH = pytest.mark.parametrize("api", ["messages", "responses"])


def ask(server: ScriptedServer, api: str, **asked: Any) -> dict[str, Any]:
    common = {"messages": {"messages": [USER], "max_tokens": 99}, "responses": {"input": [USER]}}[api]
    answer = server.http.post(f"/v1/{api}", json={"model": "demo", **common, **asked})
    assert answer.status_code == 200, answer.text
    return answer.json()


def calls_of(api: str, body: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, city) of each."""
    if api == "messages":
        assert body["stop_reason"] == "tool_use"
        return [(block["name"], block["input"]["city"]) for block in body["content"]]
    assert body["status"] == "completed"
    return [(item["name"], item["arguments"].split('"')[3]) for item in body["output"]]


@BOTH
def test_a_named_tools_arguments_are_the_whole_answer(scripted: ScriptedServer, api: str) -> None:
    scripted.say(ARGUMENTS)
    body = ask(scripted, api, tools=TOOLS[api], tool_choice=NAMED[api])
    assert calls_of(api, body) == [("weather", "Rome")]
    assert scripted.params[0].structured_outputs.json == SCHEMA


@BOTH
@pytest.mark.parametrize("is_parallel", [True, False])
def test_a_required_call_is_one_of_a_list(scripted: ScriptedServer, api: str, is_parallel: bool) -> None:
    call = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'
    scripted.say(f"[{call}, {call}]" if is_parallel else f"[{call}]")
    asked: dict[str, Any] = {"tools": TOOLS[api], "tool_choice": ANY[api]}
    if not is_parallel and api == "messages":
        asked["tool_choice"] = ANY[api] | PARALLEL[api]
    elif not is_parallel:
        asked |= PARALLEL[api]
    body = ask(scripted, api, **asked)
    assert calls_of(api, body) == [("weather", "Rome")] * (2 if is_parallel else 1)
    schema = scripted.params[0].structured_outputs.json
    assert schema["type"] == "array" and schema.get("maxItems") == (None if is_parallel else 1)


@BOTH
def test_a_schema_is_the_answers_grammar(scripted: ScriptedServer, api: str) -> None:
    scripted.say(ARGUMENTS)
    form = {"type": "json_schema", "schema": SCHEMA}
    config = {"messages": {"output_config": {"format": form}}, "responses": {"text": {"format": form | {"name": "a"}}}}
    body = ask(scripted, api, **config[api])
    text = body["content"][0]["text"] if api == "messages" else body["output"][0]["content"][0]["text"]
    assert text == ARGUMENTS and scripted.params[0].structured_outputs.json == SCHEMA
    if api == "responses":
        assert body["text"]["format"] == form | {"name": "a", "description": None, "strict": False}


def test_any_object_is_the_grammar_of_json_object(scripted: ScriptedServer) -> None:
    ask(scripted, "responses", text={"format": {"type": "json_object"}})
    ask(scripted, "responses", text={"format": {"type": "text"}})
    assert scripted.params[0].structured_outputs.json_object is True
    assert scripted.params[1].structured_outputs is None


@BOTH
def test_a_schema_beside_a_forced_call_is_refused(scripted: ScriptedServer, api: str) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    config = {"messages": {"output_config": {"format": form}}, "responses": {"text": {"format": form | {"name": "a"}}}}
    common = {"messages": {"messages": [USER], "max_tokens": 99}, "responses": {"input": [USER]}}[api]
    asked = {"model": "demo", **common, **config[api], "tools": TOOLS[api], "tool_choice": NAMED[api]}
    answer = scripted.http.post(f"/v1/{api}", json=asked)
    assert answer.status_code == 400 and "tool_choice" in answer.json()["error"]["message"]


def test_json_that_is_asked_for_is_no_reasoning_even_if_the_prompt_ends_with_think(scripted: ScriptedServer) -> None:
    scripted.say(ARGUMENTS)
    asked = {"messages": [USER], "chat_template": "{{ messages[0].content }}<think>\n", "model": "demo"}
    form = {"type": "json_object"}
    answer = scripted.http.post("/v1/chat/completions", json=asked | {"response_format": form}).json()
    assert answer["choices"][0]["message"]["content"] == ARGUMENTS
    scripted.say(ARGUMENTS)
    answer = scripted.http.post("/v1/chat/completions", json=asked).json()
    assert answer["choices"][0]["message"]["reasoning_content"] == ARGUMENTS
