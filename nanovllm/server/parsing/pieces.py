"""The pieces that an answer is streamed in, and the message that they add up to: plain data."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thought before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins: the index-th of the answer, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next fragment of a call's arguments, as the model wrote it. All fragments of a call are one JSON object."""

    index: int
    text: str


Piece = Reasoning | Content | CallBegin | CallArguments


@dataclass(slots=True)
class ToolCall:
    """A whole call; `arguments` is the JSON text of an object."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """A whole answer."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


def message_of(pieces: Iterable[Piece]) -> Message:
    """All pieces of an answer, in order, as one message."""
    message = Message()
    for piece in pieces:
        match piece:
            case Reasoning(text):
                message.reasoning += text
            case Content(text):
                message.content += text
            case CallBegin(_, id, name):
                message.tool_calls.append(ToolCall(id, name))
            case CallArguments(index, text):
                message.tool_calls[index].arguments += text
    return message


def append(pieces: list[Piece], piece: Piece) -> None:
    """Add a piece; text goes on in the last piece if that is of the same kind, and empty text adds nothing."""
    if not isinstance(piece, CallBegin) and not piece.text:
        return
    match pieces[-1:], piece:
        case [Content(before)], Content(text):
            pieces[-1] = Content(before + text)
        case [Reasoning(before)], Reasoning(text):
            pieces[-1] = Reasoning(before + text)
        case [CallArguments(index, before)], CallArguments(same, text) if index == same:
            pieces[-1] = CallArguments(index, before + text)
        case _:
            pieces.append(piece)
