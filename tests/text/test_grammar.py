"""What a grammar allows next, and which grammars are refused, and by which name."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nanovllm import StructuredOutputsParams, demo_model
from nanovllm.text import grammar
from nanovllm.text.grammar import Grammars, Matcher

EOS, VOCAB_SIZE = 0, 6144


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model())


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, VOCAB_SIZE, {EOS})


def allowed(matcher: Matcher) -> set[int]:
    row = np.empty(matcher.num_words, np.int32)
    matcher.fill(row)
    return set(np.unpackbits(row.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def takes(matcher: Matcher, tokenizer: Any, text: str) -> bool:
    """Whether the text can be drawn, token by token under its masks, and may end there."""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        if token_id not in allowed(matcher):
            return False
        assert matcher.accept([token_id])
    assert (EOS in allowed(matcher)) == matcher.may_end
    return matcher.may_end


@pytest.mark.parametrize(
    ("params", "good", "bad"),
    [
        ({"regex": r"[a-c]+-\d{2}"}, ["a-12", "abc-00"], ["a-1", "a-123", "d-12", ""]),
        ({"regex": r"^(yes|no)$"}, ["yes", "no"], ["yesno", "y"]),
        ({"choice": ["yes", "no", "yes!", 'a"b\\n\n', "é日"]}, ["yes", "yes!", 'a"b\\n\n', "é日"], ["ye", "no!", ""]),
        ({"grammar": 'start: WORD ("," WORD)*\nWORD: /[a-z]+/'}, ["a", "ab,c"], ["a,", ",", "A"]),
        ({"grammar": 'root ::= "(" root ")" | "x"'}, ["x", "((x))"], ["((x)", "()"]),
        ({"json_object": True}, ['{"a": [1, {}]}', "{}"], ["[]", "{'a': 1}", '{"a": 1', "1"]),
        ({"json": {"type": "integer", "minimum": 3}}, ["3", "12"], ["2", "03", '"3"', "3.5"]),
        ({"json": '{"enum": ["a", 1, null]}'}, ['"a"', "1", "null"], ["a", "2"]),
        (
            {"json": {"type": "array"}},
            ["[1,2]", "[ 1 ,\t2 ]", json.dumps([1, [2, {"a": []}]], indent=8), "[\n" + " " * 24 + "1]"],
            ["[\n\n1]", "[1" + " " * 25 + "]", "[1,\n \n2]"],
        ),
        ({"json_object": True}, [json.dumps({"a": {"b": 1}}, indent=2)], ['{"a":\n\n1}']),
        ({"json": {"type": "array"}, "whitespace_pattern": r"\s*"}, ["[\n\n\n 1]", "[]"], []),
        ({"json": {"type": "array"}, "disable_any_whitespace": True}, ["[1,2]"], ["[1, 2]", "[ ]"]),
        ({"json": {"type": "array"}, "whitespace_pattern": " ?"}, ["[1, 2]", "[1,2]"], ["[1,  2]", "[1,\n2]"]),
        ({"json": {"properties": {"a": {}}, "type": "object"}}, ['{"a": 1, "b": 2}'], ['{"b": 2, "a": 1}']),
        (
            {"json": {"properties": {"a": {}}, "type": "object"}, "disable_additional_properties": True},
            ['{"a": {"z": 1}}', "{}"],
            ['{"a": 1, "b": 2}'],
        ),
    ],
)
def test_the_texts_that_can_be_drawn_are_those_of_the_grammar(
    params: dict[str, Any], good: list[str], bad: list[str], grammars: Grammars, tokenizer: Any
) -> None:
    make = grammars.matcher
    assert [text for text in good if not takes(make(StructuredOutputsParams(**params)), tokenizer, text)] == []
    assert [text for text in bad if takes(make(StructuredOutputsParams(**params)), tokenizer, text)] == []


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text("ab é", max_size=4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_a_choice_allows_only_tokens_that_lead_to_one_of_its_texts_and_excludes_no_text(
    grammars: Grammars, tokenizer: Any, choice: list[str], rng: Any
) -> None:
    """The plain rule, token by token: the text so far and the token are the beginning of one of them.

    Of texts that are forced the library allows the tokens that the tokenizer itself would make, and no others.
    """
    texts = [text.encode() for text in choice]
    matcher, so_far = grammars.matcher(StructuredOutputsParams(choice=choice)), b""
    while True:
        expected = {i for i, t in tokens_of(tokenizer).items() if t and any(x.startswith(so_far + t) for x in texts)}
        found = allowed(matcher)
        assert (EOS in found) == (so_far in texts)
        found -= {EOS}
        assert found <= expected
        assert {tokens_of(tokenizer)[i][0] for i in found} == {tokens_of(tokenizer)[i][0] for i in expected}
        if not expected:
            return
        token_id = rng.choice(sorted(found))
        matcher.accept([token_id])
        so_far += tokens_of(tokenizer)[token_id]


_tokens: dict[int, bytes] = {}


def tokens_of(tokenizer: Any) -> dict[int, bytes]:
    """The bytes of the tokens that texts of these tests may have: by the byte-level alphabet, not by llguidance."""
    if not _tokens:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        to_byte = {char: byte for byte, char in bytes_to_unicode().items()}
        for text, token_id in tokenizer.get_vocab().items():
            if all(char in to_byte for char in text):
                _tokens[token_id] = bytes(to_byte[char] for char in text)
    return _tokens


def test_a_matcher_goes_back_and_knows_what_is_forced(grammars: Grammars, tokenizer: Any) -> None:
    matcher = grammars.matcher(StructuredOutputsParams(regex="(import|return) os[0-9]"))
    first = allowed(matcher)
    assert not matcher.forced() and len(first) > 1
    ids = tokenizer.encode("import", add_special_tokens=False)
    matcher.accept(ids)
    forced = matcher.forced()
    assert tokenizer.decode(forced) == " os" and allowed(matcher) >= {forced[0]}
    matcher.accept(forced)
    assert matcher.num_tokens == len(ids + forced) and not matcher.is_terminated
    matcher.rollback(len(ids + forced))
    assert allowed(matcher) == first and matcher.num_tokens == 0
    with pytest.raises(ValueError, match=r"num_tokens=1 must be in \[0, 0\]"):
        matcher.rollback(1)


def test_a_token_against_the_grammar_is_an_error_and_then_nothing_is_allowed(grammars: Grammars) -> None:
    matcher = grammars.matcher(StructuredOutputsParams(regex="a"))
    (forbidden, *_) = set(range(10, 20)) - allowed(matcher)
    assert not matcher.error and not matcher.accept([forbidden])
    assert "doesn't satisfy the grammar" in matcher.error and not allowed(matcher) and not matcher.is_terminated


def test_stop_tokens_may_follow_where_the_text_may_end(grammars: Grammars, tokenizer: Any) -> None:
    matcher = grammars.matcher(StructuredOutputsParams(regex="a+"), stop_token_ids=[77])
    assert not {EOS, 77} & allowed(matcher)
    matcher.accept(tokenizer.encode("a", add_special_tokens=False))
    assert {EOS, 77} < allowed(matcher)


def test_with_ignore_eos_it_follows_only_where_nothing_else_may(grammars: Grammars, tokenizer: Any) -> None:
    a = tokenizer.encode("a", add_special_tokens=False)
    endless = grammars.matcher(StructuredOutputsParams(regex="a+"), ignore_eos=True)
    endless.accept(a)
    assert endless.may_end and EOS not in allowed(endless)
    once = grammars.matcher(StructuredOutputsParams(regex="a"), ignore_eos=True)
    once.accept(a)
    assert allowed(once) == {EOS}


def test_a_schema_cannot_have_a_name_twice_by_an_escape(grammars: Grammars, tokenizer: Any) -> None:
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}, "type": "object"}
    assert takes(grammars.matcher(StructuredOutputsParams(json=schema)), tokenizer, '{"a": 1, "b": "x"}')
    assert not takes(grammars.matcher(StructuredOutputsParams(json=schema)), tokenizer, '{"a": 1, "\\u0061": "x"}')
    control = StructuredOutputsParams(json={"const": "\x01"})
    assert takes(grammars.matcher(control), tokenizer, json.dumps("\x01"))


OBJECT = {"type": "object", "properties": {"a": {}, "b": {}}}
REFUSED_KEYWORDS = {
    "not": {"not": {"type": "string"}},
    "if": {**OBJECT, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "dependentRequired": {**OBJECT, "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {**OBJECT, "dependentSchemas": {"a": {"required": ["b"]}}},
    "dependencies": {**OBJECT, "dependencies": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a$"}},
    "contains": {"type": "array", "contains": {"const": 1}},
    "minContains": {"type": "array", "contains": {"const": 1}, "minContains": 2},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "unevaluatedProperties": {**OBJECT, "unevaluatedProperties": False},
    "unevaluatedItems": {"type": "array", "prefixItems": [{}], "unevaluatedItems": False},
    r"\$dynamicRef": {"$dynamicRef": "#x", "$defs": {"x": {"$dynamicAnchor": "x", "type": "integer"}}},
    "format: foo": {"type": "string", "format": "foo"},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "minProperties=3": {"type": "object", "required": ["a"], "minProperties": 3},
    "minProperties=2": {"items": {"type": "object", "minProperties": 2}},
    "x-guidance": {"type": "object", "x-guidance": {"lenient": True}, "not": {}},
    "look-around": {"type": "string", "pattern": "^(?=a)a$"},
    "http://a.b/c": {"$ref": "http://a.b/c"},
}


@pytest.mark.parametrize("keyword", REFUSED_KEYWORDS)
def test_a_keyword_that_cannot_be_enforced_is_refused_by_name(keyword: str, grammars: Grammars) -> None:
    for nested in (REFUSED_KEYWORDS[keyword], {"anyOf": [{"type": "null"}, REFUSED_KEYWORDS[keyword]]}):
        if keyword == "x-guidance" and "anyOf" in nested:
            continue  # an unknown keyword there, and its neighbour is refused
        with pytest.raises(ValueError, match=rf"structured_outputs: json=.*is refused: .*{keyword}"):
            grammars.matcher(StructuredOutputsParams(json=nested))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"json": "{"}, "json='{' is refused: Expecting property name"),
        ({"json": "[]"}, "a schema is an object"),
        ({"json": {"type": "float"}}, "Invalid type: float"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "Unsatisfiable"),
        ({"json": {"enum": [{1, 2}]}}, "is not JSON"),
        ({"json": {"const": float("nan")}}, "is not JSON"),
        ({"json": json.loads('{"items":' * 300 + "{}" + "}" * 300)}, "recursion limit"),
        ({"json": '{"items":' * 30_000 + "{}" + "}" * 30_000}, "nested too deeply"),
        ({"json": {"const": "\ud800"}}, "is refused"),
        ({"json": {"type": "array"}, "whitespace_pattern": "("}, "unclosed group"),
        ({"regex": "(a"}, r"regex='\(a' is refused: .*unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "[^\\s\\S]"}, "nothing is allowed"),
        ({"regex": "\ud800"}, "lone surrogate"),
        ({"grammar": "start: x"}, "grammar='start: x' is refused: .*unknown name"),
        ({"grammar": "start: start"}, "nothing is allowed"),
        ({"grammar": "root ::= ("}, "is no GBNF"),
        ({"grammar": ""}, "is refused"),
    ],
)
def test_a_grammar_that_is_wrong_is_refused_with_the_reason(
    params: dict[str, Any], message: str, grammars: Grammars
) -> None:
    with pytest.raises(ValueError, match=message):
        grammars.matcher(StructuredOutputsParams(**params))


def test_a_tokenizer_or_model_without_what_grammars_need_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="needs an end-of-sequence token"):
        Grammars(tokenizer, VOCAB_SIZE, ())
    with pytest.raises(ValueError, match="needs a fast tokenizer, and object is none"):
        Grammars(object(), VOCAB_SIZE, {EOS})


def test_compiled_grammars_are_kept_but_not_for_ever(
    grammars: Grammars, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_grammar = Grammars.compile
    monkeypatch.setattr(grammar, "MAX_COMPILED", 3)
    monkeypatch.setattr(grammar, "MAX_COPIES", 4)
    small = Grammars(tokenizer, VOCAB_SIZE, {EOS}, num_threads=1)
    monkeypatch.setattr(
        Grammars, "compile", lambda self, params: compiled.append(params.regex) or compile_grammar(self, params)
    )
    for name in ("a", "b", "a", "c", "a", "d", "b", "a", "a"):
        matcher = small.matcher(StructuredOutputsParams(regex=name))
        assert takes(matcher, tokenizer, name)
    # b was the one not used for longest when d came; a was renewed after four copies.
    assert compiled == ["a", "b", "c", "d", "b", "a"]


def test_copies_of_one_grammar_do_not_know_of_each_other(grammars: Grammars, tokenizer: Any) -> None:
    one, other = (grammars.matcher(StructuredOutputsParams(choice=["ab", "cd"])) for _ in range(2))
    first = allowed(other)
    one.accept(tokenizer.encode("ab", add_special_tokens=False))
    assert allowed(one) == {EOS} and allowed(other) == first


def test_many_rows_advance_and_are_filled_by_threads_with_the_same_bits(tokenizer: Any) -> None:
    params = [StructuredOutputsParams(json_object=True), StructuredOutputsParams(choice=["ab", "ac"])]
    found = []
    for num_threads in (1, 3):
        grammars = Grammars(tokenizer, VOCAB_SIZE, {EOS}, num_threads)
        matchers = [grammars.matcher(params[i % 2], ignore_eos=i % 3 == 0) for i in range(20)]
        texts = [["{", "a", "{}", "ab"][i % 4] for i in range(20)]
        bits = np.empty((20, matchers[0].num_words), np.int32)
        Matcher.advance_all(matchers, [tokenizer.encode(text, add_special_tokens=False) for text in texts], bits)
        found.append(bits)
        assert [set(np.unpackbits(row.view(np.uint8), bitorder="little").nonzero()[0]) for row in bits] == [
            allowed(matcher) for matcher in matchers
        ]
    assert (found[0] == found[1]).all() and len({row.tobytes() for row in found[0]}) == 3


def test_threads_take_tokens_as_one_matcher_does(tokenizer: Any) -> None:
    """Whatever they are: allowed, forbidden, none, several, or the end of the text."""
    letters = [tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b", "ab", "")]
    news = [[letters[0], letters[1], letters[2], letters[3], [EOS]][i % 5] for i in range(30)]
    found = []
    for num_threads in (1, 3):
        grammars = Grammars(tokenizer, VOCAB_SIZE, {EOS}, num_threads)
        matchers = [grammars.matcher(StructuredOutputsParams(regex="(ab?)?")) for _ in news]
        for _ in range(2):
            Matcher.advance_all(matchers, news, np.empty((len(news), matchers[0].num_words), np.int32))
        found.append([(m.num_tokens, m.error, m.may_end, m.is_terminated, allowed(m)) for m in matchers])
    assert found[0] == found[1]
    assert {bool(error) for _, error, *_ in found[0]} == {True, False}


def test_slices_change_no_mask(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 25}, "b": {"type": "string"}}}
    params, text = StructuredOutputsParams(json=schema), '{"a": "some text, \\"quoted\\"", "b": "and more"}'
    found = []
    for slices in (grammar.SLICES, []):
        monkeypatch.setattr(grammar, "SLICES", slices)
        matcher = Grammars(tokenizer, VOCAB_SIZE, {EOS}, num_threads=1).matcher(params)
        found.append([allowed(matcher)])
        for token_id in tokenizer.encode(text, add_special_tokens=False):
            assert matcher.accept([token_id])
            found[-1].append(allowed(matcher))
    assert found[0] == found[1] and len(set(map(len, found[0]))) > 5
