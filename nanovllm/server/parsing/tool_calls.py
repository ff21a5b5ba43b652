"""Finds tool calls in a model's text, in the formats that models are trained to write.

A format is data: what stands in front of a call's arguments, and what may follow a call. The arguments are one JSON
object in each format, and are given as the model wrote them. Text that turns out to be no call is content, tags and
all. White space beside a call is the format's: it is given only if more content follows it.

The tags are special tokens of some tokenizers: a request with tools needs `skip_special_tokens=False`.
"""

import secrets
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass

import regex
from regex import Match, Pattern

from nanovllm.server.parsing.json_object import JsonObject
from nanovllm.server.parsing.pieces import CallArguments, CallBegin, Content
from nanovllm.server.parsing.reader import Reader, Steps
from nanovllm.server.parsing.tool_schema import Function

_W = r"[ \t\n\r]{0,99}"  # bounded: a model that writes white space for ever is not held back for ever
_NAME = r'"(?P<name>[^"\\\x00-\x1f]{1,256})"'
# {"name": "f", "arguments": {    or, with the name behind the arguments,    {"arguments": {
_OBJECT = (
    rf'(?P<object>\{{){_W}(?:"type"{_W}:{_W}"function"{_W},{_W})?(?:"name"{_W}:{_W}{_NAME}{_W},{_W})?'
    rf'"(?:arguments|parameters)"{_W}:{_W}\{{'
)
_END_OF_OBJECT = regex.compile(rf'{_W}(?:,{_W}"name"{_W}:{_W}{_NAME}{_W})?(?:,{_W}"id"{_W}:{_W}"\w*"{_W})?\}}')
# get_weather[ARGS]{    get_weather[CALL_ID]a1b2c3d4e[ARGS]{    get_weather{
_BARE = rf'(?P<name>[^\s\[\]{{}}"]{{1,256}})(?:\[CALL_ID\]\w{{1,64}})?(?:\[ARGS\])?{_W}\{{'


def openai_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def mistral_id() -> str:
    """Mistral's chat templates take ids of nine letters and digits only."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True)
class Format:
    """How calls are written. Each pattern's last character is fixed, so more text never makes a match longer."""

    first: Pattern[str]  # up to the brace that opens the arguments
    after: Pattern[str] | None = None  # after a call: an end, or the next call up to its arguments' brace
    is_whole_text: bool = False  # a grammar holds the text to the format, so the first call is the text's beginning
    has_no_tag: bool = False  # only a function's name tells a call from JSON in an answer
    make_id: Callable[[], str] = openai_id


# vLLM's names for --tool-call-parser.
TOOL_CALL_PARSERS = {
    "hermes": Format(regex.compile(rf"<tool_call>{_W}{_OBJECT}"), regex.compile(rf"{_W}</tool_call>")),
    "llama3_json": Format(
        regex.compile(rf"(?:<\|python_tag\|>{_W})?{_OBJECT}"), regex.compile(rf"{_W};{_W}{_OBJECT}"), has_no_tag=True
    ),
    "mistral": Format(
        regex.compile(rf"\[TOOL_CALLS\]{_W}(?:\[{_W}{_OBJECT}|{_BARE})"),
        regex.compile(rf"{_W},{_W}{_OBJECT}|{_W}\]"),
        make_id=mistral_id,
    ),
}
# What `tool_schema.forced_schema` holds the text to: a list of calls, or one function's arguments.
_LIST = Format(regex.compile(rf"{_W}\[{_W}{_OBJECT}"), regex.compile(rf"{_W},{_W}{_OBJECT}|{_W}\]"), is_whole_text=True)
_ARGUMENTS = Format(regex.compile(rf"{_W}\{{"), is_whole_text=True)


def detect_tool_call_parser(chat_template: str) -> str | None:
    """The name for a model with this chat template; None if it asks for no format that is known here."""
    xml = ("<function=", "<arg_key>")  # Qwen3-Coder and GLM write no JSON between the same tags
    if "<tool_call>" in chat_template and not any(tag in chat_template for tag in xml):
        return "hermes"
    if "[TOOL_CALLS]" in chat_template:
        return "mistral"
    if "<|start_header_id|>" in chat_template and '"parameters' in chat_template:
        return "llama3_json"
    return None


