"""Structured outputs through the whole engine: every text is what its request asks for, and nobody else's changes."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inside import assert_nothing_is_held, fail_grammars_after, what_is_held
from nanovllm.vllm.sampling_params import GuidedDecodingParams
from random_schemas import schemas
from ranks_in_threads import ranks_in_threads

from nanovllm import (
    LLM,
    AsyncLLM,
    CompletionOutput,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
    chat_model,
    demo_model,
)

OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
}
PROMPTS = ["import os\n", "def load(self, file, key):\n    return ", "class Stack:\n", "x = {"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{2,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3},
        "inner": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "tags", "inner"],
    "additionalProperties": False,
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}},
}
COMPACT = {"disable_any_whitespace": True}
PLAIN = SamplingParams(max_tokens=24, seed=5)


def structured(max_tokens: int = 200, seed: int = 1, **params: Any) -> SamplingParams:
    """Parameters of a request; those of structured outputs in `json`, `regex`, …, the others as they are."""
    names = StructuredOutputsParams.__dataclass_fields__
    outputs = {name: params.pop(name) for name in list(params) if name in names}
    return SamplingParams(
        max_tokens=max_tokens, seed=seed, structured_outputs=StructuredOutputsParams(**outputs), **params
    )


def completions(llm: LLM, prompts: Any, params: Any) -> list[CompletionOutput]:
    return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]


def tokens(found: list[CompletionOutput]) -> list[list[int]]:
    return [completion.token_ids for completion in found]


MIXED = [
    structured(json=SCHEMA, **COMPACT),
    PLAIN,
    structured(regex="[a-z]{3}=[0-9]{1,3};", temperature=0),
    structured(choice=["yes", "no", "perhaps"], top_k=5, repetition_penalty=1.3),
    structured(grammar='root ::= "(" root ")" | "x"', seed=3, logprobs=1, prompt_logprobs=1),
    SamplingParams(max_tokens=10, temperature=0, logprobs=1),
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(demo_model(), **OPTIONS)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    """The tokens of each of MIXED, alone in the engine."""
    return [tokens(completions(llm, PROMPTS[:1], params))[0] for params in MIXED]


class TestTexts:
    """What comes out."""

    def test_json_is_of_its_schema(self, llm: LLM) -> None:
        for found in completions(llm, PROMPTS * 2, [structured(json=SCHEMA, seed=i, **COMPACT) for i in range(8)]):
            assert found.finish_reason == "stop" and found.stop_reason is None
            jsonschema.validate(json.loads(found.text), SCHEMA)

    def test_a_json_object_is_one(self, llm: LLM) -> None:
        found = completions(llm, PROMPTS * 2, [structured(100, json_object=True, seed=i, **COMPACT) for i in range(8)])
        ended = [completion for completion in found if completion.finish_reason == "stop"]
        assert len(ended) > 3 and all(isinstance(json.loads(completion.text), dict) for completion in ended)

    def test_a_regular_expression_matches_all_of_the_text(self, llm: LLM) -> None:
        for temperature in (0, 1):
            params = structured(regex=r"[a-z]{3}=\d{1,3};", temperature=temperature)
            (found,) = completions(llm, PROMPTS[:1], params)
            assert re.fullmatch(r"[a-z]{3}=\d{1,3};", found.text) and found.finish_reason == "stop"

    def test_a_choice_is_one_of_its_texts_and_all_of_them_come(self, llm: LLM) -> None:
        texts = ["yes", "no", 'a "b"\n']
        found = completions(llm, PROMPTS[1], structured(choice=texts, n=1))
        outputs = llm.generate(PROMPTS[:1], structured(choice=texts, n=12, temperature=5.0), use_tqdm=False)
        assert {completion.text for completion in outputs[0].outputs} == set(texts)
        assert found[0].text in texts

    def test_grammars_in_lark_and_in_gbnf(self, llm: LLM) -> None:
        lark = structured(grammar='start: PAIR (", " PAIR)~0..2\nPAIR: /[a-z]{1,4}/ "=" /[0-9]{1,2}/')
        gbnf = structured(grammar='root ::= "[" ("x" | root)? "]"')
        pairs, brackets = completions(llm, PROMPTS[:2], [lark, gbnf])
        assert re.fullmatch(r"[a-z]{1,4}=\d{1,2}(, [a-z]{1,4}=\d{1,2}){0,2}", pairs.text)
        assert re.fullmatch(r"\[+x?\]+", brackets.text) and brackets.text.count("[") == brackets.text.count("]")

    def test_the_chat_model_answers_in_json(self) -> None:
        """A real vocabulary of 49,152 tokens, in a GGUF file."""
        try:
            path = chat_model()
        except FileNotFoundError as error:
            pytest.skip(str(error))
        schema = {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "is_large": {"type": "boolean"}},
            "required": ["city", "is_large"],
        }
        llm = LLM(path, **{**OPTIONS, "dtype": "bfloat16", "num_kvcache_blocks": 32})
        question = [{"role": "user", "content": "What is the capital of France? Answer in JSON: city, is_large."}]
        params = structured(json=schema, temperature=0, **COMPACT, disable_additional_properties=True)
        (answer,) = llm.chat(question, params, use_tqdm=False)
        llm.close()
        found = json.loads(answer.outputs[0].text)
        jsonschema.validate(found, schema)
        assert found["city"] == "Paris"


@settings(max_examples=3, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(schemas(), min_size=16, max_size=16))
def test_any_schema_of_json_is_answered_by_json_that_is_valid(llm: LLM, batch: list[dict[str, Any]]) -> None:
    """At temperature 1, sixteen schemas at once, with a model that writes Python."""
    checker = jsonschema.FormatChecker()
    params = [structured(max_tokens=150, json=schema, seed=i, **COMPACT) for i, schema in enumerate(batch)]
    for schema, found in zip(batch, completions(llm, PROMPTS * 4, params), strict=True):
        assert found.finish_reason == "stop", (schema, found)
        jsonschema.validate(json.loads(found.text), schema, format_checker=checker)


class TestBesideOthers:
    """The tokens of a request do not depend on who else is there, nor on when its masks come."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"max_behind": 1, "with_graphs": True},
            {"max_behind": 1, "max_num_batched_tokens": 16, "max_num_seqs": 3},
            {"max_behind": 1, "num_kvcache_blocks": 3, "max_model_len": 48, "enable_prefix_caching": False},
            {"max_behind": 1, "num_kvcache_blocks": 3, "max_model_len": 48},
        ],
        ids=["at_once", "graphs", "chunks", "preempted", "preempted_with_cache"],
    )
    def test_tokens_are_those_of_the_request_alone(
        self, options: dict[str, Any], alone: list[list[int]], make_llm: Callable[..., LLM]
    ) -> None:
        llm = make_llm(demo_model(), **{**OPTIONS, "skip_tokenizer_init": False, **options})
        for _ in range(1 if "max_behind" in options else 2):
            assert tokens(completions(llm, PROMPTS[:1] * len(MIXED), MIXED)) == alone
        if "num_kvcache_blocks" in options:
            assert llm.stats().num_preemptions > 0
        assert_nothing_is_held(llm)

    def test_two_ranks_draw_the_same(self, alone: list[list[int]]) -> None:
        with ranks_in_threads():
            llm = LLM(demo_model(), **OPTIONS, tensor_parallel_size=2)
            llm.engine.max_behind = 1
            try:
                found = completions(llm, PROMPTS[:1] * len(MIXED), MIXED)
            finally:
                llm.close()
        # Two halves are added up in another order, so temperature 1 may part; the grammars hold all the same.
        assert tokens(found)[2] == alone[2] and found[3].text in ("yes", "no", "perhaps")
        jsonschema.validate(json.loads(found[0].text), SCHEMA)

    def test_each_of_n_completions_has_its_own_text(self, llm: LLM) -> None:
        (output,) = llm.generate(PROMPTS[:1], structured(json=SCHEMA, n=3, **COMPACT), use_tqdm=False)
        assert len({completion.text for completion in output.outputs}) == 3
        for completion in output.outputs:
            jsonschema.validate(json.loads(completion.text), SCHEMA)

    def test_log_probabilities_are_the_models_own(self, llm: LLM) -> None:
        plain = SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
        model = completions(llm, PROMPTS[:1], plain)[0].logprobs[0]
        (found,) = completions(llm, PROMPTS[:1], structured(regex="[0-9]Q", logprobs=2, temperature=0))
        first = found.logprobs[0]
        assert found.token_ids[0] not in list(model)[:5], "the model would hardly say this by itself"
        for token_id, logprob in first.items():
            assert logprob.logprob == pytest.approx(model[token_id].logprob, abs=1e-5)
            assert logprob.rank == model[token_id].rank

    def test_other_edits_apply_too(self, llm: LLM) -> None:
        pick = {"choice": ["aaa", "bbb", "ccc"], "temperature": 0}
        a, b, c = (llm.get_tokenizer().encode(3 * letter, add_special_tokens=False)[0] for letter in "abc")
        edits = [{"logit_bias": {a: 100.0}}, {"logit_bias": {b: 100.0}}, {"allowed_token_ids": [c, *range(300)]}]
        found = completions(llm, PROMPTS[:3], [structured(**pick, **edit) for edit in edits])
        assert found[0].text == "aaa" and found[1].text == "bbb"
        banned = structured(**pick, bad_words=["aaa", "bbb", "a", "b", "aa", "bb"])
        assert completions(llm, PROMPTS[:1], banned)[0].text == "ccc"


