"""What a conversation says reaches the template, in whichever of OpenAI's forms it is said; the caller's stays his."""

import json
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanovllm import demo_model
from nanovllm.text.chat import chat_prompt, chat_prompts
from nanovllm.text.messages import content_format

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)
# As Qwen3's own, which writes nothing for what is no string, takes tool calls with or without "function", and gives
# the reasoning of the last turn back.
QWEN3 = """
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- set reasoning = message.reasoning_content %}
        {%- if reasoning is string %}{{- '<think>' + reasoning + '</think>' }}{%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""".strip()
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}s:{{ m.content }}{% else %}"
    "{% for part in m.content %}p:{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
MACRO = (
    "{% macro render(body) %}{% for item in body %}[{{ item.text }}]{% endfor %}{% endmacro %}"
    "{% for m in messages %}<{{ m.role }}>{{ render(m.content) }}{% endfor %}"
)
ALIAS = (
    "{% for m in messages[1:] %}{% set parts = m['content'] %}"
    "{% for part in parts | list %}{{ part.text }}{% endfor %}{% endfor %}"
)
LOOP = "{{% for m in messages %}}{}{{% endfor %}}"
ASKED = [{"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": "now?"}]}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model())


def written(tokenizer: Any, messages: Any, template: str, **options: Any) -> str:
    options = {"add_generation_prompt": False, **options}
    prompt = chat_prompt(tokenizer, messages, chat_template=template, **options)
    assert prompt["prompt_token_ids"] == tokenizer.encode(prompt["prompt"], add_special_tokens=False)
    return prompt["prompt"]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (CHATML, "string"),
        (QWEN3, "string"),
        (PARTS, "openai"),
        (EITHER, "either"),
        (MACRO, "openai"),
        (ALIAS, "openai"),
        (LOOP.format("{% generation %}{{ m.content }}{% endgeneration %}"), "string"),
        (LOOP.format("{% for line in m.content.split('\\n') %}{{ line }}{% endfor %}"), "string"),
        (LOOP.format("{% for call in m.tool_calls %}{% break %}{% endfor %}{{ m.content }}"), "string"),
        (LOOP.format("{% for part in m.content | selectattr('type') %}{{ part.text }}{% endfor %}"), "openai"),
    ],
)
def test_a_template_shows_which_form_of_content_it_takes(template: str, form: str) -> None:
    assert content_format(template) == form


def test_parts_reach_a_template_that_takes_strings(tokenizer: Any) -> None:
    for template in (CHATML, QWEN3):
        assert written(tokenizer, ASKED, template) == "<|im_start|>user\nWhat\nnow?<|im_end|>\n"


def test_strings_reach_a_template_that_loops_over_parts(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *ASKED]
    assert written(tokenizer, messages, PARTS) == "<system>Be brief.<user>Whatnow?"
    assert written(tokenizer, messages, MACRO) == "<system>[Be brief.]<user>[What][now?]"


def test_a_template_may_loop_over_one_message_and_print_another(tokenizer: Any) -> None:
    texts = ("You.", "Hi", "Yes?")
    strings = [{"role": r, "content": t} for r, t in zip(("system", "user", "assistant"), texts, strict=True)]
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in strings]
    template = (
        "{{ messages[0].content | trim }}/{% for part in messages[1].content %}{{ part.text }}{% endfor %}/"
        "{{ messages[2].content }}/{{ '<' + messages[2].content + '>' }}"
    )
    for messages in (strings, parts):
        assert written(tokenizer, messages, template) == "You./Hi/Yes?/<Yes?>"
        if messages is strings:
            continued = written(tokenizer, messages, template.split("/{{ '<'")[0], continue_final_message=True)
            assert continued == "You./Hi/Yes?"


def test_a_template_that_takes_both_gets_what_was_said(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *ASKED, {"role": "assistant", "content": None}]
    assert written(tokenizer, messages, EITHER) == "<system>s:Be brief.<user>p:Whatp:now?<assistant>s:"


