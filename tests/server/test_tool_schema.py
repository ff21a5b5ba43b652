"""A request's tools are checked by name, and a forced answer is read as the calls that its schema allows."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.server.parsing.chat_text import chat_text, read
from nanovllm.server.parsing.pieces import CallBegin, Content, message_of
from nanovllm.server.parsing.tool_schema import NO_PARAMETERS, Function, check_tool_choice, check_tools, forced_schema

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": OBJECT, **function}}


def test_tools_in_openais_form_are_taken() -> None:
    tools = [tool(), tool(name="g-2", description="does", strict=True), tool(name="h", parameters=None, strict=None)]
    assert check_tools([*tools, {"type": "function", "function": {"name": "i", "parameters": {}}}]) == [
        Function("f", OBJECT),
        Function("g-2", OBJECT, "does", True),
        Function("h", NO_PARAMETERS),
        Function("i", NO_PARAMETERS),
    ]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("f", "tools='f' must be a list"),
        (["f"], r"tools\[0\]='f' must be an object"),
        ([{"type": "web_search"}], r"tools\[0\].type='web_search' must be 'function'"),
        ([{"type": "function"}], r"tools\[0\].function=None must be an object"),
        ([{**tool(), "extra": 1}], r"tools\[0\] has 'extra': it may have type, function"),
        ([tool(extra=1)], r"tools\[0\].function has 'extra': it may have name, description, parameters, strict"),
        ([tool(), tool(name="a b")], r"tools\[1\].function.name='a b' must be 1 to 64 letters"),
        ([tool(name="f\n")], r"tools\[0\].function.name='f\\n' must be 1 to 64 letters"),
        ([tool(name="x" * 65)], r"must be 1 to 64 letters"),
        ([tool(name=None)], r"tools\[0\].function.name=None must be 1 to 64 letters"),
        ([tool(), tool(name="g"), tool()], r"tools\[2\].function.name='f' is the name of tools\[0\] too"),
        ([tool(description=1)], r"tools\[0\].function.description=1 must be a string"),
        ([tool(strict="yes")], r"tools\[0\].function.strict='yes' must be true or false"),
        ([tool(parameters=[])], r"tools\[0\].function.parameters=\[\] must be a JSON schema"),
        ([tool(parameters={"type": "array"})], r"tools\[0\].function.parameters.type='array' must be 'object'"),
        ([tool(parameters={"properties": {}})], r"tools\[0\].function.parameters.type=None must be 'object'"),
    ],
)
def test_a_tool_of_another_form_is_refused_by_its_place(tools: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_tools(tools)


def named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_a_tool_choice_names_what_may_be_called() -> None:
    functions = check_tools([tool(), tool(name="auto")])
    assert [check_tool_choice(choice, functions) for choice in ("none", "auto", "required", None)] == [
        "none",
        "auto",
        "required",
        "auto",
    ]
    assert check_tool_choice(named("auto"), functions) is functions[1]
    assert [check_tool_choice(choice, []) for choice in ("none", "auto", None)] == ["none", "none", "none"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("any", "tool_choice='any' must be one of none, auto, required, or an object"),
        (1, "tool_choice=1 must be an object"),
        ({"type": "tool"}, "tool_choice.type='tool' must be 'function'"),
        ({"type": "function", "name": "f"}, "tool_choice has 'name': it may have type, function"),
        (named("g"), "tool_choice.function.name='g' must be the name of one of the tools"),
        ({"type": "function"}, "tool_choice.function=None must be an object"),
    ],
)
def test_a_tool_choice_of_another_form_is_refused(choice: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_tool_choice(choice, check_tools([tool()]))


def test_a_choice_that_needs_tools_is_refused_without_them() -> None:
    for choice in ("required", named("f")):
        with pytest.raises(ValueError, match="tool"):
            check_tool_choice(choice, [])


def test_a_free_answer_has_no_schema_and_a_named_one_its_parameters() -> None:
    functions = check_tools([tool()])
    assert forced_schema(functions, "auto") is None and forced_schema(functions, "none") is None
    assert forced_schema(functions, functions[0]) == OBJECT


def resolve(schema: dict[str, Any], reference: str) -> Any:
    for key in reference.removeprefix("#/").split("/"):
        schema = schema[key]
    return schema


def test_a_required_answer_is_a_list_of_calls_whose_references_stay_within_their_function() -> None:
    def parameters(node: dict[str, Any]) -> dict[str, Any]:
        properties = {"node": {"$ref": "#/$defs/node"}, "self": {"$ref": "#"}, "$ref": {"enum": [{"$ref": "#/x"}]}}
        properties["default"] = {"$ref": "#/$defs/node"}
        return {"type": "object", "properties": properties, "$defs": {"node": node}}

    nodes = {"f": {"type": "integer"}, "g": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}
    functions = check_tools([tool(name=name, parameters=parameters(node)) for name, node in nodes.items()])
    schema = forced_schema(functions, "required")
    assert (schema["type"], schema["minItems"], "maxItems" in schema) == ("array", 1, False)
    assert forced_schema(functions, "required", parallel_tool_calls=False)["maxItems"] == 1
    for call, name in zip(schema["items"]["anyOf"], nodes, strict=True):
        assert call["properties"]["name"] == {"const": name} and call["required"] == ["name", "parameters"]
        of_function = resolve(schema, call["properties"]["parameters"]["$ref"])
        properties = of_function["properties"]
        assert resolve(schema, properties["self"]["$ref"]) is of_function
        assert resolve(schema, properties["node"]["$ref"]) is of_function["$defs"]["node"]
        assert resolve(schema, properties["default"]["$ref"]) is of_function["$defs"]["node"]
        assert properties["$ref"] == {"enum": [{"$ref": "#/x"}]}  # a property of that name, and data
    recursive = resolve(schema, "#/$defs/g/$defs/node/anyOf")[1]
    assert resolve(schema, recursive["$ref"])["anyOf"][1] is recursive
    assert functions[1].parameters["$defs"]["node"] == nodes["g"], "the request's own schema has changed"


values = st.dictionaries(
    st.text(max_size=4), st.one_of(st.integers(), st.text(max_size=6), st.lists(st.none())), max_size=3
)


@given(
    calls=st.lists(st.tuples(st.sampled_from(["f", "auto"]), values), min_size=1, max_size=3),
    indent=st.sampled_from([None, 1]),
    size=st.integers(1, 9),
    whole=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_forced_answer_is_read_as_the_calls_it_lists(
    calls: list[tuple[str, dict[str, Any]]], indent: int | None, size: int, whole: bool
) -> None:
    functions = check_tools([tool(), tool(name="auto")])
    listed = json.dumps([{"name": name, "parameters": value} for name, value in calls], indent=indent)
    alone = json.dumps(calls[0][1], indent=indent)
    choices = [("required", listed, calls)]
    choices += [(function, alone, [(function.name, calls[0][1])]) for function in functions]
    for choice, text, expected in choices:
        for parser in (None, "hermes", "mistral"):
            options = {"tool_call_parser": parser, "tool_choice": choice, "whole_calls": whole, "functions": functions}
            reader = chat_text("<think>\n", "qwen3", **options)
            deltas = [f"why</think>\n\n{text}"[i : i + size] for i in range(0, len(text) + 14, size)]
            message = message_of([piece for delta in deltas for piece in reader.feed(delta)] + reader.finish())
            assert (message.reasoning, message.content) == ("why", "")
            assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == expected
            assert all(call.arguments in text for call in message.tool_calls)
            assert len(message.tool_calls[0].id) == (9 if parser == "mistral" else 29)


def test_a_forced_answer_streams_and_what_breaks_off_is_content_only_when_calls_are_to_be_whole() -> None:
    functions = check_tools([tool()])
    reader = chat_text(tool_choice="required", functions=functions)
    assert reader.feed('[{"name": "f", "par') == []
    assert [type(piece) for piece in reader.feed('ameters": {"a": ')][:1] == [CallBegin]
    text = '[{"name": "f", "parameters": {"a": 1}}, {"name": "f", "para'
    assert read(chat_text(tool_choice="required", whole_calls=True), text).content == ', {"name": "f", "para'
    assert chat_text(tool_choice=functions[0], whole_calls=True).feed('no {"a": 1}') == [Content('no {"a": 1}')]


def test_only_an_answer_in_the_models_own_format_needs_its_parser() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for choice in ("none", "auto"):
        assert read(chat_text(tool_choice=choice), text).content == text
    assert read(chat_text(tool_choice="none", tool_call_parser="hermes"), text).content == text
