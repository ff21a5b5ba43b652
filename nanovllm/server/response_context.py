"""What the model reads for a request to /v1/responses: the items so far become messages, the tools chat's tools."""

from collections.abc import Awaitable, Callable
from typing import Any

from nanovllm.server.response_fields import FunctionChoice, FunctionTool, ResponseFields, fresh_id
from nanovllm.server.turns import Turns

Items = list[dict[str, Any]]
_ABOVE_USERS = ("system", "developer")


def items_of(fields: ResponseFields) -> Items:
    """The body's items, each with an id."""
    items = []
    for item in fields.input:
        given = item.model_dump(exclude_none=True)
        items.append({"id": fresh_id(item.type), "status": "completed"} | given)
    return items


def messages_of(items: Items, instructions: str | None = None) -> list[dict[str, Any]]:
    """In the form of OpenAI's chat completions.

    Models know no developer, whose messages are the system's. A call that broke off is left out.
    """
    turns = Turns()
    if instructions is not None:
        turns.text("system", instructions)
    for item in items:
        match item["type"]:
            case "message":
                role = "system" if item["role"] in _ABOVE_USERS else item["role"]
                for part in item["content"]:
                    turns.text(role, part["refusal"] if part["type"] == "refusal" else part["text"])
            case "reasoning":
                turns.reasoning("".join(part["text"] for part in item.get("content", ())))
            case "function_call" if item["status"] != "incomplete":
                turns.call(item["call_id"], item["name"], item["arguments"])
            case "function_call_output":
                turns.result(item["call_id"], "\n".join(part["text"] for part in item["output"]))
    return turns.messages


def chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def chat_tool_choice(choice: str | FunctionChoice | None) -> str | dict[str, Any] | None:
    if isinstance(choice, FunctionChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def template_of(fields: ResponseFields) -> dict[str, Any]:
    """What the body says of the chat template."""
    kwargs = dict(fields.chat_template_kwargs or {})
    if fields.reasoning is not None and fields.reasoning.effort is not None:
        kwargs.setdefault("reasoning_effort", fields.reasoning.effort)
        if fields.reasoning.effort == "none":
            kwargs.setdefault("enable_thinking", False)
    return {"chat_template_kwargs": kwargs} if kwargs else {}


async def latest_that_fit(items: Items, most: int, count: Callable[[Items], Awaitable[int]]) -> Items:
    """The items without the oldest turns that make the prompt too long; `truncation` "auto" asks for this.

    A turn begins with a user's message. The system's messages stay, and so does the last turn, whatever its length.

    Args:
        most: tokens that the prompt may have.
        count: how many it has with these items.
    """
    users = [i for i, item in enumerate(items) if item.get("role") == "user"]
    cuts = [0, *users[1:]]
    if await count(items) <= most:
        return items
    low, high = 0, len(cuts) - 1
    while low < high:
        middle = (low + high) // 2
        if await count(_from(items, cuts[middle])) <= most:
            high = middle
        else:
            low = middle + 1
    return _from(items, cuts[low])


def _from(items: Items, cut: int) -> Items:
    return [item for item in items[:cut] if item.get("role") in _ABOVE_USERS] + items[cut:]
