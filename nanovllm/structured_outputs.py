"""Structured outputs as plain data: what a request's text must be, and which tokens that allows in one step."""

import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass
class StructuredOutputsParams:
    """What a request's text must be. Give one of the first five; names and meanings are vLLM's.

    Every token is drawn from those that the text may continue with, so a text that ends with `finish_reason="stop"` is
    as asked; one that `max_tokens` or a stop string cuts off is the beginning of such a text. A schema's keyword that
    cannot be enforced is refused by name. Properties come in the schema's order.

    Args:
        json: a JSON Schema (draft 2020-12), as a dict or as JSON text.
        regex: matches the whole text. Rust's syntax: no look-around, no backreferences.
        choice: the text is one of these strings.
        grammar: a context-free grammar in llguidance's Lark, or in GBNF, llama.cpp's EBNF (`root ::= …`).
        json_object: True: the text is any JSON object.
        disable_any_whitespace: JSON without whitespace between its tokens.
        disable_additional_properties: objects have no other properties than their schemas name, unless a schema says
            `additionalProperties` itself.
        whitespace_pattern: a regular expression; between JSON's tokens whitespace is what it matches, or nothing. By
            default a line's end and up to 24 spaces or tabs: with no bound weak models write blank lines without end.
        structural_tag: vLLM's; must be None.

    Raises:
        ValueError, TypeError: naming the argument, when this object is made and when a request copies it. The schema,
            expression or grammar itself is read when a request is made.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        for name, (types, allowed) in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, types) or (name in _FLAGS and value is None):
                raise TypeError(f"structured_outputs: {name}={value!r:.80} must be {allowed}")
        if self.structural_tag is not None:
            raise ValueError(
                f"structured_outputs: structural_tag={self.structural_tag!r:.80} must be None: not supported"
            )
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            shown = ", ".join(f"{name}={getattr(self, name)!r:.80}" for name in given) or "none"
            raise ValueError(f"structured_outputs has {shown}: it must have exactly one of {', '.join(KINDS)}")
        if self.choice is not None:
            self.choice = list(self.choice)
            if not self.choice or not all(isinstance(text, str) for text in self.choice):
                raise ValueError(f"structured_outputs: choice={self.choice!r:.80} must be a list of strings, not empty")
        for name in _OF_JSON:
            if getattr(self, name) not in (None, False) and given[0] not in ("json", "json_object"):
                value = getattr(self, name)
                raise ValueError(f"structured_outputs: {name}={value!r:.80} needs json or json_object, not {given[0]}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError(
                f"structured_outputs: whitespace_pattern={self.whitespace_pattern!r:.80} contradicts "
                "disable_any_whitespace=True"
            )

    def clone(self) -> "StructuredOutputsParams":
        """A checked copy that shares nothing with this object."""
        names = [field.name for field in fields(StructuredOutputsParams)]
        try:
            return StructuredOutputsParams(**{name: copy.deepcopy(getattr(self, name)) for name in names})
        except RecursionError as error:
            raise ValueError("structured_outputs: json is nested too deeply") from error


_FLAGS = ("disable_any_whitespace", "disable_additional_properties")
_OF_JSON = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
_TEXT = (str | None, "a string")
_FLAG = (bool | None, "True or False")
_TYPES = {
    "json": (str | dict | None, "a JSON Schema: a dict, or JSON text"),
    "regex": _TEXT,
    "choice": (list | tuple | None, "a list of strings"),
    "grammar": _TEXT,
    "json_object": _FLAG,
    "disable_any_whitespace": _FLAG,
    "disable_additional_properties": _FLAG,
    "whitespace_pattern": _TEXT,
    "structural_tag": _TEXT,
}


@dataclass(slots=True)
class TokenMasks:
    """Which tokens the grammars of a step's sequences allow next."""

    samples: list[int]  # indices of the sequences that have one, among those that sample
    bits: "np.ndarray"  # [samples, at least vocab / 32] int32; token t is bit t % 32 of word t // 32; 1: allowed
