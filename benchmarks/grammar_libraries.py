"""Compares libraries for grammars: `python -m benchmarks.grammar_libraries`, with llguidance and xgrammar installed.

For each keyword of JSON Schema it asks both for a text that is valid and for one that is not. A library enforces the
keyword, refuses the schema, ignores the keyword (the invalid text passes), or takes too little (the valid one does
not). Then come the times of a schema: compilation, and one step's masks for `--rows` sequences, each of which draws any
allowed token. The last line is JSON.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine, describe_versions
from benchmarks.report import table_lines
from benchmarks.structured import PERSON
from benchmarks.wide_tokenizer import base_tokenizer, wide_tokenizer

AB = {"type": "object", "properties": {"a": {}, "b": {}}}
CASES: list[tuple[str, dict[str, Any], str, str]] = [  # keyword, schema, a valid text, an invalid one
    ("not", {"not": {"type": "string"}}, "1", '"a"'),
    ("if, then", {**AB, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, "{}", '{"a":1}'),
    ("dependentRequired", {**AB, "dependentRequired": {"a": ["b"]}}, "{}", '{"a":1}'),
    ("dependentSchemas", {**AB, "dependentSchemas": {"a": {"required": ["b"]}}}, "{}", '{"a":1}'),
    ("propertyNames", {"type": "object", "propertyNames": {"pattern": "^a$"}}, '{"a":1}', '{"b":1}'),
    ("contains", {"type": "array", "contains": {"const": 1}}, "[1]", "[2]"),
    ("uniqueItems", {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1]", "[1,1]"),
    ("unevaluatedProperties", {**AB, "unevaluatedProperties": False}, '{"a":1}', '{"c":1}'),
    ("prefixItems", {"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, "[1]", "[1,2]"),
    ("format", {"type": "string", "format": "email"}, '"a@b.de"', '"ab"'),
    ("pattern", {"type": "string", "pattern": "^a+$"}, '"aa"', '"b"'),
    ("pattern, not anchored", {"type": "string", "pattern": "a"}, '"bab"', '"b"'),
    ("pattern and maxLength", {"type": "string", "pattern": "^a+$", "maxLength": 2}, '"aa"', '"aaa"'),
    ("minLength", {"type": "string", "minLength": 2}, '"ab"', '"a"'),
    ("minimum", {"type": "integer", "minimum": 3}, "3", "2"),
    ("exclusiveMaximum", {"type": "number", "exclusiveMaximum": 3}, "2.9", "3.0"),
    ("multipleOf", {"type": "number", "multipleOf": 0.1}, "0.3", "0.35"),
    ("minItems", {"type": "array", "minItems": 1}, "[1]", "[]"),
    ("minProperties", {"type": "object", "minProperties": 1}, '{"a":1}', "{}"),
    ("maxProperties", {"type": "object", "maxProperties": 1}, '{"a":1}', '{"a":1,"b":1}'),
    ("oneOf, disjoint", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, "1", "[]"),
    ("oneOf, overlapping", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "1.5", "1"),
    ("allOf", {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, "4", "6"),
    (
        "anyOf beside properties",
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}], "additionalProperties": False},
        '{"a":1}',
        "{}",
    ),
    ("const", {"const": {"a": [1, None]}}, '{"a":[1,null]}', '{"a":[1]}'),
    ("enum", {"enum": ["a", 1, None]}, "null", '"b"'),
    ("$ref, recursive", {"$ref": "#/$defs/x", "$defs": {"x": {"items": {"$ref": "#/$defs/x"}}}}, "[[],[]]", "[1"),
    ("$ref to an $anchor", {"$ref": "#f", "$defs": {"x": {"$anchor": "f", "type": "integer"}}}, "1", '"a"'),
    ("required, not in properties", {**AB, "required": ["z"]}, '{"z":1}', '{"a":1}'),
    ("minimum without type", {"minimum": 3}, '"x"', "2"),
]


class LLGuidance:
    """One library; `Xgrammar` has the same methods."""

    def __init__(self, tokenizer: Any) -> None:
        import llguidance
        import llguidance.hf

        self.library = llguidance
        self.tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=len(tokenizer))
        self.num_words = -(-len(tokenizer) // 32)

    def compile(self, schema: dict[str, Any]) -> Any:
        """Raises ValueError for a schema that is refused."""
        matcher_of = self.library.LLMatcher
        matcher = matcher_of(self.tokenizer, matcher_of.grammar_from_json_schema(schema), log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def takes(self, compiled: Any, text: str) -> bool:
        matcher, ids = compiled.deep_copy(), self.tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def begin(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def fill(self, matchers: list[Any], bits: np.ndarray) -> None:
        for matcher, row in zip(matchers, bits, strict=True):
            matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    def accept(self, matcher: Any, token_id: int) -> bool:
        """False at the text's end."""
        return matcher.consume_token(token_id) and not matcher.is_stopped()


