"""The body of /v1/responses: its items and options, and what of them becomes sampling parameters.

Fields that OpenAI has and we lack are listed with the values that ask for nothing; any other value is refused, and so
is a field that nobody has. vLLM's further sampling parameters are taken, too.
"""

import json
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nanovllm.sampling_params import SamplingParams
from nanovllm.server.openai_fields import Fields, JsonSchema, ResponseFormat, SamplingFields, sampling_params

LOGPROBS = "message.output_text.logprobs"
_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
}
Short = Annotated[str, Field(max_length=64)]


def fresh_id(kind: str) -> str:
    """A new id for an item of this type."""
    return f"{_PREFIXES[kind]}_{uuid4().hex}"


def is_json_object(text: str) -> bool:
    """Whether a call may have these arguments; none at all stand for {}."""
    try:
        return not text.strip() or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class InputText(Fields):
    type: Literal["input_text"]
    text: str


class OutputText(Fields):
    """A model reads neither annotations nor logprobs; they are there since an answer that comes back has them."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Refusal(Fields):
    type: Literal["refusal"]
    refusal: str


class SummaryText(Fields):
    type: Literal["summary_text"]
    text: str


class ReasoningText(Fields):
    type: Literal["reasoning_text"]
    text: str


class Item(Fields):
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete", None] = None


class MessageItem(Item):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: list[Annotated[InputText | OutputText | Refusal, Field(discriminator="type")]]
    phase: Literal["commentary", "final_answer", None] = None

    @model_validator(mode="before")
    @classmethod
    def _with_parts(cls, item: Any) -> Any:
        if isinstance(item, dict) and isinstance(item.get("content"), str):
            kind = "output_text" if item.get("role") == "assistant" else "input_text"
            return item | {"content": [{"type": kind, "text": item["content"]}]}
        return item


class FunctionCallItem(Item):
    type: Literal["function_call"]
    call_id: Short
    name: Short
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _are_an_object(cls, arguments: str) -> str:
        if not is_json_object(arguments):
            raise ValueError("must be the JSON of an object")
        return arguments


class FunctionCallOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: Short
    output: Annotated[
        list[InputText],
        BeforeValidator(lambda output: [{"type": "input_text", "text": output}] if isinstance(output, str) else output),
    ]


class ReasoningItem(Item):
    type: Literal["reasoning"]
    summary: list[SummaryText] = []
    content: list[ReasoningText] | None = None
    encrypted_content: None = None


def _as_items(items: Any) -> Any:
    """A text is a user's message, and an item without a type a message, too."""
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list):
        return items
    return [{"type": "message", **item} if isinstance(item, dict) and "role" in item else item for item in items]


AnyItem = Annotated[
    MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem, Field(discriminator="type")
]


class FunctionTool(Fields):
    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Fields):
    type: Literal["function"]
    name: str


class PlainFormat(Fields):
    type: Literal["text", "json_object"] = "text"


class SchemaFormat(Fields):
    type: Literal["json_schema"]
    name: Short
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = False


class Text(Fields):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] = PlainFormat()
    verbosity: Literal["medium", None] = "medium"


class Reasoning(Fields):
    """An answer has the reasoning itself; nobody summarizes it, which "auto" leaves to the server."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", None] = None
    summary: Literal["auto", None] = None


class StreamOptions(Fields):
    include_obfuscation: Literal[False, None] = None


class ResponseFields(SamplingFields):
    """The body. Reasoning comes back as it was given, in the clear, so its encrypted form adds nothing."""

    input: Annotated[list[AnyItem], BeforeValidator(_as_items)] = Field(min_length=1)
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    max_output_tokens: int | None = Field(default=None, ge=1)
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required", None] | FunctionChoice = None
    parallel_tool_calls: bool | None = True
    text: Text | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled", None] = "disabled"
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    metadata: dict[Short, Annotated[str, Field(max_length=512)]] | None = Field(default=None, max_length=16)
    service_tier: Literal["auto", "default", None] = None
    background: Literal[False, None] = False
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", None] = None
    safety_identifier: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # What has no place in this API's answers, or has another name in it.
    n: Literal[1, None] = None
    response_format: None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: None = None
    truncate_prompt_tokens: None = None
    return_token_ids: Literal[False] = False
    return_tokens_as_token_ids: Literal[False] = False
    add_special_tokens: None = None
    request_id: None = None

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @model_validator(mode="after")
    def _includes_logprobs_if_it_counts_them(self) -> "ResponseFields":
        if self.top_logprobs and not self.has_logprobs:
            raise ValueError(f"top_logprobs must be left out unless include has {LOGPROBS!r}")
        return self


def params(fields: ResponseFields, defaults: SamplingParams) -> SamplingParams:
    """What a body asks of the sampler. Raises ValueError or TypeError, naming the parameter."""
    values: dict[str, Any] = {"max_tokens": fields.max_output_tokens}
    if fields.has_logprobs:
        values["logprobs"] = fields.top_logprobs or 0
    asked = fields.model_copy(update={"response_format": _format(fields.text)})
    return sampling_params(asked, defaults, **values)


def echo(fields: ResponseFields, params: SamplingParams) -> dict[str, Any]:
    """What a response repeats of its request, with the values that hold where the request said nothing."""
    choice, text, reasoning = fields.tool_choice or "auto", fields.text or Text(), fields.reasoning or Reasoning()
    return {
        "background": False,
        "frequency_penalty": params.frequency_penalty,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": None,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "presence_penalty": params.presence_penalty,
        "previous_response_id": fields.previous_response_id,
        "prompt_cache_key": fields.prompt_cache_key,
        "reasoning": reasoning.model_dump(),
        "safety_identifier": fields.safety_identifier,
        "service_tier": "default",
        "store": fields.store is not False,
        "temperature": params.temperature,
        "text": text.model_dump(by_alias=True),
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in fields.tools or ()],
        "top_logprobs": fields.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": fields.truncation or "disabled",
        "user": fields.user,
    }


def _format(text: Text | None) -> ResponseFormat | None:
    if text is None:
        return None
    if isinstance(text.format, PlainFormat):
        return ResponseFormat(type=text.format.type)
    schema = JsonSchema(name=text.format.name, schema=text.format.schema_)
    return ResponseFormat(type="json_schema", json_schema=schema)
