"""Model text becomes reasoning, content and tool calls, wherever the deltas end."""

import json
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.server.parsing.chat_text import ChatText, chat_text, read
from nanovllm.server.parsing.json_object import MOST_DEPTH, JsonObject
from nanovllm.server.parsing.pieces import CallArguments, CallBegin, Content, Message, Reasoning, message_of
from nanovllm.server.parsing.reasoning import detect_reasoning_parser, reasoning_reader
from nanovllm.server.parsing.tool_calls import TOOL_CALL_PARSERS, detect_tool_call_parser
from nanovllm.server.parsing.tool_schema import Function

fast = settings(max_examples=40, deadline=None)
TAGS = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "[THINK]"),
    *('{"name": "f", "arguments": {', '{"name":', '"parameters": {', "[{", "}", "}}", "}]", '"', "\\", ",", ";", "\n"),
)
names = st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True)
strings = st.one_of(st.text(max_size=8), st.sampled_from(TAGS))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), strings),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(strings, inner, max_size=3)),
    max_leaves=6,
)
arguments = st.builds(
    json.dumps,
    st.dictionaries(strings, values, max_size=3),
    ensure_ascii=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
calls = st.lists(st.tuples(names, arguments), min_size=1, max_size=3)
prose = st.text(st.characters(exclude_characters="<[{", exclude_categories=["Cs"]), max_size=20).map(str.strip)
garbage = st.lists(st.one_of(st.sampled_from(TAGS), st.text(max_size=3)), max_size=12).map("".join)


def hermes(calls: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {args}}}\n</tool_call>' for name, args in calls)


def hermes_2(calls: Iterable[tuple[str, str]]) -> str:
    return "".join(f'\n<tool_call>\n{{ "arguments": {args}, "name": "{name}"}}\n</tool_call> ' for name, args in calls)


def llama(calls: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f'{{"name": "{name}", "parameters": {args}}}' for name, args in calls)


def llama_tag(calls: Iterable[tuple[str, str]]) -> str:
    texts = (f'{{"type": "function", "name": "{name}", "parameters": {args}}}' for name, args in calls)
    return "<|python_tag|>" + ";".join(texts)


def mistral_list(calls: Iterable[tuple[str, str]]) -> str:
    texts = (f'{{"name": "{name}", "arguments": {args}, "id": "a1b2c3d4e"}}' for name, args in calls)
    return f"[TOOL_CALLS] [{', '.join(texts)}]"


