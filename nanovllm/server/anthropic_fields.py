"""The bodies of /v1/messages and /v1/messages/count_tokens, and the conversation that one asks for.

What Anthropic has and we lack is listed with the values that ask for nothing; any other value is refused, and so is a
field that nobody has. `cache_control` asks for nothing: the engine caches every prompt, with it or without.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nanovllm.sampling_params import SamplingParams
from nanovllm.server.conversation import Conversation
from nanovllm.server.openai_fields import Fields, JsonSchema, ResponseFormat, SamplingFields, sampling_params
from nanovllm.server.turns import Turns

_SPEAKERS = {"thinking": "assistant", "tool_use": "assistant", "tool_result": "user"}  # whose messages have such blocks
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class CacheControl(Fields):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h", None] = None


class Cacheable(Fields):
    """What may carry a mark for a prompt cache."""

    cache_control: CacheControl | None = None


class TextBlock(Cacheable):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = Field(default=None, max_length=0)


class ThinkingBlock(Fields):
    """The model's earlier thoughts. Ours have no signature to check, so a foreign one counts as little."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Cacheable):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _as_blocks(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Texts = Annotated[list[TextBlock], BeforeValidator(_as_blocks)]


class ToolResultBlock(Cacheable):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = []
    is_error: bool | None = False


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class MessageFields(Fields):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_as_blocks)]

    @model_validator(mode="after")
    def _has_blocks_of_its_role(self) -> "MessageFields":
        for block in self.content:
            if _SPEAKERS.get(block.type, self.role) != self.role:
                raise ValueError(f"a block of type {block.type!r} must be in a message of {_SPEAKERS[block.type]}")
        return self


class Tool(Cacheable):
    type: Literal["custom", None] = None
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: Literal[True, None] = None

    @field_validator("input_schema")
    @classmethod
    def _is_of_an_object(cls, schema: dict[str, Any]) -> dict[str, Any]:
        if schema.get("type") != "object":
            raise ValueError(f"type={schema.get('type')!r:.80} must be 'object'")
        return schema


class ToolChoice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = False

    @model_validator(mode="after")
    def _names_its_tool(self) -> "ToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name must be there if type is 'tool', and only then")
        return self


class Thinking(Fields):
    """Chat templates can switch thinking on and off. No model keeps to a budget; `max_tokens` bounds it, too."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized", None] = None


class OutputFormat(Fields):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    effort: Literal["low", "medium", "high", "xhigh", "max", None] = None
    format: OutputFormat | None = None


class Metadata(Fields):
    user_id: str | None = None


class PromptFields(Cacheable):
    """The body of /v1/messages/count_tokens: all that a prompt is made of."""

    model: str | None = None
    messages: list[MessageFields] = Field(min_length=1)
    system: Texts = []
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesFields(PromptFields):
    """The body of /v1/messages."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only", None] = None


def conversation(fields: PromptFields, params: SamplingParams, request_id: str) -> Conversation:
    """What a body asks to be answered. Raises ValueError if its last message waits for a tool."""
    choice = fields.tool_choice
    forced = {"type": "function", "function": {"name": choice.name}} if choice and choice.name else None
    return Conversation(
        messages=_messages(fields),
        params=params,
        request_id=request_id,
        tools=[_function(tool) for tool in fields.tools] if fields.tools else None,
        tool_choice=forced or (_CHOICES[choice.type] if choice else None),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        template=_template(fields),
    )


def params(fields: MessagesFields, defaults: SamplingParams) -> SamplingParams:
    """What a body asks of the sampler. Raises ValueError or TypeError, naming the parameter."""
    config = fields.output_config
    form = None
    if config is not None and config.format is not None:
        schema = JsonSchema(name="answer", schema=config.format.schema_)
        form = ResponseFormat(type="json_schema", json_schema=schema)
    asked = SamplingFields(
        temperature=fields.temperature,
        top_k=fields.top_k,
        top_p=fields.top_p,
        stop=fields.stop_sequences,
        response_format=form,
    )
    return sampling_params(asked, defaults, max_tokens=fields.max_tokens)


def _messages(fields: PromptFields) -> list[dict[str, Any]]:
    """In the form of OpenAI's chat completions. A tool's error is told as one, in words."""
    turns = Turns()
    for block in fields.system:
        turns.text("system", block.text)
    for message in fields.messages:
        for block in message.content:
            match block:
                case TextBlock():
                    turns.text(message.role, block.text)
                case ThinkingBlock():
                    turns.reasoning(block.thinking)
                case ToolUseBlock():
                    turns.call(block.id, block.name, block.input)
                case ToolResultBlock():
                    text = "\n".join(part.text for part in block.content)
                    turns.result(block.tool_use_id, f"Error: {text}" if block.is_error else text)
    return turns.messages


def _function(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    function["strict"] = tool.strict
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _template(fields: PromptFields) -> dict[str, Any]:
    """What the body says of the chat template. An assistant's message at the end is continued."""
    options: dict[str, Any] = {}
    last = fields.messages[-1]
    if last.role == "assistant":
        if any(block.type == "tool_use" for block in last.content):
            raise ValueError("messages: the last one uses a tool, so a tool_result must follow")
        options = {"add_generation_prompt": False, "continue_final_message": True}
    kwargs: dict[str, Any] = {}
    if fields.thinking is not None and fields.thinking.type != "adaptive":
        kwargs["enable_thinking"] = fields.thinking.type == "enabled"
    if fields.output_config is not None and fields.output_config.effort is not None:
        kwargs["reasoning_effort"] = fields.output_config.effort
    return options | ({"chat_template_kwargs": kwargs} if kwargs else {})
