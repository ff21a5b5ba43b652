"""A line of input becomes a request or says what is wrong with it; nothing in it is overlooked."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.commands.request_lines import Asked, asked_in_json, asked_in_text, result_record
from nanovllm.outputs import CompletionOutput, RequestOutput

MESSAGES = [{"role": "user", "content": "Hi"}]


def asked(**content: Any) -> Asked:
    return asked_in_json(json.dumps(content).encode())


def test_text_is_a_prompt_without_its_line_end() -> None:
    assert asked_in_text(b'  {"prompt": 1} \r\n') == Asked(prompt='  {"prompt": 1} ')


def test_parameters_are_the_line_s_and_other_keys_are_kept() -> None:
    assert asked(prompt=[1, 2], top_p=0.5, label={"a": 1}, temprature=2, custom_id="x") == Asked(
        prompt=[1, 2], sampling={"top_p": 0.5}, kept={"label": {"a": 1}, "temprature": 2}, custom_id="x"
    )


def test_a_conversation_may_have_options_of_its_template() -> None:
    assert asked(messages=MESSAGES, tools=[{}], seed=1) == Asked(
        messages=MESSAGES, chat_options={"tools": [{}]}, sampling={"seed": 1}
    )


def test_a_line_of_a_batch_has_its_request_in_the_body() -> None:
    body = {"model": "any", "messages": MESSAGES, "max_completion_tokens": 9, "stream": False, "user": "me"}
    assert asked(custom_id="x", method="POST", url="/v1/chat/completions", body=body) == Asked(
        messages=MESSAGES,
        sampling={"max_tokens": 9},
        kept={"method": "POST", "url": "/v1/chat/completions"},
        custom_id="x",
    )


def test_an_unknown_key_of_a_body_is_left_for_the_parameters_to_refuse() -> None:
    assert asked(body={"prompt": "a", "temprature": 1}).sampling == {"temprature": 1}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"prompt": "\xff"}', "no JSON"),
        ("7", "must be a JSON object"),
        ('"text"', "must be a JSON object"),
        ("{}", "either 'prompt' or 'messages'"),
        ('{"prompt": null}', "either 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": []}', "either 'prompt' or 'messages'"),
        ('{"prompt": "a", "tools": []}', "'tools' is for 'messages'"),
        ('{"body": []}', "body=.* must be a JSON object"),
        ('{"body": {"prompt": "a", "stream": true}}', "stream=True must be False"),
        ('{"url": "/v1/embeddings", "body": {"prompt": "a"}}', "url='/v1/embeddings' must be one of"),
    ],
)
def test_a_bad_line_says_why(line: str, why: str) -> None:
    with pytest.raises((TypeError, ValueError), match=why):
        asked_in_json(line.encode("latin-1"))


@given(st.binary(max_size=60))
def test_no_bytes_raise_another_error(line: bytes) -> None:
    for read in (asked_in_json, asked_in_text):
        try:
            assert isinstance(read(line), Asked)
        except (TypeError, ValueError):
            pass


def output(*completions: CompletionOutput) -> RequestOutput:
    return RequestOutput("0", "Hi", [1, 2], None, list(completions), True, num_cached_tokens=1)


def test_results_are_openai_s_choices_with_usage_and_what_was_kept() -> None:
    completions = [CompletionOutput(i, f"text {i}", [3] * i, finish_reason="stop") for i in range(2)]
    line = Asked(messages=MESSAGES, kept={"label": 1}, custom_id="x")
    assert result_record(line, output(*completions), has_text=True) == {
        "custom_id": "x",
        "choices": [
            {
                "index": i,
                "message": {"role": "assistant", "content": f"text {i}"},
                "finish_reason": "stop",
                "stop_reason": None,
            }
            for i in range(2)
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 1,
            "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
        "input": {"label": 1},
    }


def test_a_request_that_failed_is_an_error_and_no_answer() -> None:
    failed = CompletionOutput(0, "", [], finish_reason="error", stop_reason="logits are NaN")
    assert result_record(Asked(prompt="Hi"), output(failed), has_text=True) == {"error": "logits are NaN"}