def mistral(calls: Iterable[tuple[str, str]]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{args}" for name, args in calls)


def mistral_bare(calls: Iterable[tuple[str, str]]) -> str:
    return "".join(f"[TOOL_CALLS]{name}{args}" for name, args in calls)


def mistral_ids(calls: Iterable[tuple[str, str]]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[CALL_ID]a1b2c3d4e[ARGS]{args}" for name, args in calls)


FORMATS = {
    hermes: "hermes",
    hermes_2: "hermes",
    llama: "llama3_json",
    llama_tag: "llama3_json",
    mistral_list: "mistral",
    mistral: "mistral",
    mistral_bare: "mistral",
    mistral_ids: "mistral",
}


def cut(text: str, data: st.DataObject) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def streamed(text: ChatText, deltas: Iterable[str]) -> Message:
    """The message, after a look at what OpenAI's shape promises of the pieces."""
    pieces = [piece for delta in deltas for piece in text.feed(delta)] + text.finish()
    begun = [piece for piece in pieces if isinstance(piece, CallBegin)]
    assert [piece.index for piece in begun] == list(range(len(begun))) and len({piece.id for piece in begun}) == len(
        begun
    )
    open_call = None
    for piece in pieces:
        open_call = piece.index if isinstance(piece, CallBegin) else open_call
        assert not isinstance(piece, CallArguments) or piece.index == open_call
        assert isinstance(piece, CallBegin) or piece.text
    return message_of(pieces)


def plain(message: Message) -> tuple[str, str, list[tuple[str, str]]]:
    return message.reasoning, message.content, [(call.name, call.arguments) for call in message.tool_calls]


def reader(name: str, **options: Any) -> ChatText:
    return chat_text(tool_call_parser=name, tool_choice="auto", **options)


@pytest.mark.parametrize("render", FORMATS)
@given(calls=calls, content=prose, thought=prose, data=st.data())
@fast
def test_a_rendered_answer_is_read_as_it_was_rendered_wherever_it_is_cut(
    render: Callable[[Any], str], calls: list[tuple[str, str]], content: str, thought: str, data: st.DataObject
) -> None:
    text = f"<think>\n{thought}\n</think>\n\n{content}" + ("\n" if content else "") + render(calls)
    expected = (thought, content, calls)
    for whole in (True, False):
        options = {"reasoning_parser": "qwen3", "whole_calls": whole}
        assert plain(read(reader(FORMATS[render], **options), text)) == expected
        assert plain(streamed(reader(FORMATS[render], **options), cut(text, data))) == expected


@pytest.mark.parametrize("name", TOOL_CALL_PARSERS)
@given(text=garbage, data=st.data())
@fast
def test_garbage_is_read_alike_wherever_it_is_cut(name: str, text: str, data: st.DataObject) -> None:
    for whole in (True, False):
        options = {"reasoning_parser": "qwen3", "whole_calls": whole}
        once = read(reader(name, **options), text)
        assert plain(streamed(reader(name, **options), cut(text, data))) == plain(once)
        assert plain(streamed(reader(name, **options), text)) == plain(once)


@pytest.mark.parametrize("name", TOOL_CALL_PARSERS)
@given(text=garbage)
@fast
def test_text_without_a_whole_call_is_content_to_the_letter(name: str, text: str) -> None:
    message = read(reader(name, whole_calls=True), text)
    if message.tool_calls:
        assert all(isinstance(json.loads(call.arguments), dict) for call in message.tool_calls)
    else:
        assert message.content == text


BROKEN = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 1,}}\n</tool_call>',
    "llama3_json": '{"name": "f", "parameters": {"a": \'b\'}}',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "line\nbreak"}}]',
}


@pytest.mark.parametrize("name", TOOL_CALL_PARSERS)
def test_a_call_that_is_not_json_is_content_and_the_next_one_is_found(name: str) -> None:
    good = next(render for render, of in FORMATS.items() if of == name)([("g", "{}")])
    message = read(reader(name, whole_calls=True), f"One {BROKEN[name]} two\n{good}")
    assert plain(message) == ("", f"One {BROKEN[name]} two", [("g", "{}")])


@pytest.mark.parametrize("render", FORMATS)
def test_a_call_cut_off_is_content_whole_and_a_prefix_of_its_arguments_live(render: Callable[[Any], str]) -> None:
    args = '{"a": {"b": "text"}}'
    text = render([("f", args)])
    text = text[: text.index("xt")]
    assert plain(read(reader(FORMATS[render], whole_calls=True), text)) == ("", text, [])
    if render is not hermes_2:  # there the name has not come
        assert plain(read(reader(FORMATS[render]), text)) == ("", "", [("f", args[: args.index("xt")])])


@pytest.mark.parametrize("end", ["}}</tool_call> next", "] </tool_call>", "</tool_call>"])
def test_what_breaks_a_call_that_streams_is_content_to_the_letter(end: str) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1,' + end
    assert plain(read(reader("hermes"), text)) == ("", end, [("f", '{"a": 1,')])


def test_a_call_streams_while_its_arguments_arrive() -> None:
    text = reader("hermes")
    assert text.feed("Sure. <tool") == [Content("Sure.")]
    assert text.feed('_call>{"name": "f", "arguments"') == []
    begin, fragment = text.feed(': {"a": "x')
    assert isinstance(begin, CallBegin) and begin.name == "f" and fragment == CallArguments(0, '{"a": "x')
    assert text.feed("y\\u00") == [CallArguments(0, "y")]
    assert text.feed('e9"') == [CallArguments(0, '\\u00e9"')]
    assert text.feed("}}</tool_call>") == [CallArguments(0, "}")]
    assert text.finish() == []