class TestEnds:
    """How and when a request ends."""

    def test_max_tokens_cuts_the_text_off(self, llm: LLM) -> None:
        (found,) = completions(llm, PROMPTS[:1], structured(max_tokens=3, regex="[a-z ]{50}"))
        assert (found.finish_reason, len(found.token_ids)) == ("length", 3)

    def test_a_stop_string_ends_it_earlier(self, llm: LLM) -> None:
        (found,) = completions(llm, PROMPTS[:1], structured(regex="[0-9]{4};[0-9]{4}", stop=[";"]))
        assert re.fullmatch("[0-9]{4}", found.text) and (found.finish_reason, found.stop_reason) == ("stop", ";")

    def test_a_stop_token_may_follow_the_whole_text(self, llm: LLM) -> None:
        (newline,) = llm.get_tokenizer().encode("\n", add_special_tokens=False)
        params = structured(regex="[0-9]{2}", stop_token_ids=[newline], logit_bias={newline: 100.0})
        (found,) = completions(llm, PROMPTS[:1], params)
        assert re.fullmatch("[0-9]{2}", found.text) and (found.finish_reason, found.stop_reason) == ("stop", newline)

    def test_with_ignore_eos_it_ends_where_nothing_can_follow(self, llm: LLM) -> None:
        eos = llm.get_tokenizer().eos_token_id
        params = [
            structured(20, regex="a+", ignore_eos=True, logit_bias={eos: 100.0}),
            structured(20, regex="a{1,4}b", ignore_eos=True, logit_bias={eos: 100.0}),
        ]
        endless, whole = completions(llm, PROMPTS[:2], params)
        assert (endless.finish_reason, len(endless.token_ids)) == ("length", 20) and set(endless.text) == {"a"}
        assert whole.finish_reason == "stop" and re.fullmatch("a{1,4}b", whole.text)

    def test_min_tokens_holds_eos_back_while_the_text_may_go_on(self, llm: LLM) -> None:
        eos = llm.get_tokenizer().eos_token_id
        (found,) = completions(llm, PROMPTS[:1], structured(regex="a+", min_tokens=9, logit_bias={eos: 100.0}))
        assert found.finish_reason == "stop" and len(found.token_ids) == 10

    def test_a_grammar_without_a_next_token_fails_alone(self, llm: LLM) -> None:
        too_short = structured(choice=["yes"], min_tokens=50)
        failed, plain = completions(llm, PROMPTS[:2], [too_short, PLAIN])
        assert failed.finish_reason == "error" and "no token is left to draw" in failed.stop_reason
        assert failed.text == "yes"
        assert plain.token_ids == completions(llm, PROMPTS[1:2], PLAIN)[0].token_ids

    def test_a_grammar_that_fails_on_its_way_says_why_and_fails_alone(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fail_grammars_after(2, "too many states", monkeypatch)
        failed, plain = completions(llm, PROMPTS[:2], [structured(regex="[a-z]{30}"), PLAIN])
        assert failed.finish_reason == "error" and len(failed.token_ids) == 2
        assert failed.stop_reason == "its grammar cannot be followed any further: too many states"
        assert plain.finish_reason == "length"

    def test_a_draw_that_fails_ends_all_and_the_engine_serves_on(
        self, alone: list[list[int]], make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llm = make_llm(demo_model(), max_behind=1, **{**OPTIONS, "skip_tokenizer_init": False})
        draw, num_draws = llm.engine.runner.draw, 0

        def fail_once(*args: Any) -> Any:
            nonlocal num_draws
            num_draws += 1
            if num_draws == 4:
                raise RuntimeError("the device has failed")
            return draw(*args)

        monkeypatch.setattr(llm.engine.runner, "draw", fail_once)
        with pytest.raises(RuntimeError, match="the device has failed"):
            completions(llm, PROMPTS[:1] * len(MIXED), MIXED)
        assert_nothing_is_held(llm)
        assert tokens(completions(llm, PROMPTS[:1] * len(MIXED), MIXED)) == alone


class TestManyCallers:
    """Streams, and callers who leave."""

    def test_a_stream_brings_the_same_text_piece_by_piece(self, alone: list[list[int]]) -> None:
        async def run() -> tuple[list[RequestOutput], dict[str, Any]]:
            async with AsyncLLM(demo_model(), **OPTIONS) as llm:
                left = llm.generate(PROMPTS[0], structured(json_object=True, max_tokens=400, seed=2))
                await anext(left)
                params = structured(json=SCHEMA, **COMPACT, output_kind=RequestOutputKind.DELTA)
                found = [output async for output in llm.generate(PROMPTS[0], params)]
                await left.aclose()
                while held := what_is_held(llm):
                    await asyncio.sleep(0.01)
                return found, held

        found, held = asyncio.run(asyncio.wait_for(run(), 60))
        assert not held and len(found) > 5
        jsonschema.validate(json.loads("".join(output.outputs[0].text for output in found)), SCHEMA)
        assert [i for output in found for i in output.outputs[0].token_ids] == alone[0]

    def test_a_stream_that_is_left_leaves_nothing(self, llm: LLM) -> None:
        for output in llm.stream(PROMPTS[:2], [structured(json=SCHEMA), PLAIN]):
            if len(output.outputs[0].token_ids) > 3:
                break
        del output
        llm.abort("nobody")
        assert_nothing_is_held(llm)


class TestRefusals:
    """Bad parameters raise at the call, name the argument, and leave nothing behind."""

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"json": {}, "regex": "a"}, "has json={}, regex='a': it must have exactly one of json, regex, choice"),
            ({}, "has none: it must have exactly one"),
            ({"json_object": False}, "has none: it must have exactly one"),
            ({"choice": []}, r"choice=\[\] must be a list of strings, not empty"),
            ({"choice": ["a", 1]}, r"choice=\['a', 1\] must be a list of strings"),
            ({"structural_tag": "{}"}, "structural_tag='{}' must be None"),
            ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern=' ' needs json or json_object, not regex"),
            ({"choice": ["a"], "disable_any_whitespace": True}, "disable_any_whitespace=True needs json"),
            ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "contradicts disable_any_white"),
        ],
    )
    def test_parameters_that_contradict_each_other(self, params: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            StructuredOutputsParams(**params)

    @pytest.mark.parametrize(
        ("name", "value"), [("json", 3), ("regex", b"a"), ("choice", "ab"), ("grammar", 1), ("json_object", 1)]
    )
    def test_values_of_the_wrong_type(self, name: str, value: Any) -> None:
        with pytest.raises(TypeError, match=f"structured_outputs: {name}={value!r} must be"):
            StructuredOutputsParams(**{name: value})
        with pytest.raises(TypeError, match="structured_outputs={'regex': 'a'} must be None or a Structured"):
            SamplingParams(structured_outputs={"regex": "a"})

    def test_a_bad_grammar_is_refused_before_anything_is_queued(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match=r"regex='\(' is refused"):
            llm.generate(PROMPTS[:2], [PLAIN, structured(regex="(")], use_tqdm=False)
        with pytest.raises(ValueError, match='json=.* is refused: .*"not"'):
            llm.generate(PROMPTS[0], structured(json={"not": {}}), use_tqdm=False)
        assert_nothing_is_held(llm)

    def test_without_a_tokenizer_there_are_no_grammars(self, make_llm: Callable[..., LLM]) -> None:
        llm = make_llm(demo_model())
        with pytest.raises(ValueError, match="structured_outputs needs a tokenizer"):
            llm.generate([[1, 2]], structured(regex="a"), use_tqdm=False)

    def test_a_sequence_that_no_grammar_was_made_for_does_not_run_without(self, llm: LLM) -> None:
        llm.engine.add(llm.engine.make_sequence([1, 2], structured(regex="a")))
        with pytest.raises(RuntimeError, match="structured_outputs without a grammar"):
            llm.engine.step()
        assert_nothing_is_held(llm)

    def test_a_request_keeps_its_own_copy(self) -> None:
        schema = {"type": "integer"}
        mine = StructuredOutputsParams(json=schema)
        params = SamplingParams(structured_outputs=mine)
        schema["type"], mine.json = "string", None
        assert params.structured_outputs.json == {"type": "integer"}
        assert params.clone().structured_outputs is not params.structured_outputs


def test_vllms_older_names_mean_the_same(llm: LLM) -> None:
    guided = GuidedDecodingParams(choice=["yes"], backend="xgrammar")
    params = SamplingParams(max_tokens=9, guided_decoding=guided)
    assert params.structured_outputs == StructuredOutputsParams(choice=["yes"])
    assert completions(llm, PROMPTS[:1], params)[0].text == "yes"
    assert GuidedDecodingParams.from_optional(json=None) is None
    assert GuidedDecodingParams.from_optional(regex="a").regex == "a"
    with pytest.raises(ValueError, match="guided_decoding=.* must be None beside structured_outputs"):
        SamplingParams(guided_decoding=guided, structured_outputs=guided)
    assert SamplingParams(guided_decoding=None).structured_outputs is None


def test_steps_without_grammars_draw_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    draw = llm.engine.runner.draw
    monkeypatch.setattr(llm.engine.runner, "draw", lambda step, *masks: drawn.append(masks) or draw(step, *masks))
    completions(llm, PROMPTS, SamplingParams(max_tokens=5))
    assert not drawn
    completions(llm, PROMPTS[:1], structured(max_tokens=4, regex="[0-9]{9}"))
    assert len(drawn) == 4 and all(len(masks) == 1 for masks in drawn)
