"""The output of /v1/responses as it grows: items, and the events that tell of them."""

from typing import Any

from nanovllm.server.parsing.pieces import CallArguments, CallBegin, Content, Message, Piece, Reasoning
from nanovllm.server.response_fields import fresh_id, is_json_object

Event = dict[str, Any]


class OutputItems:
    """Makes items of an answer's pieces. One item at a time is in progress.

    Attributes:
        items: the items that have ended.
        reasoning: the text of all reasoning.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.reasoning = ""
        self._item: dict[str, Any] | None = None  # the one in progress
        self._part: dict[str, Any] | None = None  # its content; a call has none
        self._texts: list[str] = []  # of the part, or the arguments of the call
        self._logprobs: list[Any] = []  # of the part
        self._waiting: list[Any] = []  # logprobs of tokens whose text has not come yet

    def expect(self, logprobs: list[Any]) -> None:
        """Takes the logprobs of tokens. The next text of a message has them, also those of tokens without text."""
        self._waiting += logprobs

    def add(self, piece: Piece) -> list[Event]:
        """The events of a piece."""
        match piece:
            case Reasoning(text):
                new = {"id": fresh_id("rs"), "summary": [], "content": []}
                part = {"type": "reasoning_text", "text": ""}
                return self._begin("reasoning", new, part) + [self._delta("reasoning_text", text, content_index=0)]
            case Content(text):
                new = {"id": fresh_id("msg"), "role": "assistant", "content": []}
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                events = self._begin("message", new, part)
                more, self._waiting = self._waiting, []
                self._logprobs += more
                return events + [self._delta("output_text", text, content_index=0, logprobs=more)]
            case CallBegin(_, call_id, name):
                new = {"id": fresh_id("fc"), "call_id": call_id, "name": name, "arguments": ""}
                return self._begin("function_call", new, None)
            case CallArguments(_, text):
                return [self._delta("function_call_arguments", text)]

    def end(self, is_complete: bool) -> list[Event]:
        """The events of the answer's end. An answer without any text is an empty message."""
        events = self.add(Content("")) if self._item is None and not self.items else []
        return events + self._end("completed" if is_complete else "incomplete")

    def _begin(self, kind: str, new: dict[str, Any], part: dict[str, Any] | None) -> list[Event]:
        """Begins an item, unless one of that kind is in progress; each call is an item of its own."""
        if self._item is not None and self._item["type"] == kind and part is not None:
            return []
        events = self._end("completed")
        self._item = {"type": kind, "status": "in_progress", **new}
        self._part = part
        events.append(self._event("output_item.added", item=dict(self._item)))
        if part is not None:
            events.append(self._part_event("content_part.added", part=dict(part)))
        return events

    def _end(self, status: str) -> list[Event]:
        """Ends the item in progress, if there is one."""
        if self._item is None:
            return []
        text, self._texts = "".join(self._texts), []
        if self._part is None:
            self._item["arguments"] = text
            status = status if is_json_object(text) else "incomplete"  # it broke off
            events = [self._item_event("function_call_arguments.done", arguments=text)]
        else:
            self._part["text"] = text
            self._item["content"] = [self._part]
            more: dict[str, Any] = {}
            if self._part["type"] == "output_text":
                more["logprobs"] = self._part["logprobs"] = self._logprobs + self._waiting
                self._logprobs, self._waiting = [], []
            else:
                self.reasoning += text
            events = [self._part_event(f"{self._part['type']}.done", text=text, **more)]
            events.append(self._part_event("content_part.done", part=self._part))
        self._item["status"] = status
        events.append(self._event("output_item.done", item=self._item))
        self.items.append(self._item)
        self._item = None
        return events

    def _delta(self, kind: str, text: str, **more: Any) -> Event:
        self._texts.append(text)
        return self._item_event(f"{kind}.delta", delta=text, **more)

    def _part_event(self, kind: str, **data: Any) -> Event:
        return self._item_event(kind, content_index=0, **data)

    def _item_event(self, kind: str, **data: Any) -> Event:
        return self._event(kind, item_id=self._item["id"], **data)

    def _event(self, kind: str, **data: Any) -> Event:
        return {"type": f"response.{kind}", "output_index": len(self.items), **data}


def pieces_of(message: Message) -> list[Piece]:
    """A whole answer in pieces."""
    pieces: list[Piece] = [Reasoning(message.reasoning)] if message.reasoning else []
    if message.content:
        pieces.append(Content(message.content))
    for i, call in enumerate(message.tool_calls):
        pieces += [CallBegin(i, call.id, call.name), CallArguments(i, call.arguments)]
    return pieces