def test_white_space_beside_calls_is_not_content_but_between_content_it_is() -> None:
    text = "A \n" + hermes([("f", "{}")]) + "\n" + hermes([("g", "{}")]) + "\n\nB\n"
    assert plain(read(reader("hermes"), text)) == ("", "A \n\n\n\nB", [("f", "{}"), ("g", "{}")])
    assert plain(read(reader("hermes"), " \n")) == ("", " \n", [])


def test_a_missing_closing_tag_does_not_lose_a_call() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}'
    assert plain(read(reader("hermes", whole_calls=True), text)) == ("", "", [("f", '{"a": 1}')])


def test_json_that_calls_no_tool_of_the_request_is_content_where_calls_have_no_tag() -> None:
    functions = [Function("f", {"type": "object"})]
    for text in ('{"name": "Ann", "parameters": {"age": 3}}', '{"parameters": {}, "name": "g"}', '{"name": "f"}'):
        for whole in (True, False):
            options = {"functions": functions, "whole_calls": whole}
            assert plain(read(reader("llama3_json", **options), text)) == ("", text, [])
    assert plain(read(reader("llama3_json", functions=functions), llama([("f", "{}")]))) == ("", "", [("f", "{}")])


def test_ids_have_the_form_that_clients_and_templates_take() -> None:
    for name, form in {"hermes": "call_[0-9a-f]{24}", "llama3_json": "call_.*", "mistral": "[a-zA-Z0-9]{9}"}.items():
        render = next(render for render, of in FORMATS.items() if of == name)
        message = read(reader(name), render([("f", "{}"), ("f", "{}")]))
        assert all(re.fullmatch(form, call.id) for call in message.tool_calls)
        assert message.tool_calls[0].id != message.tool_calls[1].id


@pytest.mark.parametrize(
    ("name", "prompt", "text", "expected"),
    [
        ("qwen3", "", "<think>\na\n</think>\n\nb", ("a", "b")),
        ("qwen3", "assistant\n<think>\n", "a\n</think>\n\nb", ("a", "b")),
        ("qwen3", "assistant\n<think>\n", "<think>\na</think>b", ("a", "b")),
        ("qwen3", "<think>\n\n</think>\n\n", "b", ("", "b")),
        ("qwen3", "", "<think>\n\n</think>\n\n    b\n", ("", "    b\n")),
        ("qwen3", "", "<think>cut off\n", ("cut off\n", "")),
        ("qwen3", "", " b </think> <think>c</think>", ("", " b </think> <think>c</think>")),
        ("qwen3", "", "<think>a\n\nb</thi\n</think>c", ("a\n\nb</thi", "c")),
        ("deepseek_r1", "", "a</think>b", ("a", "b")),
        ("deepseek_r1", "<think>\n\n</think>", "b", ("", "b")),
        ("mistral", "", "[THINK]a[/THINK]b", ("a", "b")),
    ],
)
def test_reasoning_is_split_from_the_answer_wherever_it_is_cut(
    name: str, prompt: str, text: str, expected: tuple[str, str]
) -> None:
    for i in range(len(text) + 1):
        message = streamed(chat_text(prompt, reasoning_parser=name), [text[:i], text[i:]])
        assert (message.reasoning, message.content) == expected


def test_reasoning_is_given_as_soon_as_it_is_certain() -> None:
    text = reasoning_reader("qwen3")
    assert text.feed("<think>\n") == []
    assert text.feed("one\n") == [Reasoning("one")]
    assert text.feed("two</th") == [Reasoning("\ntwo")]
    assert text.feed("ink>\n") == []
    assert text.feed("\nthree") == [Content("three")]
    assert text.finish() == []


def test_a_call_within_reasoning_is_reasoning() -> None:
    call = hermes([("f", "{}")])
    message = read(reader("hermes", reasoning_parser="qwen3"), f"<think>{call}</think>{call}")
    assert plain(message) == (call, "", [("f", "{}")])