def tool_call_reader(
    name: str | None,
    functions: Collection[Function] = (),
    tool_choice: str | Function = "auto",
    whole_calls: bool = False,
) -> Reader:
    """A reader of one answer. It gives Content, CallBegin and CallArguments.

    Args:
        name: one of TOOL_CALL_PARSERS; None if the model's format is unknown, and the choice is not "auto".
        functions: the request's tools.
        tool_choice: "auto"; "required" or a function if the text is held to `forced_schema`.
        whole_calls: give a call only once all of it has come: for answers that are not streamed. A call that breaks
            off, or is not JSON, is content then. Otherwise a call is given from its arguments' first character on,
            and if it breaks off there its arguments do too: the rest of the text is content.

    Raises:
        ValueError: there is no such parser.
    """
    if name not in TOOL_CALL_PARSERS and (name is not None or tool_choice == "auto"):
        raise ValueError(f"tool_call_parser={name!r:.80} must be one of {', '.join(TOOL_CALL_PARSERS)}")
    make_id = TOOL_CALL_PARSERS[name].make_id if name else openai_id
    if isinstance(tool_choice, Function):
        form = _ARGUMENTS
    else:
        form = _LIST if tool_choice == "required" else TOOL_CALL_PARSERS[name]
    names = {function.name for function in functions} if form.has_no_tag else set()
    forced = tool_choice.name if isinstance(tool_choice, Function) else None
    return Reader(lambda reader: _Calls(reader, form, make_id, names, forced, whole_calls).read())


class _Calls:
    """One answer's calls so far."""

    def __init__(
        self,
        reader: Reader,
        form: Format,
        make_id: Callable[[], str],
        names: Collection[str],
        forced: str | None,
        whole: bool,
    ) -> None:
        self.reader, self.form, self.make_id, self.whole = reader, form, make_id, whole
        self.names = names  # a call has one of these; any, if there are none
        self.forced = forced  # the function that the text is the arguments of
        self.num_calls = 0
        self.space: list[str] = []  # white space of the content that waits for the text behind it

    def read(self) -> Steps[None]:
        if self.form.is_whole_text:
            head = yield from self.reader.match(self.form.first)
            while head:
                head = yield from self._call(head)
        else:
            while head := (yield from self.reader.find(self.form.first, self._content)):
                while head:
                    head = yield from self._call(head)
        yield from self.reader.rest(self._content)
        if self.num_calls == 0:
            self.reader.give(Content("".join(self.space)))

    def _content(self, text: str) -> None:
        end = len(text.rstrip())
        if end:
            self.reader.give(Content("".join(self.space) + text[:end]))
            self.space.clear()
        self.space.append(text[end:])

    def _call(self, head: Match[str]) -> Steps[Match[str] | None]:
        """Reads a call, which begins the text. Returns the head of one that follows it in the same list."""
        reader, form = self.reader, self.form
        groups = head.groupdict()
        name = groups.get("name") or self.forced
        start = head.end() - 1
        is_live = name is not None and self._is_allowed(name) and not self.whole
        if is_live:
            self._begin(name)
            reader.take(start)
            start = 0
        end, is_json = yield from self._arguments(start, is_live)
        after_call, is_closed = end, not groups.get("object")
        if is_json and not is_closed and (tail := (yield from reader.match(_END_OF_OBJECT, end))):
            after_call, is_closed, name = tail.end(), True, name or tail["name"]
        if not is_live:
            if not (is_json and is_closed and name and self._is_allowed(name)):
                self._content(reader.take(after_call))
                return None
            self._begin(name)
            reader.give(CallArguments(self.num_calls - 1, reader.text[start:end]))
        reader.take(after_call)
        if not is_json:
            return None
        after = (yield from reader.match(form.after)) if form.after else None
        if after and after.groupdict().get("object"):
            return after
        reader.take(after.end() if after else 0)
        return None

    def _arguments(self, start: int, is_live: bool) -> Steps[tuple[int, bool]]:
        """Reads the arguments, from the character `start` of the text on.

        Returns where the reading ended, and whether they are a JSON object. `is_live`: gives and takes them at once.
        """
        arguments = JsonObject()
        while True:
            start = arguments.read(self.reader.text, start)
            if is_live:
                self.reader.give(CallArguments(self.num_calls - 1, self.reader.take(start)))
                start = 0
            if not arguments.is_open or self.reader.ended:
                return start, arguments.expected == "end"
            yield

    def _is_allowed(self, name: str) -> bool:
        return not self.names or name in self.names

    def _begin(self, name: str) -> None:
        self.reader.give(CallBegin(self.num_calls, self.make_id(), name))
        self.num_calls += 1
