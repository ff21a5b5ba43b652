"""The fields of requests to OpenAI's endpoints, and of them those that become sampling parameters.

Fields that OpenAI has and we lack are listed with the values that ask for nothing; any other value is refused, and so
is a field that nobody has.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams

TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]


class Fields(BaseModel):
    """A body, or a part of one. A field that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(Fields):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False, None] = None


class JsonSchema(Fields):
    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be there if type is 'json_schema', and only then")
        return self


class SamplingFields(Fields):
    """OpenAI's sampling parameters, and vLLM's further ones. None: the model's default."""

    model: str | None = None
    n: int | None = Field(default=None, ge=1)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False
    request_id: str | None = Field(default=None, max_length=128)
    user: str | None = None
    metadata: dict[str, str] | None = None
    priority: Literal[0] = 0
    cache_salt: None = None

    @field_validator("logit_bias")
    @classmethod
    def _within_openais_limits(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        if biases and not all(token.isdecimal() and -100 <= bias <= 100 for token, bias in biases.items()):
            raise ValueError("must map token ids to numbers in [-100, 100]")
        return biases

    @model_validator(mode="after")
    def _streams_if_it_has_stream_options(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must be left out unless stream is true")
        return self


_SAME = (
    "presence_penalty frequency_penalty repetition_penalty temperature top_k top_p min_p seed stop stop_token_ids "
    "include_stop_str_in_output ignore_eos min_tokens logit_bias allowed_token_ids bad_words prompt_logprobs "
    "skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens n"
).split()


class CompletionFields(SamplingFields):
    """The body of /v1/completions."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0)
    echo: bool = False
    add_special_tokens: Literal[True, None] = None
    best_of: Literal[1, None] = None
    suffix: Literal["", None] = None


class ChatFields(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    echo: Literal[False] = False
    add_special_tokens: Literal[False, None] = None  # the chat template writes them
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    store: Literal[False, None] = None
    service_tier: Literal["auto", "default", None] = None
    verbosity: Literal["medium", None] = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _asks_for_logprobs_if_it_counts_them(self) -> "ChatFields":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs must be left out unless logprobs is true")
        return self


def sampling_params(fields: SamplingFields, defaults: SamplingParams, **values: Any) -> SamplingParams:
    """What a body asks of the sampler. Raises ValueError or TypeError, naming the parameter.

    Args:
        defaults: for what the body leaves out: the model's own.
        values: parameters that the endpoint decides.
    """
    asked = {name: getattr(fields, name) for name in _SAME}
    asked |= {"structured_outputs": _structured(fields)} | values
    return SamplingParams(**{**vars(defaults), **{k: v for k, v in asked.items() if v is not None}, **_none(values)})


def _none(values: dict[str, Any]) -> dict[str, None]:
    return {name: None for name, value in values.items() if value is None}


def _structured(fields: SamplingFields) -> Any:
    """The grammar that the answer must follow, from whichever field asks for one; None without.

    Raises ValueError if two fields ask.
    """
    asked: dict[str, dict[str, Any]] = {}
    if fields.structured_outputs is not None:
        asked["structured_outputs"] = fields.structured_outputs
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(fields, f"guided_{kind}")
        if value is not None:
            asked[f"guided_{kind}"] = {kind: value}
    form = fields.response_format
    if form is not None and form.json_schema is not None:
        asked["response_format"] = {"json": form.json_schema.schema_}
    elif form is not None and form.type == "json_object":
        asked["response_format"] = {"json_object": True}
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} both say what the answer must be: give one")
    if not asked:
        return None
    return StructuredOutputsParams(**next(iter(asked.values())))
