"""Answers to conversations, whatever API asks: messages in, pieces out.

`chat.py`, `responses.py` and `anthropic.py` turn their bodies into a `Conversation`, and its pieces into theirs.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.server.parsing.chat_text import ChatText, chat_text
from nanovllm.server.parsing.pieces import CallArguments, CallBegin, Message, Piece, message_of
from nanovllm.server.parsing.reasoning import detect_reasoning_parser
from nanovllm.server.parsing.tool_calls import detect_tool_call_parser
from nanovllm.server.parsing.tool_schema import Function, check_tool_choice, check_tools, forced_schema
from nanovllm.server.state import ServerState
from nanovllm.structured_outputs import StructuredOutputsParams

TAGS_ARE_SPECIAL = {"mistral", "llama3_json"}  # parsers that look for special tokens, which text leaves out


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What a client wants answered. `tools` and `tool_choice` have OpenAI's form; None: none."""

    messages: list[dict[str, Any]]
    params: SamplingParams
    request_id: str
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    template: dict[str, Any] = field(default_factory=dict)  # further options of `text.chat.chat_prompt`


@dataclass(slots=True)
class News:
    """What is new of one completion. `completion` has its tokens, logprobs and the reason of its end."""

    pieces: list[Piece]
    completion: CompletionOutput
    output: RequestOutput


async def answer(state: ServerState, asked: Conversation) -> tuple[RequestOutput, list[Message]]:
    """The whole answer: a message for each completion. Raises as `stream_answer`."""
    output, parsers = None, {}
    make, prompt = await _prepare(state, asked, RequestOutputKind.FINAL_ONLY)
    async for output in state.run(prompt, asked.params, asked.request_id):
        parsers = {completion.index: make() for completion in output.outputs}
    messages = []
    for completion in output.outputs:
        parser = parsers[completion.index]
        messages.append(message_of(_allowed([*parser.feed(completion.text), *parser.finish()], asked)))
    return output, messages


async def stream_answer(state: ServerState, asked: Conversation) -> AsyncGenerator[News]:
    """The answer as it comes.

    Raises ValueError or TypeError, naming what is wrong: the messages, the tools, a parameter, or their length.
    """
    make, prompt = await _prepare(state, asked, RequestOutputKind.DELTA)
    parsers = [make() for _ in range(asked.params.n)]
    async for output in state.run(prompt, asked.params, asked.request_id):
        for completion in output.outputs:
            parser = parsers[completion.index]
            pieces = parser.feed(completion.text)
            if completion.finish_reason is not None:
                pieces += parser.finish()
            yield News(_allowed(pieces, asked), completion, output)


def _allowed(pieces: list[Piece], asked: Conversation) -> list[Piece]:
    """Drops the calls after the first if only one is wanted: a model that calls freely does not know of it."""
    if asked.parallel_tool_calls:
        return pieces
    return [piece for piece in pieces if not isinstance(piece, CallBegin | CallArguments) or piece.index == 0]


async def prompt_of(state: ServerState, asked: Conversation) -> dict[str, Any]:
    """The prompt, with its text and its token ids. Raises as `stream_answer`."""
    return await _prompt(state, asked, _tools(state, asked)[1])


def _tools(state: ServerState, asked: Conversation) -> tuple[list[Function], str | Function]:
    """The functions, and which of them the model may call or has to."""
    functions = check_tools(asked.tools) if asked.tools else []
    state.check_limit("tools", len(functions), state.limits.tools)
    return functions, check_tool_choice(asked.tool_choice, functions)


def _template(state: ServerState, asked: Conversation) -> dict[str, Any]:
    return {"chat_template": state.settings.chat_template, "add_generation_prompt": True, **asked.template}


async def _prompt(state: ServerState, asked: Conversation, choice: str | Function) -> dict[str, Any]:
    tools = asked.tools if choice != "none" else None
    return await state.llm.chat_prompt(asked.messages, tools=tools, **_template(state, asked))


async def _prepare(state: ServerState, asked: Conversation, kind: RequestOutputKind) -> tuple[Any, dict[str, Any]]:
    """What makes a parser of the answer's text, and the prompt."""
    functions, choice = _tools(state, asked)
    prompt = await _prompt(state, asked, choice)
    tokenizer, template = await state.llm.get_tokenizer(), _template(state, asked)
    asked.params.output_kind = kind
    schema = forced_schema(functions, choice, asked.parallel_tool_calls)
    if schema is not None:
        _force(asked.params, schema)
    reasoning = None
    if asked.params.structured_outputs is None:  # otherwise all of the text is what was asked for
        reasoning = _named(state.settings.reasoning_parser, detect_reasoning_parser, tokenizer, template)
    calls = _named(state.settings.tool_call_parser, detect_tool_call_parser, tokenizer, template)
    if {reasoning, calls if choice == "auto" else None} & TAGS_ARE_SPECIAL:
        asked.params.skip_special_tokens = False
    is_whole = kind is RequestOutputKind.FINAL_ONLY

    def make() -> ChatText:
        return chat_text(prompt["prompt"], reasoning, calls, functions, choice, is_whole)

    return make, prompt


def _named(parser: str | None, detect: Any, tokenizer: Any, template: dict[str, Any]) -> str | None:
    """A parser's name, with "auto" resolved by the chat template's text."""
    if parser != "auto":
        return parser
    text = template.get("chat_template") or tokenizer.chat_template
    return detect(text) if isinstance(text, str) else None


def _force(params: SamplingParams, schema: dict[str, Any]) -> None:
    """Hold an answer that has to call a tool to its schema. Raises ValueError if it must be something else, too."""
    if params.structured_outputs is not None:
        raise ValueError("tool_choice asks for a call, and response_format for something else: give one")
    params.structured_outputs = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