def test_the_form_can_be_chosen(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, *ASKED]
    by_form = {
        form: written(tokenizer, messages, EITHER, chat_template_content_format=form) for form in ("string", "openai")
    }
    assert by_form == {"string": "<user>s:Hi<user>s:What\nnow?", "openai": "<user>p:Hi<user>p:Whatp:now?"}
    for value, error in (("strings", ValueError), (None, TypeError), (["auto"], TypeError)):
        with pytest.raises(error, match="chat_template_content_format=.* must be one of auto, string, openai"):
            written(tokenizer, messages, EITHER, chat_template_content_format=value)


def test_the_tokenizers_own_template_is_looked_at_like_one_that_is_given() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokenizer.chat_template = {"default": CHATML, "tool_use": PARTS}
    assert chat_prompt(tokenizer, ASKED)["prompt"] == "<|im_start|>user\nWhat\nnow?<|im_end|>\n"
    string = [{"role": "user", "content": "Hi"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert chat_prompt(tokenizer, string, tools=[tool])["prompt"] == "<user>Hi"
    assert chat_prompt(tokenizer, string, chat_template="tool_use")["prompt"] == "<user>Hi"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ([], ""),
        ("", ""),
        (["a", {"type": "text", "text": "b"}], "a\nb"),
        (({"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}), "a\nb"),
        ([{"type": "refusal", "refusal": "no"}, {"type": "thinking", "thinking": "hm", "closed": True}], "no\nhm"),
    ],
)
@pytest.mark.parametrize("role", ["user", "tool"])
def test_content_of_every_form_is_written(tokenizer: Any, content: Any, text: str, role: str) -> None:
    messages = [{"role": role, "content": content}]
    assert written(tokenizer, messages, CHATML) == f"<|im_start|>{role}\n{text}<|im_end|>\n"
    assert text in written(tokenizer, messages, QWEN3)
    if role != "tool":  # templates take a tool's answer as a string, whatever else they loop over
        assert written(tokenizer, messages, PARTS) == f"<{role}>" + text.replace("\n", "")


def test_messages_without_content_and_refusals_are_written(tokenizer: Any) -> None:
    assert written(tokenizer, [{"role": "assistant"}], CHATML) == "<|im_start|>assistant\n<|im_end|>\n"
    refused = [{"role": "assistant", "content": None, "refusal": "I will not."}]
    assert written(tokenizer, refused, CHATML) == "<|im_start|>assistant\nI will not.<|im_end|>\n"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"city": "Köln",  "n": [1]}', '{"city": "Köln", "n": [1]}'),
        ({"a": 1}, '{"a": 1}'),
        ("", "{}"),
        (" ", "{}"),
        (None, "{}"),
    ],
)
def test_arguments_of_tool_calls_are_dicts_to_the_template(tokenizer: Any, arguments: Any, shown: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call], "audio": None},
        {"role": "tool", "tool_call_id": "1", "name": "weather", "content": [{"type": "text", "text": "sun"}]},
    ]
    before = deepcopy(messages)
    expected = (
        '<|im_start|>assistant\n<tool_call>{"name": "weather", "arguments": ' + shown + "}</tool_call><|im_end|>\n"
    )
    expected += "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n"
    assert written(tokenizer, messages, QWEN3) == expected
    messages[0]["tool_calls"] = [call["function"]]  # as transformers' documentation has it
    assert written(tokenizer, messages, QWEN3) == expected
    messages[0]["tool_calls"] = [call]
    assert messages == before


def test_no_tool_calls_are_as_if_the_field_were_not_there(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ 'calls' if m.tool_calls is defined else 'none' }}{% endfor %}"
    for calls in ([], None):
        assert written(tokenizer, [{"role": "assistant", "content": "a", "tool_calls": calls}], template) == "none"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_has_two_names(tokenizer: Any, field: str) -> None:
    messages = [{"role": "assistant", "content": "Yes", field: "Let me see."}]
    assert "<think>Let me see.</think>Yes" in written(tokenizer, messages, QWEN3)
    both = "{{ messages[0].reasoning }}/{{ messages[0].reasoning_content }}"
    assert written(tokenizer, messages, both) == "Let me see./Let me see."


