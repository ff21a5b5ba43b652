"""What asks for nothing is taken, and what asks for something that is not here is refused with the reason."""

from typing import Any

import pytest
from inside import tables_of_what_is_absent

from nanovllm import LLM, AsyncLLM, SamplingParams
from nanovllm.config import Config
from nanovllm.vllm_defaults import ANY, ARGUMENTS, ENGINE_OPTIONS, SAME_OPTIONS, SAMPLING_FIELDS, check_arguments


class Anything:
    """What nobody knows."""


def taken(nothing: tuple[Any, ...]) -> list[Any]:
    return [None, "", {}, [], *(nothing if nothing is not ANY else (3, True, "word", Anything()))]


def refused(nothing: tuple[Any, ...]) -> Any:
    """A value of the kind that the word has, which asks for something."""
    kinds = {type(v) for v in nothing}
    return 77 if kinds == {int} else True if nothing == (False,) else False if nothing == (True,) else "other"


@pytest.mark.parametrize("name", ENGINE_OPTIONS)
def test_option_that_asks_for_nothing_is_taken_and_another_refused_with_the_reason(name: str) -> None:
    plain = Config(model="m")
    nothing, why = ENGINE_OPTIONS[name]
    for value in taken(nothing):
        assert Config.from_options("m", {name: value}) == plain
    if nothing is not ANY:
        with pytest.raises(ValueError) as raised:
            Config.from_options("m", {name: refused(nothing)})
        assert str(raised.value).startswith(f"{name}=") and why in str(raised.value)


@pytest.mark.parametrize("name", SAMPLING_FIELDS)
def test_field_that_asks_for_nothing_is_taken_and_another_refused_with_the_reason(name: str) -> None:
    nothing, why = SAMPLING_FIELDS[name]
    for value in taken(nothing):
        params = SamplingParams(**{name: value})
        assert params == SamplingParams() == params.clone()
    params = SamplingParams()
    assert not getattr(params, name), "it can be read"
    if nothing is not ANY:
        with pytest.raises(ValueError) as raised:
            SamplingParams(**{name: refused(nothing)})
        assert str(raised.value).startswith(f"{name}=") and why in str(raised.value)
        setattr(params, name, refused(nothing))
        with pytest.raises(ValueError, match=f"{name}="):
            params.clone()


@pytest.mark.parametrize("method", [LLM.generate, LLM.chat, AsyncLLM.generate, AsyncLLM.chat])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_argument_that_asks_for_nothing_is_taken_and_another_refused_with_the_reason(name: str, method: Any) -> None:
    nothing, why = ARGUMENTS[name]
    for value in [*taken(nothing), [None, None]]:
        check_arguments(method, {name: value})
    if nothing is not ANY:
        for value in (refused(nothing), [None, refused(nothing)]):
            with pytest.raises(ValueError) as raised:
                check_arguments(method, {name: value})
            assert str(raised.value).startswith(f"{name}=") and why in str(raised.value)


def test_a_program_that_passes_everything_can_start() -> None:
    """The options that vLLM 0.9's `LLM` has, at its defaults."""
    options = {
        "tokenizer": None,
        "tokenizer_mode": "auto",
        "skip_tokenizer_init": False,
        "trust_remote_code": False,
        "allowed_local_media_path": "",
        "tensor_parallel_size": 1,
        "dtype": "auto",
        "quantization": None,
        "revision": None,
        "tokenizer_revision": None,
        "seed": None,
        "gpu_memory_utilization": 0.9,
        "swap_space": 4,
        "cpu_offload_gb": 0,
        "enforce_eager": None,
        "max_seq_len_to_capture": 8192,
        "disable_custom_all_reduce": False,
        "disable_async_output_proc": False,
        "hf_token": None,
        "hf_overrides": None,
        "mm_processor_kwargs": None,
        "task": "auto",
        "override_pooler_config": None,
        "compilation_config": None,
    }
    assert Config.from_options("m", options) == Config(model="m")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization", "fp8"),
        ("enable_lora", True),
        ("enable_lora", 1),
        ("enable_chunked_prefill", False),
        ("pipeline_parallel_size", 2),
        ("pipeline_parallel_size", True),
        ("kv_cache_dtype", "fp8"),
        ("speculative_config", {"method": "ngram"}),
        ("runner", "pooling"),
        ("kv_transfer_config", object()),
    ],
)
def test_values_near_the_default_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* must be None"):
        Config.from_options("m", {name: value})


def test_what_we_have_is_in_no_table_of_what_is_absent() -> None:
    ours = {*Config.__dataclass_fields__, *SAME_OPTIONS}
    assert not ours & ENGINE_OPTIONS.keys()
    assert set(SAME_OPTIONS.values()) < ours
    assert not SamplingParams.__dataclass_fields__.keys() & SAMPLING_FIELDS.keys()


def test_a_word_stands_in_a_table_once() -> None:
    for reasons in tables_of_what_is_absent():
        words = [w for group in reasons.values() for several in group for w in several.split()]
        assert len(words) == len(set(words))


def test_a_typing_error_in_vllms_word_is_answered_with_it() -> None:
    with pytest.raises(TypeError, match="'quantisation'; did you mean 'quantization'"):
        Config.from_options("m", {"quantisation": None})
    with pytest.raises(TypeError, match="'structured_output'; did you mean 'structured_outputs'"):
        SamplingParams(structured_output=None)
    with pytest.raises(TypeError, match="LLM.generate got an unexpected 'lora_requests'; did you mean 'lora_request'"):
        check_arguments(LLM.generate, {"lora_requests": None})