class Xgrammar:
    """The other."""

    def __init__(self, tokenizer: Any) -> None:
        import xgrammar

        self.library = xgrammar
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.num_words = -(-len(tokenizer) // 32)

    def compile(self, schema: dict[str, Any]) -> Any:
        try:
            return self.compiler.compile_json_schema(json.dumps(schema), strict_mode=False)
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    def takes(self, compiled: Any, text: str) -> bool:
        matcher = self.library.GrammarMatcher(compiled, terminate_without_stop_token=True)
        return matcher.accept_string(text) and matcher.is_terminated()

    def begin(self, compiled: Any) -> Any:
        return self.library.GrammarMatcher(compiled)

    def fill(self, matchers: list[Any], bits: np.ndarray) -> None:
        import torch

        tensor = torch.from_numpy(bits)
        for i, matcher in enumerate(matchers):
            matcher.fill_next_token_bitmask(tensor, i)

    def accept(self, matcher: Any, token_id: int) -> bool:
        return matcher.accept_token(token_id) and not matcher.is_terminated()


def verdict(library: LLGuidance | Xgrammar, schema: dict[str, Any], valid: str, invalid: str) -> str:
    try:
        compiled = library.compile(schema)
    except ValueError:
        return "refuses"
    if library.takes(compiled, invalid):
        return "IGNORES"
    return "enforces" if library.takes(compiled, valid) else "takes too little"


def milliseconds(function: Callable[[], Any]) -> float:
    begin = perf_counter()
    function()
    return 1e3 * (perf_counter() - begin)


def measure(library: LLGuidance | Xgrammar, schema: dict[str, Any], rows: int, steps: int) -> list[float]:
    """Milliseconds: compilation (median of five), one step's masks (mean, worst)."""
    compiling = statistics.median(milliseconds(partial(library.compile, schema)) for _ in range(5))
    compiled = library.compile(schema)
    matchers, bits = [library.begin(compiled) for _ in range(rows)], np.zeros((rows, library.num_words), np.int32)
    rng, masking = random.Random(0), []
    for _ in range(steps):
        masking.append(milliseconds(partial(library.fill, matchers, bits)))
        for i, row in enumerate(bits):
            token_id = int(rng.choice(np.unpackbits(row.view(np.uint8), bitorder="little").nonzero()[0]))
            if not library.accept(matchers[i], token_id):
                matchers[i] = library.begin(compiled)
    return [compiling, statistics.mean(masking), max(masking)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    base = base_tokenizer()
    libraries = {"llguidance": LLGuidance(base), "xgrammar": Xgrammar(base)}
    verdicts = {name: [verdict(library, *texts) for library in libraries.values()] for name, *texts in CASES}
    print(*table_lines(["keyword", *libraries], [[name, *found] for name, found in verdicts.items()]), sep="\n")
    times = {}
    for tokenizer in (base, wide_tokenizer()):
        for make in (LLGuidance, Xgrammar):
            name = f"{make.__name__}, {len(tokenizer):,} tokens"
            times[name] = measure(make(tokenizer), PERSON, args.rows, args.steps)
    lines = [[name, *(f"{value:.2f}" for value in values)] for name, values in times.items()]
    print(*table_lines(["one thread", "compile ms", f"masks of {args.rows} ms", "worst"], lines), sep="\n")
    report = {"verdicts": verdicts, "times": times, "arguments": vars(args), "machine": describe_machine("cpu")}
    print(json.dumps(report | describe_versions()))


if __name__ == "__main__":
    main()
