"""What /v1/responses makes of a request: the prompt, the sampling, and what it refuses."""

from typing import Any

import openai
import pytest
from response_checks import WEATHER, post
from scripted import ScriptedServer


class TestRequests:
    def test_items_become_the_prompt(self, scripted: ScriptedServer) -> None:
        items = [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [
                {"type": "input_text", "text": "Rome?"}, {"type": "input_text", "text": "Now?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [],
             "content": [{"type": "reasoning_text", "text": "look up"}]},
            {"type": "message", "role": "assistant", "status": "completed", "phase": "commentary",
             "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
            {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": '{"location": "Rome"}'},
            {"type": "function_call", "call_id": "b", "name": "get_weather", "arguments": ""},
            {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "sun"}]},
            {"type": "function_call_output", "call_id": "b", "output": "where?"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": "Well?"},
        ]  # fmt: skip
        post(scripted, input=items, instructions="Be brief.")
        assert scripted.prompts == [
            "system: Be brief.\nBe kind.\nuser: Rome?\nNow?\n"
            'assistant: (look up) I look. get_weather{"location": "Rome"} get_weather{}\n'
            "tool: sun\ntool: where?\nassistant: No.\nuser: Well?\nassistant:"
        ]

    def test_sampling_is_as_asked_and_the_models_own_otherwise(self, scripted: ScriptedServer) -> None:
        asked = {
            "temperature": 0.25,
            "top_p": 0.5,
            "presence_penalty": 0.5,
            "max_output_tokens": 9,
            "seed": 3,
            "top_k": 7,
        }
        body = post(scripted, **asked)
        first = scripted.params[0]
        assert (first.temperature, first.top_p, first.presence_penalty) == (0.25, 0.5, 0.5)
        assert (first.max_tokens, first.seed, first.top_k) == (9, 3, 7)
        assert {name: body[name] for name in list(asked)[:4]} == dict(list(asked.items())[:4])
        assert post(scripted)["temperature"] == scripted.params[1].temperature == 0.5
        assert scripted.params[1].max_tokens is None

    def test_a_response_repeats_its_request(self, scripted: ScriptedServer) -> None:
        asked = {
            "instructions": "Be brief.", "metadata": {"a": "b"}, "tools": [WEATHER], "tool_choice": "none",
            "parallel_tool_calls": False, "reasoning": {"effort": "low", "summary": "auto"}, "truncation": "auto",
            "prompt_cache_key": "k", "safety_identifier": "s", "user": "u", "store": False,
        }  # fmt: skip
        body = post(scripted, **asked, service_tier="auto", background=False)
        assert {name: body[name] for name in asked} == asked | {"tools": [WEATHER | {"strict": None}]}
        assert (body["service_tier"], body["text"]["format"]) == ("default", {"type": "text"})
        assert scripted.prompts == ["system: Be brief.\nuser: import os\n\nassistant: effort=low"]

    def test_no_effort_means_no_thinking(self, scripted: ScriptedServer) -> None:
        post(scripted, reasoning={"effort": "none"})
        assert scripted.prompts[0].endswith("assistant: thinking=False effort=none")

    def test_truncation_drops_the_oldest_turns_and_keeps_the_systems_messages(self, scripted: ScriptedServer) -> None:
        turns = []
        for i in range(12):
            turns += [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "Answer " * 8}]
        items = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "Last?"}]
        body = post(scripted, input=items, truncation="auto", max_output_tokens=20)
        (prompt,) = scripted.prompts
        first = int(prompt.removeprefix("system: Be brief.\nuser: Question ").partition("?")[0])
        assert prompt.endswith("user: Last?\nassistant:")
        encode = scripted.state.llm.tokenizer.encode
        most = scripted.state.max_model_len - 20
        dropped = f"user: Question {first - 1}?\nassistant: {'Answer ' * 8}\n"
        assert len(encode(prompt)) <= most < len(encode(prompt + dropped)) and first > 1
        post(scripted, input="More?", previous_response_id=body["id"])
        assert scripted.prompts[1].startswith(prompt.removesuffix("assistant:"))  # what was dropped stays so

    @pytest.mark.parametrize(
        ("asked", "param"),
        [
            ({"nonsense": 1}, "nonsense"),
            ({"conversation": "conv_1"}, "conversation"),
            ({"background": True}, "background"),
            ({"n": 2}, "n"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"service_tier": "priority"}, "service_tier"),
            ({"include": ["file_search_call.results"]}, "include.0"),
            ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
            ({"metadata": {"a": "b" * 513}}, "metadata.a"),
            ({"text": {"format": {"type": "xml"}}}, "text.format"),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
            ({"stop": ["a", "b", "c"]}, "stop"),
            ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
            ({"tools": [WEATHER | {"name": f"f{i}"} for i in range(3)]}, "tools"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"input": []}, "input"),
            ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
            ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.message.content.0"),
            ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.message.content.0"),
            ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "[" * 9999}]},
             "input.0.function_call.arguments"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_served_is_refused_by_name(
        self, scripted: ScriptedServer, asked: dict[str, Any], param: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            scripted.openai.post("/responses", body={"model": "demo", "input": "x", **asked}, cast_to=object)
        assert caught.value.param == param, caught.value
        assert not scripted.prompts
