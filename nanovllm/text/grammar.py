"""Grammars: which tokens a text may continue with, so that it becomes what its request asks for.

This file alone knows the library, llguidance: a request's parameters go in, matchers come out. A matcher follows one
sequence: `accept` its tokens, `fill` a row of bits with those that may come next, `rollback` some. Its state is a
function of the tokens that it has accepted, so it needs no care when a sequence is preempted.

Matchers of one compilation share what they learn of the grammar, and a lock: they help each other, but cannot work at
once. So a grammar is compiled once for each thread, and matchers are dealt out to these compilations in turn.

A mask is a walk through the tree of all tokens, of a fraction of a millisecond to some. Tokens that a string allows as
a whole are the exception: the library tests a few classes of them, *slices*, and walks only through the rest.
"""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanovllm.structured_outputs import StructuredOutputsParams
from nanovllm.text.json_schema import enforceable_schema
from nanovllm.text.mask_workers import MaskWorkers
from nanovllm.text.surrogates import refuse_surrogates

MAX_COMPILED = 512  # compilations kept, the latest used; a large one has some MB
MAX_COPIES = 256  # matchers of one compilation: what they learn has a limit, at which all of them would fail
MAX_THREADS = 16
# Between JSON's tokens, unless a request says otherwise: room to indent, but none for endless blank lines, into which
# weak models fall until their tokens are used up.
WHITESPACE = r"\n?[ \t]{0,24}"
# Tokens of up to so many characters that a JSON string may have as they are. A string of bounded length allows those of
# its remaining length. The library's own slices end at 10 and 30: their masks take twice to three times as long.
SLICES = [r'[^"\\\x00-\x1F\x7F]' + times for times in ("{1,4}", "{1,8}", "{1,12}", "{1,20}", "{1,30}", "+")]


@dataclass(slots=True)
class _Compiled:
    matcher: Any  # the library's, at the beginning of a text
    num_copies: int = 0


