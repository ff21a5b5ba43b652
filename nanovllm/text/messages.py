"""Rewrites messages into the form that a chat template handles.

OpenAI's messages say the same in several ways: content is a string, a list of parts, or None, and a tool call's
arguments are JSON in a string. A template handles one of these forms. A template that writes `message.content` prints
a list as Python does, or prints nothing, and a template that loops over parts finds none in a string. So this module
parses the template, as vLLM does, and writes the messages in its form. The caller's own messages stay as they are.
"""

import json
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nanovllm.text.surrogates import refuse_surrogates

if TYPE_CHECKING:
    from jinja2 import nodes

CONTENT_FORMATS = ("auto", "string", "openai")
_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


def plain(value: Any, name: str) -> Any:
    """A copy made of dicts, lists and strings; pydantic's objects and dataclasses become dicts. Other values stay.

    Raises ValueError, which calls the value `name`, if a string has a lone surrogate.
    """
    if isinstance(value, str):
        refuse_surrogates(value, name)
        return value
    if is_object(value):
        value = value.model_dump() if hasattr(value, "model_dump") else asdict(value)
    if isinstance(value, dict):
        return {plain(key, f"a key of {name}"): plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    return value


def is_object(value: Any) -> bool:
    """Whether `plain` makes a dict of it: a pydantic object, as the openai package returns them, or a dataclass."""
    return not isinstance(value, type) and (hasattr(value, "model_dump") or is_dataclass(value))


@lru_cache(maxsize=32)
def content_format(chat_template: str) -> str:
    """The form of a message's content that a template handles.

    Returns:
        "string"; "openai" (a list of parts) if the template loops over the content; "either" if it also tests
        `content is string`.
    """
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template  # which knows transformers' own tags

    tree = _compile_jinja_template(chat_template).environment.parse(chat_template)
    names = {"content"}
    while not names.issuperset(found := set(_names_of_content(tree, names))):
        names |= found
    if not any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For)):
        return "string"
    asks = any(test.name == "string" and _is_content(test.node, names) for test in tree.find_all(nodes.Test))
    return "either" if asks else "openai"


def _is_content(node: "nodes.Node", names: set[str]) -> bool:
    """Whether an expression is a message's content, perhaps behind a filter or a slice."""
    from jinja2 import nodes

    while isinstance(node, nodes.Filter) or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)):
        node = node.node
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def _names_of_content(tree: "nodes.Template", names: set[str]) -> list[str]:
    """The variables that are set to content, and the parameters of macros that are called with it."""
    from jinja2 import nodes

    assigned = [(assign.target, assign.node) for assign in tree.find_all(nodes.Assign)]
    macros = {macro.name: macro.args for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name):
            assigned += zip(macros.get(call.node.name, ()), call.args, strict=False)
    return [to.name for to, value in assigned if isinstance(to, nodes.Name) and _is_content(value, names)]


def as_template_takes(message: dict[str, Any], form: str, name: str) -> dict[str, Any]:
    """Rewrites a message, which `plain` has copied, for a template of this `content_format`.

    Parts become one string, joined by newlines, or a string becomes one part; a tool's answer is always a string.
    Arguments of tool calls become dicts. Fields that are None are dropped; content that is None becomes the refusal, or
    empty. `reasoning` and `reasoning_content` are two names of one field.

    Raises:
        TypeError, ValueError: naming the field (of the message called `name`) that has another form, or is no text.
    """
    message = {key: value for key, value in message.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise TypeError(f"{name}['role']={message.get('role')!r:.80} must be a string")
    content = message.get("content", message.get("refusal", []))
    if not isinstance(content, (str, list)):
        raise TypeError(f"{name}['content']={content!r:.80} must be a string, a list of parts, or None")
    parts = [content] if isinstance(content, str) else content
    texts = [_text_of(part, f"{name}['content'][{i}]") for i, part in enumerate(parts)]
    is_string = form == "string" or message["role"] == "tool" or (form == "either" and not isinstance(content, list))
    if is_string or (form == "either" and not texts):
        message["content"] = "\n".join(texts)
    else:
        message["content"] = _Parts({"type": "text", "text": text} for text in texts)
    for one, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
        if one in message:
            message.setdefault(other, message[one])
    calls = message.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise TypeError(f"{name}['tool_calls']={calls!r:.80} must be a list of tool calls, or None")
    if calls:  # drops an empty list: some templates only test whether the field is there
        message["tool_calls"] = [_tool_call(call, f"{name}['tool_calls'][{i}]") for i, call in enumerate(calls)]
    return message


class _Parts(list):
    """A list of parts that prints as their text: some templates loop over a user's content but print an assistant's."""

    def __str__(self) -> str:
        return "\n".join(part["text"] for part in self)

    def __add__(self, other: Any) -> Any:
        return str(self) + other if isinstance(other, str) else super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        return other + str(self) if isinstance(other, str) else NotImplemented


def _text_of(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise TypeError(f"{name}={part!r:.80} must be a dict with a 'type', or a string")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise ValueError(f"{name} is of type {kind!r:.80}: a text model takes {', '.join(_TEXT_PARTS)}")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise TypeError(f"{name}[{_TEXT_PARTS[kind]!r}]={text!r:.80} must be a string")
    return text


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """A tool call with its arguments as a dict. It may come without the outer {"function": …}."""
    if not isinstance(call, dict):
        raise TypeError(f"{name}={call!r:.80} must be a dict with a 'function'")
    if "function" in call:
        return {**call, "function": _tool_call(call["function"], f"{name}['function']")}
    arguments, name = call.get("arguments"), f"{name}['arguments']"
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}  # a function without parameters
    elif isinstance(arguments, str):
        try:
            arguments = plain(json.loads(arguments), name)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{name}={arguments!r:.80} must be JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}={call['arguments']!r:.80} must be a JSON object or a dict")
    return {**call, "arguments": arguments}
