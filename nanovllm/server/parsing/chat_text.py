"""Reads one answer's text as it arrives: reasoning first, then what remains is content and tool calls.

    text = chat_text(prompt, reasoning_parser="qwen3", tool_call_parser="hermes")
    for delta in deltas:
        send(text.feed(delta))
    send(text.finish())

Without streaming: `read(text, answer)` gives the whole message.
"""

from collections.abc import Collection, Iterable

from nanovllm.server.parsing.pieces import Content, Message, Piece, append, message_of
from nanovllm.server.parsing.reader import Reader
from nanovllm.server.parsing.reasoning import reasoning_reader
from nanovllm.server.parsing.tool_calls import tool_call_reader
from nanovllm.server.parsing.tool_schema import Function


class ChatText:
    """A reader of reasoning, whose content goes to a reader of tool calls. Either may be absent."""

    def __init__(self, reasoning: Reader | None, calls: Reader | None) -> None:
        self._reasoning, self._calls = reasoning, calls

    def feed(self, delta: str) -> list[Piece]:
        """The pieces that are certain once this text has arrived."""
        return self._read_calls(self._reasoning.feed(delta) if self._reasoning else [Content(delta)])

    def finish(self) -> list[Piece]:
        """The last pieces: no more text comes."""
        pieces = self._read_calls(self._reasoning.finish() if self._reasoning else [])
        return pieces + self._calls.finish() if self._calls else pieces

    def _read_calls(self, pieces: Iterable[Piece]) -> list[Piece]:
        read: list[Piece] = []
        for piece in pieces:
            parts = self._calls.feed(piece.text) if self._calls and isinstance(piece, Content) else [piece]
            for part in parts:
                append(read, part)
        return read


def chat_text(
    prompt: str = "",
    reasoning_parser: str | None = None,
    tool_call_parser: str | None = None,
    functions: Collection[Function] = (),
    tool_choice: str | Function = "none",
    whole_calls: bool = False,
) -> ChatText:
    """What reads one answer; each of n answers needs its own.

    Args:
        prompt: its text, or its end: it tells whether the answer begins inside of the reasoning.
        reasoning_parser, tool_call_parser: vLLM's names; None: the text has no reasoning, or no calls.
        functions: the request's tools.
        tool_choice: as `tool_schema.check_tool_choice` returns it. "auto" finds no calls without a parser of them.
        whole_calls: see `tool_call_reader`.

    Raises:
        ValueError: there is no such parser.
    """
    reasoning = reasoning_reader(reasoning_parser, prompt) if reasoning_parser is not None else None
    calls = None
    if tool_choice != "none" and (tool_choice != "auto" or tool_call_parser is not None):
        calls = tool_call_reader(tool_call_parser, functions, tool_choice, whole_calls)
    return ChatText(reasoning, calls)


def read(text: ChatText, answer: str) -> Message:
    """A whole answer as one message."""
    return message_of([*text.feed(answer), *text.finish()])
