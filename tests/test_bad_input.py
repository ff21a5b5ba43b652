"""Whatever cannot run is refused with the cause, by the type of error that says whose fault it is, and no harm done."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import VOCAB_SIZE, Reference, random_prompts

from nanovllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
PROMPT = random_prompts([20], seed=9)[0]
MAX_MODEL_LEN = 100


@pytest.fixture(scope="module")
def shared(checkpoint: Callable[..., Path]) -> Iterator[tuple[LLM, list[int]]]:
    """One engine for the whole file, whatever the tests do to it, and its answer to PROMPT."""
    path = checkpoint("plain")
    llm = LLM(
        str(path),
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        kvcache_block_size=16,
        num_kvcache_blocks=20,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=8,
    )
    yield llm, Reference(path).greedy(PROMPT, 8)
    llm.close()


@pytest.fixture
def llm(shared: tuple[LLM, list[int]]) -> Iterator[LLM]:
    """The shared engine, which must serve correctly after each test, with nothing left behind."""
    llm, expected = shared
    yield llm
    stats = llm.stats()
    assert (stats.cache_usage, stats.num_running, stats.num_waiting) == (0.0, 0, 0)
    assert not llm.engine.has_unfinished_requests
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"] == expected
    assert llm.stats().cache_usage == 0.0


BAD_PROMPTS: dict[str, tuple[Any, type[Exception], str]] = {
    "no tokens": ([], ValueError, "is empty: it must have at least one token"),
    "no tokens in a dict": ({"prompt_token_ids": []}, ValueError, "is empty"),
    "negative id": ([5, -1], ValueError, rf"token id -1: ids must be in \[0, {VOCAB_SIZE}\)"),
    "id of the vocabulary's size": ([VOCAB_SIZE], ValueError, f"token id {VOCAB_SIZE}: ids must be in"),
    "huge id": ([2**70], ValueError, "token id 1180591620717411303424: ids must be in"),
    "as long as the model": ([1] * MAX_MODEL_LEN, ValueError, f"has 100 tokens.*max_model_len={MAX_MODEL_LEN}"),
    "longer than the model": ([1] * 5000, ValueError, f"has 5000 tokens.*max_model_len={MAX_MODEL_LEN}"),
    "None": (None, TypeError, "None must be a string or a list of token ids"),
    "ids that are not whole": ([1, 2.0], TypeError, "must be a string or a list of token ids"),
    "ids that are truths": ([True, False], TypeError, "must be a string or a list of token ids"),
    "ids that are words": ([1, "2"], TypeError, "must be a string or a list of token ids"),
    "a number": (3.5, TypeError, "3.5 must be a string or a list of token ids"),
    "bytes": (b"abc", TypeError, "must be a string or a list of token ids"),
    "dict with an unknown key": ({"text": "a"}, ValueError, "'prompt' or 'prompt_token_ids'"),
    "dict with one key too many": ({"prompt_token_ids": [1], "n": 2}, ValueError, "'prompt' or 'prompt_token_ids'"),
    "empty dict": ({}, ValueError, "'prompt' or 'prompt_token_ids'"),
    "dict of text for ids": ({"prompt_token_ids": "abc"}, TypeError, "must be a string or a list of token ids"),
    "dict of ids for text": ({"prompt": [1, 2]}, TypeError, r"\['prompt'\]=\[1, 2\] must be a string"),
    "dict of a number beside ids": ({"prompt": 3, "prompt_token_ids": [1]}, TypeError, r"=3 must be a string"),
    "dict of None": ({"prompt_token_ids": None}, TypeError, "must be a string or a list of token ids"),
    "ids that are arrays": ([np.array([1, 2])], TypeError, "must be a string or a list of token ids"),
    "ids that are numpy's truths": ([1, np.True_], TypeError, "must be a string or a list of token ids"),
    "an array": (np.array([1, 2]), TypeError, "must be a string or a list of token ids"),
    "a negative id of numpy's": ((5, np.int32(-1)), ValueError, r"token id -1: ids must be in"),
    "an image": ({"prompt_token_ids": [1], "multi_modal_data": {"image": 3}}, ValueError, "multi_modal_data'.=.* None"),
    "a salt": ({"prompt_token_ids": [1], "cache_salt": "a"}, ValueError, r"\['cache_salt'\]='a' must be None"),
    "an array of embeddings": ({"prompt_embeds": np.ones(2)}, ValueError, r"\['prompt_embeds'\]=.* must be None"),
    "nothing at all": (
        {"prompt": None, "multi_modal_data": None},
        TypeError,
        "must be a string or a list of token ids",
    ),
    "text without a tokenizer": ("Hello", ValueError, "skip_tokenizer_init=True.*give token ids"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompt_among_good_ones_is_refused_by_its_number(llm: LLM, name: str) -> None:
    prompt, error, cause = BAD_PROMPTS[name]
    steps = llm.stats().num_steps
    with pytest.raises(error, match=cause) as raised:
        llm.generate([PROMPT, [1, 2, 3], prompt, PROMPT], GREEDY, use_tqdm=False)
    if "without a tokenizer" not in name:
        assert "prompts[2]" in str(raised.value)
    assert llm.stats().num_steps == steps, "the good prompts ran"


@pytest.mark.parametrize("name", [name for name in BAD_PROMPTS if name != "no tokens"])
def test_bad_prompt_alone_is_refused(llm: LLM, name: str) -> None:
    prompt, _, _ = BAD_PROMPTS[name]
    with pytest.raises((TypeError, ValueError)):
        llm.generate(prompt, GREEDY, use_tqdm=False)


def test_empty_prompt_alone_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompts\[0\] is empty"):
        llm.generate([[]], GREEDY, use_tqdm=False)


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_prompts_and_sampling_params_of_the_wrong_type_are_named(llm: LLM) -> None:
    with pytest.raises(TypeError, match="prompts=None must be"):
        llm.generate(None, GREEDY, use_tqdm=False)
    with pytest.raises(TypeError, match="prompts=7 must be"):
        llm.generate(7, GREEDY, use_tqdm=False)
    with pytest.raises(TypeError, match="sampling_params='hot' must be"):
        llm.generate(PROMPT, "hot", use_tqdm=False)
    with pytest.raises(TypeError, match="sampling_params=.*must be"):
        llm.generate(PROMPT, {"temperature": 0.0}, use_tqdm=False)
    with pytest.raises(TypeError, match="sampling_params=.*must be"):
        llm.generate([PROMPT, PROMPT], [GREEDY, None], use_tqdm=False)


@pytest.mark.parametrize("ids", [5, None, 2.5, True, b"ab", ["its own", 5], [["0"]], object], ids=repr)
def test_ids_that_abort_does_not_take_are_named_and_nothing_is_aborted(llm: LLM, ids: Any) -> None:
    outputs = llm.stream(PROMPT, GREEDY)
    request_id = next(outputs).request_id
    ids = [request_id, 5] if ids == ["its own", 5] else ids
    with pytest.raises(TypeError, match=r"request_id=.* must be a string or a list of strings"):
        llm.abort(ids)
    llm.abort(i for i in ("unknown", "ids"))
    llm.abort([])
    assert list(outputs)[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("value", [None, 5, 2.5], ids=repr)
def test_weights_that_are_no_pairs_are_named(llm: LLM, value: Any) -> None:
    with pytest.raises(TypeError, match=f"named_tensors={value} must be pairs of a name and a tensor"):
        llm.load_weights(value)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_lists_of_different_lengths_are_refused(llm: LLM, count: int) -> None:
    with pytest.raises(ValueError, match=f"sampling_params has {count} entries for 2 prompts"):
        llm.generate([PROMPT, PROMPT], [GREEDY] * count, use_tqdm=False)


def test_unknown_keyword_is_refused(llm: LLM) -> None:
    with pytest.raises(
        TypeError, match="LLM.generate got an unexpected 'temperature'; it has prompts, sampling_params"
    ):
        llm.generate(PROMPT, temperature=0.0)
    with pytest.raises(TypeError, match="LLM.chat got an unexpected 'chat_templat'; did you mean 'chat_template'"):
        llm.chat([{"role": "user", "content": "Hello"}], chat_templat="")


def test_bad_sampling_params_never_reach_the_engine(llm: LLM) -> None:
    for values, cause in (
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": -5}, "max_tokens=-5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ):
        with pytest.raises(ValueError, match=cause):
            llm.generate(PROMPT, SamplingParams(**values), use_tqdm=False)


def test_stop_id_outside_the_vocabulary_is_refused(llm: LLM) -> None:
    params = SamplingParams(stop_token_ids=[VOCAB_SIZE])
    with pytest.raises(ValueError, match=f"stop_token_ids has {VOCAB_SIZE}: ids must be in"):
        llm.generate(PROMPT, params, use_tqdm=False)


def test_stop_ids_that_leave_no_token_to_draw_are_refused(llm: LLM) -> None:
    ids = list(range(VOCAB_SIZE))
    with pytest.raises(ValueError, match="min_tokens, which holds back stop ids, leave none of the vocabulary"):
        llm.generate(PROMPT, SamplingParams(stop_token_ids=ids, min_tokens=1), use_tqdm=False)
    (output,) = llm.generate(PROMPT, SamplingParams(stop_token_ids=ids), use_tqdm=False)
    assert len(output["token_ids"]) == 1


def test_parameters_that_were_assigned_are_checked_when_they_are_used(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8)
    params.temperature = -1.0
    for give in (lambda: llm.generate(PROMPT, params), lambda: llm.stream([PROMPT, PROMPT], [GREEDY, params])):
        with pytest.raises(ValueError, match="temperature=-1.0 must be"):
            give()


def test_more_logprobs_than_max_logprobs_are_refused(checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]):
    llm = make_llm(checkpoint("plain"), max_logprobs=5)
    for name in ("logprobs", "prompt_logprobs"):
        for value in (6, -1):
            with pytest.raises(ValueError, match=f"{name}={value} must be at most max_logprobs=5"):
                llm.generate(PROMPT, SamplingParams(**{name: value}), use_tqdm=False)
    (output,) = llm.generate(PROMPT, SamplingParams(logprobs=5, prompt_logprobs=5, max_tokens=1), use_tqdm=False)
    assert len(output.prompt_logprobs) == len(PROMPT)


@pytest.mark.parametrize("name", ["score", "embed", "encode", "classify", "reward", "beam_search"])
def test_methods_of_other_kinds_of_models_say_what_there_is_instead(llm: LLM, name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"LLM.{name}\(\) is not here: .*(pooling|n=)"):
        getattr(llm, name)(["a query"], ["a document"], use_tqdm=False)


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 2**31},
        {"top_k": 2**70},
        {"min_tokens": 2**40, "max_tokens": None},
        {"max_tokens": 2**40},
        {"temperature": 1e300},
        {"temperature": 1e-300},
        {"top_p": 1e-300},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_extreme_values_are_refused_or_served_but_never_fail_on_the_way(llm: LLM, values: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**{"max_tokens": 4, **values})
        outputs = llm.generate([PROMPT, PROMPT], [params, GREEDY], use_tqdm=False)
    except ValueError as error:
        assert next(iter(values)) in str(error)
        return
    assert all(0 <= i < VOCAB_SIZE for i in outputs[0]["token_ids"])
    assert outputs[1]["token_ids"] == llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"]


def test_max_tokens_beyond_the_models_length_ends_with_length(llm: LLM) -> None:
    for max_tokens in (10**6, None):
        output = llm.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=max_tokens), use_tqdm=False)[0]
        assert output["finish_reason"] == "length"
        assert len(PROMPT) + len(output["token_ids"]) == MAX_MODEL_LEN


def test_longest_prompt_gets_its_one_token(llm: LLM) -> None:
    prompt = random_prompts([MAX_MODEL_LEN - 1])[0]
    output = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=5), use_tqdm=False)[0]
    assert (len(output["token_ids"]), output["finish_reason"]) == (1, "length")


def test_prompt_that_never_fits_the_cache_is_refused_at_the_door(
    checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint("plain")
    llm = make_llm(path, num_kvcache_blocks=4)
    assert "max_model_len is cut from 320 to the 64 tokens of the cache" in caplog.text
    with pytest.raises(ValueError, match=r"prompts\[1\] has 64 tokens.*max_model_len=64"):
        llm.generate([PROMPT, [1] * 64], GREEDY, use_tqdm=False)
    longest = random_prompts([63])[0]
    assert llm.generate(longest, GREEDY, use_tqdm=False)[0]["token_ids"] == Reference(path).greedy(longest, 1)
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"] == Reference(path).greedy(PROMPT, 8)
    assert llm.stats().cache_usage == 0.0


@pytest.mark.parametrize(
    ("options", "error", "cause"),
    [
        ({"max_model_length": 10}, TypeError, "'max_model_length'; did you mean 'max_model_len'"),
        ({"kvcache_block_size": 0}, ValueError, "kvcache_block_size=0 must be at least 1"),
        ({"kvcache_block_size": 24}, ValueError, "kvcache_block_size=24 must be a multiple of 16"),
        ({"gpu_memory_utilization": 1.5}, ValueError, r"gpu_memory_utilization=1.5 must be a number in \(0, 1\]"),
        ({"max_model_len": 321}, ValueError, "max_model_len=321 must be at most the model's 320"),
        ({"num_kvcache_blocks": 4, "max_model_len": 65}, ValueError, "max_model_len=65 exceeds the KV cache.*64"),
        ({"kvcache_memory_bytes": 1, "num_kvcache_blocks": None}, ValueError, "no room for one block.*memory_bytes=1"),
        ({"tensor_parallel_size": 3}, ValueError, "num_attention_heads=4 cannot be cut into tensor_parallel_size=3"),
        ({"dtype": "int4"}, ValueError, "dtype='int4' must be one of auto, bfloat16"),
    ],
    ids=str,
)
def test_option_that_cannot_be_met_is_refused_by_name(
    checkpoint: Callable[..., Path],
    make_llm: Callable[..., LLM],
    options: dict[str, Any],
    error: type[Exception],
    cause: str,
) -> None:
    with pytest.raises(error, match=cause):
        make_llm(checkpoint("plain"), **options)


def test_cuda_asked_for_and_absent_is_refused(checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="device='cuda' but PyTorch sees no CUDA device"):
        make_llm(checkpoint("plain"), device="cuda")


def test_failed_construction_leaves_an_object_that_can_be_dropped() -> None:
    for model in (None, 5, b"model", ["model"]):
        with pytest.raises(TypeError, match="model=.* must be a string or a path: a directory or a hub id"):
            LLM(model)
    for options in ({"nonsense": 1}, {"dtype": "int4"}):
        with pytest.raises((TypeError, ValueError)):
            LLM("model", **options)
    for missing in ("/no/such/directory", Path("/no/such/directory")):
        with pytest.raises(OSError):
            LLM(missing)
