"""OpenAI's client gets from /v1/responses what it expects, and the Open Responses specification what it asks for."""

import json
from typing import Any

import openai
import pytest
from response_checks import CALL, WEATHER, message, post, stream, without_ids
from scripted import ScriptedServer
from server_process import Server

GREEDY = {"model": "demo", "temperature": 0, "max_output_tokens": 8}


class TestCompliance:
    """The cases of Open Responses' own suite, without images, files and WebSockets, which text models lack."""

    CASES = {
        "basic": [{"type": "message", "role": "user", "content": "Say hello in exactly 3 words."}],
        "system prompt": [
            {"type": "message", "role": "system", "content": "You are a pirate. Always respond in pirate speak."},
            {"type": "message", "role": "user", "content": "Say hello."},
        ],
        "multi-turn": [
            {"type": "message", "role": "user", "content": "My name is Alice."},
            {"type": "message", "role": "assistant", "content": "Hello Alice! Nice to meet you."},
            {"type": "message", "role": "user", "content": "What is my name?"},
        ],
    }

    @pytest.mark.parametrize("case", CASES)
    def test_text(self, scripted: ScriptedServer, case: str) -> None:
        body = post(scripted, input=self.CASES[case])
        assert body["status"] == "completed" and without_ids(body["output"]) == [message("Hello.")]
        turns = [f"{item['role']}: {item['content']}\n" for item in self.CASES[case]]
        assert scripted.prompts == ["".join(turns) + "assistant:"]

    def test_streaming(self, scripted: ScriptedServer) -> None:
        scripted.say(*"1 2 3")
        events, body = stream(scripted, input=[{"type": "message", "role": "user", "content": "Count from 1 to 3."}])
        assert body["status"] == "completed"
        assert [event["type"].removeprefix("response.") for event in events[2:]] == [
            "output_item.added", "content_part.added", *["output_text.delta"] * 5, "output_text.done",
            "content_part.done", "output_item.done", "completed",
        ]  # fmt: skip

    def test_tool_calling(self, scripted: ScriptedServer) -> None:
        scripted.say(CALL)
        body = post(scripted, input="What's the weather like in Rome?", tools=[WEATHER])
        (call,) = body["output"]
        assert (call["type"], call["name"], json.loads(call["arguments"])) == (
            "function_call", "get_weather", {"location": "Rome"},
        )  # fmt: skip
        assert body["status"] == call["status"] == "completed" and call["call_id"] != call["id"]
        assert scripted.prompts[0].startswith("tool get_weather\n")

    def test_tool_calling_streaming(self, scripted: ScriptedServer) -> None:
        scripted.say(*CALL)
        events, body = stream(scripted, tools=[WEATHER])
        kinds = [event["type"].removeprefix("response.") for event in events[2:]]
        assert kinds[0] == "output_item.added"
        assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
        assert set(kinds[1:-3]) == {"function_call_arguments.delta"}
        arguments = "".join(event["delta"] for event in events[3:-3])
        assert arguments == events[-3]["arguments"] == body["output"][0]["arguments"] == '{"location": "Rome"}'

    def test_function_call_round_trip(self, scripted: ScriptedServer) -> None:
        scripted.say(CALL)
        first = post(scripted, input="The weather in Rome?", tools=[WEATHER])
        scripted.say("Clear.")
        result = {"type": "function_call_output", "call_id": first["output"][0]["call_id"], "output": "64 degrees"}
        second = post(scripted, previous_response_id=first["id"], input=[result])
        assert second["status"] == "completed" and without_ids(second["output"]) == [message("Clear.")]
        assert scripted.prompts == [
            'user: The weather in Rome?\nassistant:  get_weather{"location": "Rome"}\ntool: 64 degrees\nassistant:'
        ]

    def test_previous_response_id(self, scripted: ScriptedServer) -> None:
        first = post(scripted, input="Remember this code word: papaya.", instructions="Reply with only OK.")
        second = post(scripted, previous_response_id=first["id"], input="What code word?")
        assert second["status"] == "completed" and second["previous_response_id"] == first["id"]
        assert scripted.prompts == [
            "system: Reply with only OK.\nuser: Remember this code word: papaya.\nassistant:",
            "user: Remember this code word: papaya.\nassistant: Hello.\nuser: What code word?\nassistant:",
        ]


class TestWithAModel:
    def test_an_answer_is_that_of_a_chat(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(input="import os\n", instructions="You write Python.", **GREEDY)
        messages = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "import os\n"}]
        chat = client.chat.completions.create(model="demo", messages=messages, max_tokens=8, temperature=0)
        assert answer.output_text == chat.choices[0].message.content
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        usage = answer.usage
        assert (usage.input_tokens, usage.output_tokens) == (chat.usage.prompt_tokens, 8)
        assert usage.total_tokens == usage.input_tokens + 8 and usage.output_tokens_details.reasoning_tokens == 0

    def test_a_stream_adds_up_to_the_answer(self, client: openai.OpenAI) -> None:
        asked = {"input": "import os\n", "include": ["message.output_text.logprobs"], "top_logprobs": 2, **GREEDY}
        whole = client.responses.create(**asked)
        with client.responses.stream(**asked) as events:
            deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert "".join(event.delta for event in deltas) == whole.output_text
        told = [entry for event in deltas for entry in event.logprobs]
        expected = whole.output[0].content[0].logprobs
        assert [entry.token for entry in told] == [entry.token for entry in expected] and len(told) == 8
        assert [entry.logprob for entry in told] == pytest.approx([entry.logprob for entry in expected], abs=1e-5)
        assert all(len(entry.top_logprobs) == 2 for entry in told)

    def test_going_on_is_the_same_as_sending_all_again_but_finds_more_in_the_cache(self, client: openai.OpenAI) -> None:
        first = client.responses.create(input="x = 1\n" * 60, **GREEDY)
        second = client.responses.create(input="y = 2\n", previous_response_id=first.id, **GREEDY)
        items = [{"role": "user", "content": "x = 1\n" * 60}, *first.output, {"role": "user", "content": "y = 2\n"}]
        again = client.responses.create(input=items, **GREEDY)
        assert again.output_text == second.output_text
        assert again.usage.input_tokens == second.usage.input_tokens > first.usage.input_tokens
        assert second.usage.input_tokens_details.cached_tokens >= 64

    @pytest.mark.parametrize("is_stream", [False, True])
    @pytest.mark.parametrize(
        ("asked", "error", "named"),
        [
            ({"model": "gpt"}, openai.NotFoundError, "gpt"),
            ({"previous_response_id": "resp_0"}, openai.NotFoundError, "resp_0"),
            ({"temperature": -1}, openai.BadRequestError, "temperature=-1"),
            ({"input": "x" * 20000}, openai.BadRequestError, "max_model_len"),
        ],
    )
    def test_errors_have_the_clients_types(
        self, client: openai.OpenAI, asked: dict[str, Any], error: type[Exception], named: str, is_stream: bool
    ) -> None:
        with pytest.raises(error, match=named):
            client.responses.create(stream=is_stream, **{"input": "x", **GREEDY, **asked})

    def test_a_client_that_leaves_ends_its_request(self, client: openai.OpenAI, server: Server) -> None:
        before = server.metric("vllm:generation_tokens_total")
        with client.responses.create(
            model="demo", input="import os\n", stream=True, extra_body={"ignore_eos": True}
        ) as events:
            next(iter(events))
        assert server.is_idle(3) and server.metric("vllm:generation_tokens_total") < before + 500

    def test_a_wrong_key_is_an_authentication_error(self, server: Server) -> None:
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").responses.retrieve("resp_0")