class Grammars:
    """Compiles the grammars of an engine's requests. One thread at a time; matchers may be used in another."""

    def __init__(
        self, tokenizer: Any, vocab_size: int, eos_token_ids: Iterable[int], num_threads: int | None = None
    ) -> None:
        """
        Args:
            tokenizer: a `transformers` tokenizer.
            vocab_size: of the model; it may differ from the tokenizer's.
            eos_token_ids: any of them may follow a text that may end.
            num_threads: that fill rows of bits; None: one for each core but one, at most MAX_THREADS.

        Raises ValueError if the tokenizer, or the lack of an EOS, allows no grammars.
        """
        from llguidance import LLTokenizer

        self.eos_token_ids = sorted(eos_token_ids)
        if not self.eos_token_ids:
            raise ValueError("structured_outputs needs an end-of-sequence token, and this model has none")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"structured_outputs needs a fast tokenizer, and {type(tokenizer).__name__} is none")
        backend = copy(backend)
        backend.no_padding()
        backend.no_truncation()
        num_tokens = max(vocab_size, len(tokenizer))
        try:
            self._tokenizer = LLTokenizer(
                backend.to_str(), n_vocab=num_tokens, eos_token=self.eos_token_ids, slices=SLICES
            )
        except Exception as error:  # the library raises several types, and none names the argument
            raise ValueError(f"structured_outputs cannot use this tokenizer: {error}") from error
        self.num_words = -(-num_tokens // 32)
        self._compiled: OrderedDict[tuple, _Compiled] = OrderedDict()
        self._num_threads = num_threads or max(1, min(MAX_THREADS, _num_cores() - 1))
        self._workers = MaskWorkers(self._num_threads)
        self._next_thread = 0

    def matcher(
        self, params: StructuredOutputsParams, stop_token_ids: Iterable[int] = (), ignore_eos: bool = False
    ) -> "Matcher":
        """A matcher at the beginning of its text.

        Args:
            stop_token_ids: these, too, may follow a text that may end.
            ignore_eos: no EOS may follow a text that may go on.

        Raises ValueError, which names the argument, if the grammar is wrong, too large, or cannot be enforced.
        """
        options = (params.disable_any_whitespace, params.disable_additional_properties, params.whitespace_pattern)
        thread = self._next_thread
        self._next_thread = (thread + 1) % self._num_threads
        key = (thread, *_source(params), *options)
        compiled = self._compiled.get(key)
        if compiled is None or compiled.num_copies == MAX_COPIES:
            compiled = self._compiled[key] = _Compiled(self.compile(params))
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        compiled.num_copies += 1
        at_end = sorted({*self.eos_token_ids, *stop_token_ids})
        ends = (self.eos_token_ids, at_end, ignore_eos)
        return Matcher(compiled.matcher.deep_copy(), self.num_words, thread, self._workers, *ends)

    def compile(self, params: StructuredOutputsParams) -> Any:
        """The library's matcher, which is known to have a first token. Raises as `matcher`."""
        from llguidance import LLMatcher

        kind, source = _source(params)
        try:
            matcher = LLMatcher(self._tokenizer, _grammar(params, kind, source), log_level=0)
            first = matcher.deep_copy()
            first.compute_bitmask()
            reason = _error(matcher) or _error(first)
        except ValueError as error:
            reason = str(error)
        if reason:
            raise ValueError(f"structured_outputs: {kind}={getattr(params, kind)!r:.80} is refused: {reason}")
        return matcher


class Matcher:
    """Follows one sequence's text. Not thread-safe.

    Attributes:
        num_tokens: that it has accepted and not rolled back.
        num_words: int32 numbers of a row of bits.
    """

    def __init__(
        self,
        matcher: Any,
        num_words: int,
        thread: int,
        workers: MaskWorkers,
        eos_token_ids: list[int],
        end_token_ids: list[int],
        ignore_eos: bool,
    ) -> None:
        self.num_tokens = 0
        self.num_words = num_words
        self._matcher, self._thread, self._workers = matcher, thread, workers
        self._eos_token_ids, self._end_token_ids, self._ignore_eos = eos_token_ids, end_token_ids, ignore_eos

    @property
    def error(self) -> str:
        """Why it can go on no longer: it met a token that the grammar forbids, or a limit of its memory or time."""
        return _error(self._matcher)

    @property
    def may_end(self) -> bool:
        """Whether the text is complete, though it may be able to go on."""
        return self._matcher.is_accepting()

    @property
    def is_terminated(self) -> bool:
        """Whether the text is complete and cannot go on."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def accept(self, token_ids: list[int]) -> bool:
        """Take the next tokens. False, and an `error`, if the grammar forbids one of them."""
        self.num_tokens += len(token_ids)
        return self._matcher.consume_tokens(token_ids)

    def rollback(self, num_tokens: int) -> None:
        """Forget the last tokens. Raises ValueError if it has not accepted as many."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"num_tokens={num_tokens} must be in [0, {self.num_tokens}]")
        self._matcher.rollback(num_tokens)
        self.num_tokens -= num_tokens

    def forced(self) -> list[int]:
        """The tokens that must come next, whatever the model says; none if there is a choice."""
        return self._matcher.compute_ff_tokens()

    def fill(self, row: np.ndarray) -> None:
        """Set the bits of the tokens that may come next, and clear the others; all are cleared after an `error`.

        Args:
            row: `[num_words]` int32, contiguous. Token t is bit t % 32 of word t // 32.
        """
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._complete(row)

    @staticmethod
    def advance_all(matchers: "list[Matcher]", token_ids: list[list[int]], bits: np.ndarray) -> None:
        """`accept` and then `fill` for each matcher, by several threads at once.

        Args:
            token_ids: for each matcher.
            bits: `[matchers, num_words]` int32, contiguous: a row for each.
        """
        for matcher, ids in zip(matchers, token_ids, strict=True):
            matcher.accept(ids)
        matchers[0]._workers.fill([(matcher._thread, matcher._matcher) for matcher in matchers], bits)
        for matcher, row in zip(matchers, bits, strict=True):
            matcher._complete(row)

    def _complete(self, row: np.ndarray) -> None:
        """Put into the row what the library does not know of."""
        if self._matcher.is_error():
            row.fill(0)
        elif self._matcher.is_accepting():
            self._end(row.view(np.uint32))

    def _end(self, row: np.ndarray) -> None:
        """Where the text may end: let stop tokens follow it, and with `ignore_eos` EOS only if nothing else may."""
        if self._ignore_eos and not self._matcher.is_stopped():
            _set(row, self._eos_token_ids, False)
            if row.any():
                return
        _set(row, self._end_token_ids, True)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _error(matcher: Any) -> str:
    reason = " ".join(matcher.get_error().split("<state>")[0].split())[:500]
    return "nothing is allowed" if reason == "NoExtensionBias" else reason


def _set(row: np.ndarray, token_ids: list[int], is_allowed: bool) -> None:
    for token_id in token_ids:
        bit = np.uint32(1 << token_id % 32)
        row[token_id // 32] = row[token_id // 32] | bit if is_allowed else row[token_id // 32] & ~bit


def _source(params: StructuredOutputsParams) -> tuple[str, str]:
    """The parameter that says what the text must be, and its value as a string. Raises ValueError."""
    if params.json_object:
        return "json_object", '{"type": "object"}'
    for kind in ("regex", "grammar"):
        if getattr(params, kind) is not None:
            refuse_surrogates(getattr(params, kind), kind)
            return kind, getattr(params, kind)
    kind, value = ("json", params.json) if params.choice is None else ("choice", params.choice)
    if isinstance(value, str):
        return kind, value
    try:
        return kind, json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs: {kind}={value!r:.80} is not JSON: {error}") from error


def _grammar(params: StructuredOutputsParams, kind: str, source: str) -> str:
    """The library's form of a grammar. Raises ValueError, which says why it is refused."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    if kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(source))))
    if kind == "grammar":
        if re.search(r"^\s*[\w-]+\s*::=", source, re.MULTILINE):
            try:
                source = any_to_lark(source)
            except GbnfToLarkError as error:
                raise ValueError(f"it is no GBNF: {error}") from error
        return LLMatcher.grammar_from_lark(source)
    schema = enforceable_schema(source, params.disable_additional_properties)
    # An escape could spell a property's name a second time, and hide its first value. Where a schema itself has
    # characters that only escapes can write, they are allowed.
    has_control = re.search(r"\\u00[01][0-9a-f]", schema) is not None
    whitespace = params.whitespace_pattern
    if whitespace is None and not params.disable_any_whitespace:
        whitespace = WHITESPACE
    # These override what a schema may say of itself: it must not have keywords ignored.
    options = {
        "lenient": False,
        "coerce_one_of": False,
        "whitespace_flexible": False,
        "whitespace_pattern": whitespace,
        "json_allowed_escapes": 'nrbtf\\"' + "u" * has_control,
    }
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)