@pytest.mark.parametrize(
    ("template", "reasoning", "calls"),
    [
        (
            r'{{- "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args>}" }}{{ "</think>" }}',
            "qwen3",
            "hermes",
        ),
        (r'"<tool_call>\n" }}{{- \'{"name": <function-name>, "arguments": <args-dict>}\n', None, "hermes"),
        (r'"<tool_call>\n<function=name>" "</think>"', "qwen3", None),
        ("""{{- "<|start_header_id|>" }}{{- '"parameters": ' }}""", None, "llama3_json"),
        ("{{ '<|start_header_id|>' + message['role'] }}", None, None),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}[THINK]", "mistral", "mistral"),
        ("{{ messages[0].content }}", None, None),
    ],
)
def test_the_parsers_are_found_in_the_chat_template(template: str, reasoning: str | None, calls: str | None) -> None:
    assert (detect_reasoning_parser(template), detect_tool_call_parser(template)) == (reasoning, calls)


def test_an_unknown_parser_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="reasoning_parser='qwen' must be one of qwen3, deepseek_r1, mistral"):
        chat_text(reasoning_parser="qwen")
    with pytest.raises(ValueError, match="tool_call_parser='qwen' must be one of hermes, llama3_json, mistral"):
        reader("qwen")
    with pytest.raises(ValueError, match="after the text has ended"):
        text = reader("hermes")
        text.finish()
        text.feed("more")


def is_json_object(text: str) -> bool:
    """By Python's parser, without what it takes beyond JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return isinstance(json.loads(text, parse_constant=refuse), dict)
    except ValueError:
        return False


@given(
    text=st.one_of(arguments, arguments.map(lambda text: text[:-1]), garbage.map(lambda text: "{" + text)),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_the_json_reader_agrees_with_pythons_about_what_is_an_object(text: str, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, max(0, len(text) - 1)))
    text = (
        text[:i]
        + data.draw(st.sampled_from(["", text[i : i + 1], '"', "0", "-", "}", ",", "\x01", "\\"]))
        + text[i + 1 :]
    )
    whole = JsonObject()
    end = whole.read(text, 0)
    ends = [n for n in range(len(text) + 1) if is_json_object(text[:n].lstrip(" \t\n\r"))]
    assert (whole.expected == "end") == bool(ends)
    if ends:
        assert end == ends[0]
    pieces, at = JsonObject(), 0
    for n in range(len(text) + 1):
        at = pieces.read(text[:n], at)
    assert (at, pieces.expected) == (end, whole.expected)


@pytest.mark.parametrize(
    "text",
    ['{"a": [1}', '{"a": [1]]', '{"a": {]', "{1: 2}", "{a: 1}", "{'a': 1}", '{"a": 01}', '{"a": 1.}', '{"a": NaN}']
    + ['{"a": "\n"}', '{"a": "\\x41"}', '{"a": "\\u12g4"}', '{"a", 1}', '{"a": 1,}', '{"a": [1,]}', '{"a" "b"}', "[]"],
)
def test_the_json_reader_stops_where_text_is_no_json(text: str) -> None:
    assert not is_json_object(text)
    parsed = JsonObject()
    assert parsed.read(text, 0) < len(text) and parsed.expected == "error"


def test_the_json_reader_refuses_objects_too_deep_for_other_parsers() -> None:
    for depth, expected in ((MOST_DEPTH, "end"), (MOST_DEPTH + 1, "error")):
        text = JsonObject()
        text.read('{"a":' * (depth - 1) + "{}" + "}" * (depth - 1), 0)
        assert text.expected == expected


@pytest.mark.parametrize("name", TOOL_CALL_PARSERS)
@pytest.mark.parametrize(
    "text",
    ["\n", '{"name": "f", "arguments": {"a":', '{"parameters": {"a": [', '<tool_call>{"arguments": {', "[TOOL_CALLS]"],
)
def test_no_text_takes_longer_than_in_proportion_to_its_length(name: str, text: str) -> None:
    start = time.process_time()
    read(reader(name, reasoning_parser="deepseek_r1", whole_calls=True), "</think>" + text * 2000)
    read(reader(name, reasoning_parser="deepseek_r1"), text * 2000)
    assert time.process_time() - start < 2  # the square of the length: minutes
