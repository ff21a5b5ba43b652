"""Splits what a model thought, between <think> and </think>, from its answer.

Who writes the opening tag differs: the model (Qwen3, SmolLM3), or the chat template at the prompt's end (Qwen3's
thinking models, newer DeepSeek-R1). So the prompt's end decides whether the text begins inside. Newlines beside the
tags belong to the tags: chat templates write them again, so a conversation that comes back is the same prefix.
"""

from dataclasses import dataclass

import regex

from nanovllm.server.parsing.pieces import Content, Reasoning
from nanovllm.server.parsing.reader import Reader, Steps


@dataclass(frozen=True)
class Tags:
    opening: str
    closing: str
    always: bool = False  # the text is reasoning from its beginning on, even if no opening tag is anywhere


# vLLM's names for --reasoning-parser.
REASONING_PARSERS = {
    "qwen3": Tags("<think>", "</think>"),
    "deepseek_r1": Tags("<think>", "</think>", always=True),
    "mistral": Tags("[THINK]", "[/THINK]"),
}


def detect_reasoning_parser(chat_template: str) -> str | None:
    """The name for a model with this chat template; None if the template knows no reasoning."""
    named = {"</think>": "qwen3", "[THINK]": "mistral"}
    return next((name for tag, name in named.items() if tag in chat_template), None)


def reasoning_reader(name: str, prompt: str = "") -> Reader:
    """A reader of one answer. It gives Reasoning and Content.

    Args:
        name: one of REASONING_PARSERS.
        prompt: the prompt's text, or its end.

    Raises:
        ValueError: there is no such parser.
    """
    if name not in REASONING_PARSERS:
        raise ValueError(f"reasoning_parser={name!r:.80} must be one of {', '.join(REASONING_PARSERS)}")
    tags, end = REASONING_PARSERS[name], prompt.rstrip()
    is_inside = end.endswith(tags.opening) or (tags.always and not end.endswith(tags.closing))
    return Reader(lambda reader: _split(reader, tags, is_inside))


def _split(reader: Reader, tags: Tags, is_inside: bool) -> Steps[None]:
    opening = yield from reader.match(regex.compile(rf"\s*{regex.escape(tags.opening)}"))
    if opening:
        reader.take(opening.end())
    if opening or is_inside:
        yield from reader.skip_newlines()
        # Begins at a run of newlines, never within: a search would take the square of the run's length.
        pattern = regex.compile(rf"(?<!\n)\n*+{regex.escape(tags.closing)}")
        closing = yield from reader.find(pattern, lambda text: reader.give(Reasoning(text)))
        if closing:
            reader.take(closing.end())
            yield from reader.skip_newlines()
    yield from reader.rest(lambda text: reader.give(Content(text)))
