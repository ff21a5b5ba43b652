"""SamplingParams refuses, when it is made, whatever could not be sampled."""

import dataclasses
from typing import Any

import pytest

from nanovllm import SamplingParams

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
    ],
)
def test_value_out_of_range_is_a_value_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*must be"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", True),
        ("top_k", 1.5),
        ("top_k", None),
        ("top_p", "0.9"),
        ("min_p", None),
        ("seed", 1.0),
        ("seed", "1"),
        ("seed", True),
        ("max_tokens", 1.0),
        ("max_tokens", "16"),
        ("min_tokens", None),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("stop_token_ids", 7),
        ("stop_token_ids", "7"),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", None),
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
    ],
)
def test_values_at_the_edge_of_what_is_allowed_are_taken(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    for name, value in values.items():
        assert getattr(params, name) == (tuple(value) if name == "stop_token_ids" else value)


def test_parameters_do_not_change_under_a_request() -> None:
    stop_ids = [1, 2]
    params = SamplingParams(stop_token_ids=stop_ids)
    stop_ids.append(3)
    assert params.stop_token_ids == (1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.5
    assert params == SamplingParams(stop_token_ids=(1, 2)) and hash(params) == hash(
        SamplingParams(stop_token_ids=[1, 2])
    )
