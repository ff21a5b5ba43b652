"""The output of /v1/responses as it grows: items, and the events that tell of them."""

from typing import Any

from nanovllm.server.parsing.pieces import CallArguments, CallBegin, Content, Message, Piece, Reasoning
from nanovllm.server.response_fields import fresh_id, is_json_object

Event = dict[str, Any]
_EMPTY_PARTS: dict[str, dict[str, Any]] = {
    "reasoning": {"type": "reasoning_text", "text": ""},
    "message": {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
}


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
        self._part: dict[str, Any] | None = None  # its content, before there is any; a call has none
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
                events = [] if self._is_in("reasoning") else self._begin("reasoning", summary=[], content=[])
                return [*events, self._delta("reasoning_text", text, content_index=0)]
            case Content(text):
                events = [] if self._is_in("message") else self._begin("message", role="assistant", content=[])
                logprobs, self._waiting = self._waiting, []
                self._logprobs += logprobs
                return [*events, self._delta("output_text", text, content_index=0, logprobs=logprobs)]
            case CallBegin(_, call_id, name):
                return self._begin("function_call", call_id=call_id, name=name, arguments="")
            case CallArguments(_, text):
                return [self._delta("function_call_arguments", text)]

    def end(self, is_complete: bool) -> list[Event]:
        """The events of the answer's end. An answer without any text is an empty message."""
        events = self.add(Content("")) if self._item is None and not self.items else []
        return events + self._end("completed" if is_complete else "incomplete")

    def _is_in(self, kind: str) -> bool:
        return self._item is not None and self._item["type"] == kind

    def _begin(self, kind: str, **fields: Any) -> list[Event]:
        """Begins an item, and ends the one before it."""
        events = self._end("completed")
        self._item = {"type": kind, "id": fresh_id(kind), "status": "in_progress", **fields}
        self._part = _EMPTY_PARTS.get(kind)
        events.append(self._event("output_item.added", item=dict(self._item)))
        if self._part is not None:
            events.append(self._part_event("content_part.added", part=self._part))
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
            more: dict[str, Any] = {}
            if self._item["type"] == "message":
                more["logprobs"] = self._logprobs + self._waiting
                self._logprobs, self._waiting = [], []
            else:
                self.reasoning += text
            part = self._part | {"text": text, **more}
            self._item["content"] = [part]
            events = [self._part_event(f"{part['type']}.done", text=text, **more)]
            events.append(self._part_event("content_part.done", part=part))
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