def test_other_fields_are_the_templates_business(tokenizer: Any) -> None:
    messages = [{"role": "user", "name": "Ann", "content": "Hi", "task": {"deep": ["x"]}}]
    assert written(tokenizer, messages, "{{ messages[0].name }} {{ messages[0].task.deep[0] }}") == "Ann x"


class Pydantic:
    """As far as a message or a schema of pydantic's is one."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def model_dump(self) -> dict[str, Any]:
        return self.fields


@dataclass
class Schema:
    type: str
    function: dict[str, Any]


def test_objects_of_pydantic_and_dataclasses_are_taken(tokenizer: Any) -> None:
    call = Pydantic(id="1", type="function", function=Pydantic(name="f", arguments='{"a":1}'))
    answer = Pydantic(role="assistant", content=None, refusal=None, tool_calls=[call], function_call=None)
    expected = '<|im_start|>assistant\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><|im_end|>\n'
    assert written(tokenizer, [answer], QWEN3) == expected
    (prompt,) = chat_prompts(tokenizer, [answer], chat_template=QWEN3, add_generation_prompt=False)
    assert prompt["prompt"] == expected

    def multiply(a: int) -> int:
        """Multiply by two.

        Args:
            a: the number.
        """
        return a

    function = {"name": "f", "parameters": {}}
    as_dict = {"type": "function", "function": function}
    for tool in (as_dict, Schema("function", function), Pydantic(**as_dict)):
        text = written(tokenizer, ASKED, QWEN3, tools=(tool,))
        assert json.loads(text.split("<|im_end|>\n")[1]) == [as_dict]
    assert "Multiply by two." in written(tokenizer, ASKED, QWEN3, tools=[multiply])


def test_final_message_is_continued_whatever_its_form(tokenizer: Any) -> None:
    for content in ("It is ", [{"type": "text", "text": "It is "}]):
        messages = [*ASKED, {"role": "assistant", "content": content}]
        for template, text in ((CHATML, "<|im_start|>assistant\nIt is "), (PARTS, "<assistant>It is ")):
            assert written(tokenizer, messages, template, continue_final_message=True).endswith(text)


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
BAD_CONTENT: dict[str, tuple[Any, type[Exception], str]] = {
    "image": ([{"type": "text", "text": "What?"}, IMAGE], ValueError, r"\['content'\]\[1\] is of type 'image_url'"),
    "audio": ([{"type": "input_audio", "input_audio": {}}], ValueError, r"\[0\] is of type 'input_audio': .*takes "),
    "video": ([{"type": "video_url"}], ValueError, r"\[0\] is of type 'video_url'"),
    "no type": ([{"text": "a"}], ValueError, r"\[0\] is of type None"),
    "type of a wrong type": ([{"type": ["text"]}], ValueError, r"\[0\] is of type \['text'\]"),
    "no text": ([{"type": "text"}], TypeError, r"\[0\]\['text'\]=None must be a string"),
    "text of parts": ([{"type": "text", "text": ["a"]}], TypeError, r"\[0\]\['text'\]=\['a'\] must be a string"),
    "number as part": ([3], TypeError, r"\[0\]=3 must be a dict"),
    "number": (3, TypeError, r"\['content'\]=3 must be a string, a list of parts, or None"),
    "dict": ({"type": "text", "text": "a"}, TypeError, r"\['content'\]=.* must be a string, a list of parts"),
}


@pytest.mark.parametrize("template", [QWEN3, PARTS, EITHER], ids=["string", "openai", "either"])
@pytest.mark.parametrize("name", BAD_CONTENT)
def test_what_is_no_text_is_refused_by_its_place(tokenizer: Any, name: str, template: str) -> None:
    content, error, cause = BAD_CONTENT[name]
    with pytest.raises(
        error, match=r"messages\[1\]" + (cause if cause.startswith(r"\['") else r"\['content'\]" + cause)
    ):
        written(tokenizer, [{"role": "system", "content": "Look."}, {"role": "user", "content": content}], template)


@pytest.mark.parametrize(
    ("calls", "error", "cause"),
    [
        ([{"function": {"arguments": "{'a': 1}"}}], ValueError, r"\[0\]\['function'\]\['arguments'\]=.* must be JSON"),
        ([{"function": {"arguments": "[" * 10**6}}], ValueError, r"\['arguments'\]='\[+ must be JSON"),
        ([{"function": {"arguments": "[1]"}}], ValueError, r"\['arguments'\]='\[1\]' must be a JSON object"),
        ([{"function": {"arguments": 3}}], ValueError, r"\['arguments'\]=3 must be a JSON object"),
        ([{"function": {"arguments": '"\\ud800"'}}], ValueError, r"\['arguments'\]=.* lone surrogate"),
        ([{"function": "f"}], TypeError, r"\[0\]\['function'\]='f' must be a dict"),
        (["f"], TypeError, r"\['tool_calls'\]\[0\]='f' must be a dict"),
        ({"function": {}}, TypeError, r"\['tool_calls'\]=.* must be a list"),
    ],
)
def test_tool_calls_of_another_form_are_refused(tokenizer: Any, calls: Any, error: type, cause: str) -> None:
    with pytest.raises(error, match=r"messages\[0\].*" + cause):
        written(tokenizer, [{"role": "assistant", "content": None, "tool_calls": calls}], QWEN3)


def test_messages_of_another_form_are_refused(tokenizer: Any) -> None:
    for messages in ([{"role": None, "content": "a"}], [{"role": 3, "content": "a"}]):
        with pytest.raises(TypeError, match=r"messages\[0\]\['role'\]=.* must be a string"):
            written(tokenizer, messages, CHATML)
    with pytest.raises(TypeError, match=r"messages\[1\]=.* must be a list of dicts"):
        chat_prompts(tokenizer, [ASKED, ASKED[0]], chat_template=CHATML)
    with pytest.raises(ValueError, match="does not take messages: Expected an expression"):
        written(tokenizer, ASKED, "{% for m in %}")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, r"messages\[0\]\['content'\]='a\\ud83d'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udcff" + "x" * 99}]}]},
            r"messages\[0\]\['content'\]\[0\]\['text'\]=…'\\udcffx+'… has a lone surrogate, '\\udcff' at character 0",
        ),
        ({"messages": [{"role": "us\ud800er", "content": ""}]}, r"messages\[0\]\['role'\]"),
        ({"messages": [{"role": "user", "name": "\ud800", "content": ""}]}, r"messages\[0\]\['name'\]"),
        ({"messages": [{"role": "user", "\ud800": "", "content": ""}]}, r"a key of messages\[0\]"),
        ({"chat_template": "\ud800"}, "chat_template="),
        ({"tools": [{"type": "function", "function": {"name": "\ud800"}}]}, r"tools\[0\]\['function'\]\['name'\]"),
        ({"chat_template_kwargs": {"date": "\ud800"}}, r"chat_template_kwargs\['date'\]"),
        ({"chat_template": "{{ '\\ud800' }}"}, "what the chat template makes of messages"),
    ],
)
def test_lone_surrogates_are_refused_by_their_place(tokenizer: Any, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        chat_prompt(tokenizer, **{"messages": ASKED, "chat_template": CHATML, **arguments})


def test_the_callers_objects_are_never_changed(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [*deepcopy(ASKED), {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "r"}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "And"}]})
    tools, kwargs = [{"type": "function", "function": {"name": "f"}}], {"documents": [{"title": "t"}]}
    before = deepcopy((messages, tools, kwargs))
    for template in (QWEN3, PARTS, EITHER):
        options = {"tools": tools, "chat_template_kwargs": kwargs, "continue_final_message": True}
        written(tokenizer, messages, template, **options)
    assert (messages, tools, kwargs) == before
