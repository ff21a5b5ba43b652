"""SamplingParams refuses, when it is made, whatever could not be sampled."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from nanovllm import RequestOutputKind, SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", NAN),
        ("temperature", INF),
        ("temperature", -0.1),
        ("top_k", -2),
        ("top_p", 0),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.01),
        ("top_p", NAN),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", NAN),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("stop_token_ids", [3, -1]),
        ("n", 0),
        ("n", 16385),
        ("presence_penalty", -2.01),
        ("presence_penalty", 2.01),
        ("presence_penalty", NAN),
        ("frequency_penalty", -2.01),
        ("frequency_penalty", INF),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", INF),
        ("repetition_penalty", NAN),
        ("logit_bias", {5: NAN}),
        ("logit_bias", {-1: 1.0}),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [3, -1]),
        ("bad_words", ["good", ""]),
        ("bad_words", [" "]),
        ("stop", ""),
        ("stop", ["end", ""]),
        ("logprobs", -2),
        ("prompt_logprobs", -2),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
    ],
)
def test_value_out_of_range_is_a_value_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*must be"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", 1.5),
        ("top_p", "0.9"),
        ("seed", 1.0),
        ("seed", "1"),
        ("seed", True),
        ("max_tokens", 1.0),
        ("max_tokens", "16"),
        ("ignore_eos", 1),
        ("stop_token_ids", 7),
        ("stop_token_ids", "7"),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
        ("output_kind", "delta"),
        ("n", 1.0),
        ("n", True),
        ("frequency_penalty", "1"),
        ("logit_bias", [1.0]),
        ("logit_bias", {5: "1"}),
        ("logit_bias", {"five": 1.0}),
        ("logit_bias", {"-5": 1.0}),
        ("logit_bias", {True: 1.0}),
        ("allowed_token_ids", 5),
        ("allowed_token_ids", [1.5]),
        ("bad_words", "bad"),
        ("bad_words", [5]),
        ("stop", 5),
        ("stop", [5]),
        ("logprobs", 1.0),
        ("prompt_logprobs", "5"),
        ("detokenize", 1),
        ("spaces_between_special_tokens", 0),
        ("include_stop_str_in_output", "no"),
        ("truncate_prompt_tokens", 3.0),
    ],
)
def test_value_of_the_wrong_type_is_a_type_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}=.*must be"):
        SamplingParams(**{name: value})


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="min_tokens=5 must not exceed max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    SamplingParams(min_tokens=4, max_tokens=4)
    SamplingParams(min_tokens=500, max_tokens=None)


def test_parameters_that_contradict_each_other_are_refused() -> None:
    for temperature in (0, 1e-6):
        with pytest.raises(ValueError, match="n=2 must be 1 with temperature=.*: all would be the same"):
            SamplingParams(n=2, temperature=temperature)
    SamplingParams(n=2, temperature=0.1)
    with pytest.raises(ValueError, match="stop=.*must be empty with detokenize=False"):
        SamplingParams(stop="end", detokenize=False)
    SamplingParams(detokenize=False, stop_token_ids=[3])


def test_defaults_are_vllms() -> None:
    defaults = SamplingParams()
    assert {name: getattr(defaults, name) for name in SamplingParams.__dataclass_fields__} == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": None,
        "stop": [],
        "stop_token_ids": [],
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "min_tokens": 0,
        "max_tokens": 16,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": [],
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "output_kind": RequestOutputKind.CUMULATIVE,
        "truncate_prompt_tokens": None,
        "structured_outputs": None,
    }


def test_unknown_parameter_and_positional_values_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(0.5)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": 2},
        {"top_k": -1},
        {"top_k": 0},
        {"top_k": 1},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 0},
        {"min_p": 1.0},
        {"seed": 0},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": None},
        {"max_tokens": 1},
        {"stop_token_ids": (1, 2)},
        {"stop_token_ids": []},
        {"n": 16384},
        {"presence_penalty": -2},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 1e-3},
        {"logit_bias": None},
        {"logit_bias": {}},
        {"logit_bias": {0: -100, 7: 100.0, 8: 1e300, 9: -INF, 10: INF}},
        {"allowed_token_ids": (0,)},
        {"bad_words": ("word",)},
        {"stop": ("a", " ")},
        {"logprobs": 0},
        {"logprobs": -1},
        {"prompt_logprobs": 1000},
        {"truncate_prompt_tokens": -1},
        {"truncate_prompt_tokens": 1},
    ],
)
def test_values_at_the_edge_of_what_is_allowed_are_taken(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    for name, value in values.items():
        assert getattr(params, name) == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("name", [name for name in SamplingParams.__dataclass_fields__ if name != "max_tokens"])
def test_none_is_the_default_of_every_parameter_that_has_no_other_meaning_for_it(name: str) -> None:
    assert SamplingParams(**{name: None}) == SamplingParams.from_optional(**{name: None}) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("seed", -1, None),
        ("logprobs", True, 1),
        ("logprobs", False, None),
        ("prompt_logprobs", True, 1),
        ("logit_bias", {"5": 1.0, 7: 2.0}, {5: 1.0, 7: 2.0}),
        ("stop", "end", ["end"]),
        ("stop", {"end"}, ["end"]),
        ("stop_token_ids", range(3), [0, 1, 2]),
        ("allowed_token_ids", frozenset([4]), [4]),
        ("bad_words", ("b",), ["b"]),
    ],
)
def test_what_can_be_said_in_several_ways_is_one(name: str, value: Any, meant: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == meant


def test_a_servers_biases_are_cut_and_a_programs_are_not() -> None:
    bias = {"3": 250.0, 4: -101.0, 5: 1.0}
    assert SamplingParams.from_optional(logit_bias=bias).logit_bias == {3: 100.0, 4: -100.0, 5: 1.0}
    assert SamplingParams(logit_bias=bias).logit_bias == {3: 250.0, 4: -101.0, 5: 1.0}
    with pytest.raises(ValueError, match="temperature=-1 must be"):
        SamplingParams.from_optional(temperature=-1)


def test_lists_are_copies_which_nobody_else_changes() -> None:
    lists: dict[str, Any] = {"stop_token_ids": [1, 2], "allowed_token_ids": [1, 2], "stop": ["a"], "bad_words": ["b"]}
    bias = {1: 2.0}
    params = SamplingParams(**lists, logit_bias=bias)
    copied = params.clone()
    for name, value in lists.items():
        value.append(value[0])
        assert getattr(params, name) == value[:-1]
        getattr(params, name).append(value[0])
        assert getattr(copied, name) == value[:-1]
    bias[1] = params.logit_bias[1] = 3.0
    assert copied.logit_bias == {1: 2.0}


def test_parameters_can_be_assigned_to_and_are_checked_when_they_are_used() -> None:
    params = SamplingParams()
    params.temperature, params.stop, params.max_tokens, params.seed = 0.5, "end", 64, -1
    assert params.clone() == SamplingParams(temperature=0.5, stop=["end"], max_tokens=64)
    params.top_p = 1.5
    with pytest.raises(ValueError, match="top_p=1.5 must be"):
        params.clone()
    params.top_p = "0.5"
    with pytest.raises(TypeError, match="top_p='0.5' must be"):
        params.clone()
    params.top_p, params.min_tokens = 0.5, 65
    with pytest.raises(ValueError, match="min_tokens=65 must not exceed max_tokens=64"):
        params.clone()
    params.min_tokens, params.temprature = 0, 0.5
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        params.clone()


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), SamplingParams.clone]
)
def test_a_copy_is_equal_and_another_is_not(copied: Callable[[SamplingParams], SamplingParams]) -> None:
    params = SamplingParams(stop_token_ids=(1, 2), logit_bias={3: 1.0}, temperature=0.7)
    assert copied(params) == params and copied(params) is not params and repr(copied(params)) == repr(params)
    assert params != SamplingParams(stop_token_ids=[1, 2], logit_bias={3: 2.0}, temperature=0.7)
