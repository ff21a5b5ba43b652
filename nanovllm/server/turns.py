"""Builds a conversation's messages from smaller parts: Anthropic's content blocks, or the items of /v1/responses."""

from typing import Any


class Turns:
    """`messages` have the form of OpenAI's chat completions.

    Neighbouring parts of one role become one message, since a chat template writes each message as a turn of its own.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def text(self, role: str, text: str) -> None:
        self._of(role)["content"].append({"type": "text", "text": text})

    def reasoning(self, text: str) -> None:
        """What the model thought before an answer or a call."""
        message = self._of("assistant")
        message["reasoning_content"] = message.get("reasoning_content", "") + text

    def call(self, call_id: str, name: str, arguments: str | dict[str, Any]) -> None:
        """A call of a tool; the arguments are an object or its JSON text."""
        function = {"name": name, "arguments": arguments}
        calls = self._of("assistant").setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def result(self, call_id: str, text: str) -> None:
        """What the tool answered: each result is a message."""
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _of(self, role: str) -> dict[str, Any]:
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": []})
        return self.messages[-1]
