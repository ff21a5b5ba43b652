"""Anthropic's client gets from a server what it expects of Anthropic's."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from scripted import ScriptedServer
from server_process import KEY, Server

USER = {"role": "user", "content": "import os\n"}
GREEDY = {"temperature": 0}
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "cache_control": {"type": "ephemeral"},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture(scope="module")
def real(server: Server) -> Iterator[anthropic.Anthropic]:
    """The client of a server process with a model."""
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


def ask(client: anthropic.Anthropic, **asked: Any) -> anthropic.types.Message:
    asked = {"model": "demo", "max_tokens": 8, "messages": [USER], **asked}
    more = {name: asked.pop(name) for name in ("temperature", "top_p", "top_k") if name in asked}
    return client.messages.create(**asked, extra_body=more)


def stream(client: anthropic.Anthropic, **asked: Any) -> tuple[list[Any], anthropic.types.Message]:
    """All events, and the message that the client makes of them."""
    asked = {"model": "demo", "max_tokens": 8, "messages": [USER], **asked}
    more = {"temperature": asked.pop("temperature", None)}
    with client.messages.stream(**asked, extra_body=more) as events:
        return list(events), events.get_final_message()


def without_ids(message: anthropic.types.Message) -> dict[str, Any]:
    told = message.to_dict()
    told.pop("id")
    for block in told["content"]:
        block.pop("parsed_output", None)
        if block["type"] == "tool_use":
            assert block.pop("id")
    return told


class TestWithAModel:
    def test_an_answer_is_that_of_a_chat(self, real: anthropic.Anthropic, client: openai.OpenAI) -> None:
        message = ask(real, system="You write Python.", **GREEDY)
        messages = [{"role": "system", "content": "You write Python."}, USER]
        chat = client.chat.completions.create(model="demo", messages=messages, max_tokens=8, temperature=0)
        assert [block.text for block in message.content] == [chat.choices[0].message.content]
        assert (message.role, message.model, message.type) == ("assistant", "demo", "message")
        assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
        usage = message.usage
        assert usage.input_tokens + usage.cache_read_input_tokens == chat.usage.prompt_tokens
        assert usage.output_tokens == chat.usage.completion_tokens == 8

    def test_a_stream_adds_up_to_the_answer(self, real: anthropic.Anthropic) -> None:
        events, message = stream(real, **GREEDY)
        assert without_ids(message) == without_ids(ask(real, **GREEDY))
        kinds = [event.type for event in events if event.type != "text"]
        assert kinds[:2] == ["message_start", "content_block_start"]
        assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert kinds[2:-3] == ["content_block_delta"] * len(kinds[2:-3]) and len(kinds) > 8

    def test_tokens_from_the_cache_are_counted_apart(self, real: anthropic.Anthropic) -> None:
        long = [{"role": "user", "content": "x = 1\n" * 60}]
        counted = real.messages.count_tokens(model="demo", messages=long).input_tokens
        first, second = (ask(real, messages=long).usage for _ in range(2))
        assert first.input_tokens + first.cache_read_input_tokens == counted
        assert second.cache_read_input_tokens >= 64 and second.cache_creation_input_tokens == 0
        assert second.input_tokens + second.cache_read_input_tokens == counted

    def test_a_stop_sequence_is_named(self, real: anthropic.Anthropic) -> None:
        whole = ask(real, **GREEDY).content[0].text
        word = whole.split()[1]
        message = ask(real, stop_sequences=[word, "never"], **GREEDY)
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", word)
        assert message.content[0].text == whole[: whole.index(word)]

    @pytest.mark.parametrize(
        ("asked", "error", "named"),
        [
            ({"model": "gpt"}, anthropic.NotFoundError, "gpt"),
            ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
            ({"messages": []}, anthropic.BadRequestError, "messages"),
            ({"temperature": -1.0}, anthropic.BadRequestError, "temperature=-1.0"),
            ({"messages": [{"role": "user", "content": "x" * 20000}]}, anthropic.BadRequestError, "max_model_len"),
        ],
    )
    @pytest.mark.parametrize("is_stream", [False, True])
    def test_errors_have_the_clients_types(
        self, real: anthropic.Anthropic, asked: dict[str, Any], error: type[Exception], named: str, is_stream: bool
    ) -> None:
        with pytest.raises(error, match=named) as caught:
            ask(real, stream=is_stream, **asked)
        assert caught.value.body["type"] == "error"

    def test_a_client_that_leaves_ends_its_request(self, real: anthropic.Anthropic, server: Server) -> None:
        before = server.metric("vllm:generation_tokens_total")
        with real.messages.stream(model="demo", max_tokens=10**4, messages=[USER]) as events:
            next(iter(events))
        assert server.is_idle(3) and server.metric("vllm:generation_tokens_total") < before + 500

    def test_a_wrong_key_is_an_authentication_error(self, real: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.AuthenticationError, match="API key"):
            ask(real.copy(api_key="wrong"))


class TestConversations:
    def test_blocks_become_the_prompt(self, scripted: ScriptedServer) -> None:
        mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "Rome?", **mark}]},
            {"role": "user", "content": "Now?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "look it up", "signature": "foreign"},
                {"type": "text", "text": "I look.", "citations": None},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Rome"}},
                {"type": "tool_use", "id": "b", "name": "weather", "input": {"city": "Ostia"}, **mark},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "sun"}], **mark},
                {"type": "tool_result", "tool_use_id": "b", "content": "no such city", "is_error": True},
                {"type": "text", "text": "Well?"},
            ]},
        ]  # fmt: skip
        system = [{"type": "text", "text": "Be brief.", **mark}, {"type": "text", "text": "Be kind."}]
        ask(scripted.anthropic, messages=messages, system=system, tools=[WEATHER])
        assert scripted.prompts == [
            "tool weather\nsystem: Be brief.\nBe kind.\nuser: Rome?\nNow?\n"
            'assistant: (look it up) I look. weather{"city": "Rome"} weather{"city": "Ostia"}\n'
            "tool: sun\ntool: Error: no such city\nuser: Well?\nassistant:"
        ]

    def test_a_last_message_of_the_assistant_is_continued(self, scripted: ScriptedServer) -> None:
        ask(scripted.anthropic, messages=[USER, {"role": "assistant", "content": "import sys, "}])
        assert scripted.prompts[0].rstrip().endswith("assistant: import sys,")

    def test_an_answer_comes_back_as_it_went(self, scripted: ScriptedServer) -> None:
        """So what it becomes in the next prompt is what the model wrote, and is found in the cache."""
        scripted.say("<think>\n", "hm", "\n</think>\n\n", "I look.", "\n\n", CALL)
        message = ask(scripted.anthropic, tools=[WEATHER])
        result = {"type": "tool_result", "tool_use_id": message.content[-1].id, "content": "sun"}
        again = [USER, message.to_param(), {"role": "user", "content": [result]}]
        ask(scripted.anthropic, messages=again, tools=[WEATHER])
        assert 'assistant: (hm) I look. weather{"city": "Rome"}\ntool: sun\n' in scripted.prompts[1]

    @pytest.mark.parametrize(
        ("asked", "end"),
        [
            ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking=True"),
            ({"thinking": {"type": "disabled"}}, "thinking=False"),
            ({"thinking": {"type": "adaptive"}}, "assistant:"),
            ({"output_config": {"effort": "low"}}, "effort=low"),
            ({}, "assistant:"),
        ],
    )
    def test_thinking_is_the_chat_templates(self, scripted: ScriptedServer, asked: dict[str, Any], end: str) -> None:
        ask(scripted.anthropic, **asked)
        assert scripted.prompts[0].endswith(end)

    def test_sampling_is_as_asked_and_the_models_own_otherwise(self, scripted: ScriptedServer) -> None:
        asked = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "stop_sequences": ["a", "b"], "max_tokens": 9}
        ask(scripted.anthropic, metadata={"user_id": "u"}, service_tier="auto", **asked)
        ask(scripted.anthropic)
        first, second = scripted.params
        assert (first.temperature, first.top_p, first.top_k) == (0.25, 0.5, 7)
        assert (first.stop, first.max_tokens) == (["a", "b"], 9)
        assert (second.temperature, second.stop) == (0.5, [])

    def test_no_tools_are_shown_if_none_may_be_called(self, scripted: ScriptedServer) -> None:
        for choice in ({"type": "auto"}, {"type": "none"}):
            counted = scripted.anthropic.messages.count_tokens(
                model="demo", messages=[USER], tools=[WEATHER], tool_choice=choice
            )
            ask(scripted.anthropic, tools=[WEATHER], tool_choice=choice)
            ids = scripted.state.llm.tokenizer.encode(scripted.prompts[-1])
            assert counted.input_tokens == len(ids)
        assert [prompt.startswith("tool weather\n") for prompt in scripted.prompts] == [True, False]


class TestAnswers:
    def test_reasoning_text_and_calls_are_blocks(self, scripted: ScriptedServer) -> None:
        scripted.say("<think>", "hm ", "hm", "</think>", "I ", "look.", CALL[:20], CALL[20:60], CALL[60:])
        message = ask(scripted.anthropic, tools=[WEATHER], max_tokens=99)
        thinking, text, call = message.content
        assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", "hm hm", "")
        assert (text.type, text.text) == ("text", "I look.")
        assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Rome"})
        assert (message.stop_reason, message.usage.output_tokens) == ("tool_use", 9)
        events, streamed = stream(scripted.anthropic, tools=[WEATHER], max_tokens=99)
        assert without_ids(streamed) == without_ids(message)
        open_blocks: set[int] = set()
        for event in events:
            if event.type == "content_block_start":
                assert not open_blocks
                open_blocks.add(event.index)
            elif event.type in ("content_block_delta", "content_block_stop"):
                assert open_blocks == {event.index}
                if event.type == "content_block_stop":
                    open_blocks.clear()
        deltas = [event.delta.type for event in events if event.type == "content_block_delta"]
        assert set(deltas) == {"thinking_delta", "text_delta", "input_json_delta"}

    def test_each_call_is_a_block(self, scripted: ScriptedServer) -> None:
        scripted.say(CALL, "\n", CALL.replace("Rome", "Ostia"))
        for message in (ask(scripted.anthropic, tools=[WEATHER]), stream(scripted.anthropic, tools=[WEATHER])[1]):
            assert [block.input["city"] for block in message.content] == ["Rome", "Ostia"]
            assert len({block.id for block in message.content}) == 2

    def test_a_single_call_is_given_if_no_more_are_wanted(self, scripted: ScriptedServer) -> None:
        scripted.say("Well.", CALL, "\n", CALL.replace("Rome", "Ostia"))
        asked = {"tools": [WEATHER], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
        for message in (ask(scripted.anthropic, **asked), stream(scripted.anthropic, **asked)[1]):
            text, call = message.content
            assert (text.text, call.input) == ("Well.", {"city": "Rome"})

    @pytest.mark.parametrize(
        ("said", "end", "because", "told"),
        [
            ("Hello", "stop", None, ("end_turn", None)),
            ("Hello", "stop", 7, ("end_turn", None)),
            ("Hello", "stop", "END", ("stop_sequence", "END")),
            ("8 tokens", "length", None, ("max_tokens", None)),
            ("Hello", "length", None, ("model_context_window_exceeded", None)),
        ],
    )
    def test_the_reason_of_the_end_is_anthropics(
        self, scripted: ScriptedServer, said: str, end: str, because: Any, told: tuple[str, str | None]
    ) -> None:
        scripted.say(*said, end=end, because=because)
        for message in (ask(scripted.anthropic), stream(scripted.anthropic)[1]):
            assert (message.stop_reason, message.stop_sequence) == told

    def test_an_answer_without_text_has_no_blocks(self, scripted: ScriptedServer) -> None:
        scripted.say("")
        assert ask(scripted.anthropic).content == stream(scripted.anthropic)[1].content == []

    def test_numbers_that_no_float_holds_do_not_break_an_answer(self, scripted: ScriptedServer) -> None:
        scripted.say('<tool_call>{"name": "f", "arguments": {"a": 1e999, "b": -%s, "c": 3}}</tool_call>' % ("9" * 5000))
        (call,) = ask(scripted.anthropic, tools=[WEATHER]).content
        assert call.input == {"a": 1.7976931348623157e308, "b": -1.7976931348623157e308, "c": 3}

    def test_a_slow_stream_has_pings(self, scripted: ScriptedServer) -> None:
        scripted.say("Hel", "lo", pause_s=0.35)
        body = {"model": "demo", "max_tokens": 8, "messages": [USER], "stream": True}
        text = scripted.http.post("/v1/messages", json=body).text
        assert text.count('event: ping\ndata: {"type":"ping"}\n\n') in (2, 3)
        assert stream(scripted.anthropic)[1].content[0].text == "Hello"

    @pytest.mark.parametrize("end", ["error", "abort"])
    def test_an_answer_that_fails_is_an_error(self, scripted: ScriptedServer, end: str) -> None:
        scripted.say("Hel", "lo", end=end, because="the logits are NaN")
        for answer in (ask, stream):
            with pytest.raises(anthropic.APIStatusError, match="NaN") as caught:
                answer(scripted.anthropic)
            assert caught.value.body["error"]["type"] == "api_error"

    def test_an_engine_that_fails_meanwhile_is_an_error(self, scripted: ScriptedServer) -> None:
        scripted.say("Hel", "lo", failure=RuntimeError("secret"))
        for answer in (ask, stream):
            with pytest.raises(anthropic.APIStatusError, match="log") as caught:
                answer(scripted.anthropic)
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [WEATHER | {"input_schema": {"type": "array"}}]}, "tools.0.input_schema"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER | {"name": f"f{i}"} for i in range(3)]}, "tools: 3"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [WEATHER]}, "'f'"),
        ({"stop_sequences": ["a", "b", "c"]}, "stop_sequences: 3"),
        ({"thinking": {"type": "enabled", "display": "omitted"}}, "thinking.display"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
         "messages.0: a block of type 'tool_use'"),
        ({"messages": [USER, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]}, "tool_result"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(scripted: ScriptedServer, asked: dict[str, Any], named: str) -> None:
    body = {"model": "demo", "max_tokens": 8, "messages": [USER], **asked}
    headers = {"content-type": "application/json"}
    answer = scripted.http.post("/v1/messages", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and named in error["message"], error
    assert not scripted.prompts
