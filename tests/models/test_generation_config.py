"""generation_config.json: which ids end a sequence, and how requests without parameters are sampled."""

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import VOCAB_SIZE, Reference, random_prompts, set_eos

from nanovllm import LLM, AsyncLLM, SamplingParams

END = 256  # the byte tokenizer's own EOS
PROMPTS = random_prompts([5, 20, 3], seed=9)
FREE = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


@pytest.fixture
def model_dir(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    shutil.copytree(checkpoint("plain"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text_dir(text_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(text_model, tmp_path / "text")
    return tmp_path / "text"


def save(path: Path, **content: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "generation_config.json").write_text(json.dumps(content))
    return path


def one(llm: LLM, params: SamplingParams, prompt: list[int] = PROMPTS[0]) -> tuple[list[int], str | None, Any]:
    completion = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    return completion.token_ids, completion.finish_reason, completion.stop_reason


class TestEndOfSequence:
    def test_tokenizers_own_id_ends_it_without_a_stop_reason(
        self, text_dir: Path, make_llm: Callable[..., LLM]
    ) -> None:
        set_eos(text_dir, [3, 4])  # the tokenizer's is not among them
        llm = make_llm(text_dir, skip_tokenizer_init=False)
        params = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={END: 100.0})
        assert one(llm, params) == ([END], "stop", None)
        assert one(llm, SamplingParams(temperature=0.0, max_tokens=4, logit_bias={4: 100.0})) == ([4], "stop", 4)
        named = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={END: 100.0}, stop_token_ids=[END])
        assert one(llm, named) == ([END], "stop", None)

    def test_without_a_tokenizer_every_id_is_its_own_stop_reason(
        self, text_dir: Path, make_llm: Callable[..., LLM]
    ) -> None:
        set_eos(text_dir, [3, END])
        llm = make_llm(text_dir)
        for i in (3, END):
            assert one(llm, SamplingParams(temperature=0.0, max_tokens=4, logit_bias={i: 100.0})) == ([i], "stop", i)

    def test_ignored_ids_end_nothing_but_are_held_back_by_min_tokens(
        self, text_dir: Path, make_llm: Callable[..., LLM]
    ) -> None:
        set_eos(text_dir, [3])
        llm = make_llm(text_dir, skip_tokenizer_init=False)
        for i in (3, END):
            wanted = {"temperature": 0.0, "max_tokens": 6, "logit_bias": {i: 100.0}}
            assert one(llm, SamplingParams(**wanted, ignore_eos=True)) == ([i] * 6, "length", None)
            named = SamplingParams(**wanted, ignore_eos=True, stop_token_ids=[i])
            assert one(llm, named) == ([i], "stop", i)
            for ignore_eos in (True, False):
                tokens, reason, _ = one(llm, SamplingParams(**wanted, ignore_eos=ignore_eos, min_tokens=3))
                assert i not in tokens[:3] and tokens[3] == i
                assert (len(tokens), reason) == ((6, "length") if ignore_eos else (4, "stop"))

    @pytest.mark.parametrize("eos", [VOCAB_SIZE, -1, 2**40, [VOCAB_SIZE + 9, -5], []], ids=str)
    def test_ids_outside_the_vocabulary_end_nothing_and_harm_nobody(
        self, eos: Any, model_dir: Path, make_llm: Callable[..., LLM], caplog: pytest.LogCaptureFixture
    ) -> None:
        set_eos(model_dir, eos)
        llm = make_llm(model_dir)
        params = [SamplingParams(temperature=0.0, max_tokens=20, min_tokens=n) for n in (0, 5, 20)]
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert [o["token_ids"] for o in outputs] == [Reference(model_dir).greedy(p, 20, eos) for p in PROMPTS]
        assert ("is not in the vocabulary" in caplog.text) == (eos != [])

    def test_tokenizers_id_outside_the_vocabulary_is_never_drawn(
        self, checkpoint: Callable[..., Path], text_model: Path, make_llm: Callable[..., LLM]
    ) -> None:
        llm = make_llm(checkpoint("plain"), skip_tokenizer_init=False, tokenizer=str(text_model))
        params = SamplingParams(temperature=0.0, max_tokens=20, min_tokens=5)
        assert one(llm, params)[0] == Reference(checkpoint("plain")).greedy(PROMPTS[0], 20)

    def test_ids_of_config_json_count_without_the_file(self, model_dir: Path, make_llm: Callable[..., LLM]) -> None:
        plain = Reference(model_dir).greedy(PROMPTS[0], 20)
        config = json.loads((model_dir / "config.json").read_text())
        (model_dir / "config.json").write_text(json.dumps({**config, "eos_token_id": plain[3]}))
        assert one(make_llm(model_dir), GREEDY)[0] == plain[: plain.index(plain[3]) + 1]
        save(model_dir)
        assert one(make_llm(model_dir), GREEDY)[0] == plain

    @pytest.mark.parametrize("eos", ["3", [[3]], 3.0, True, [3, "4"], [None], {"a": 1}], ids=str)
    def test_what_is_no_id_is_refused_by_file_and_key(
        self, eos: Any, model_dir: Path, make_llm: Callable[..., LLM]
    ) -> None:
        set_eos(model_dir, eos)
        with pytest.raises(ValueError, match=rf"generation_config\.json: eos_token_id={re.escape(repr(eos))} must be"):
            make_llm(model_dir)


QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [3], "pad_token_id": 0}
QWEN3_PARAMS = SamplingParams(temperature=0.6, top_k=20, top_p=0.95)


class TestDefaultSampling:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (QWEN3, QWEN3_PARAMS),
            ({}, SamplingParams()),
            ({"do_sample": False, "temperature": 0.6}, SamplingParams(temperature=0.6)),  # vLLM does not read do_sample
            ({"temperature": None, "top_k": 0, "min_p": 0.1}, SamplingParams(min_p=0.1)),
            (
                {"max_new_tokens": 3, "repetition_penalty": 1.3, "num_beams": 4},
                SamplingParams(max_tokens=3, repetition_penalty=1.3),
            ),
            (
                {"presence_penalty": 1.5, "frequency_penalty": 0.5, "skip_special_tokens": False},
                SamplingParams(presence_penalty=1.5, frequency_penalty=0.5, skip_special_tokens=False),
            ),
        ],
        ids=str,
    )
    def test_is_that_of_the_file(
        self, content: dict[str, Any], expected: SamplingParams, model_dir: Path, make_llm: Callable[..., LLM]
    ) -> None:
        assert make_llm(save(model_dir, **content)).get_default_sampling_params() == expected

    def test_is_the_engines_own_without_a_file(self, model_dir: Path, make_llm: Callable[..., LLM]) -> None:
        assert make_llm(model_dir).get_default_sampling_params() == SamplingParams()

    def test_is_a_fresh_object_each_time(self, model_dir: Path, make_llm: Callable[..., LLM]) -> None:
        llm = make_llm(save(model_dir, **QWEN3))
        assert llm.get_default_sampling_params() is not llm.get_default_sampling_params()

    def test_holds_for_every_way_to_ask_without_parameters(self, text_dir: Path, make_llm: Callable[..., LLM]) -> None:
        """With a seed for the engine, so that the same calls draw the same tokens."""
        save(text_dir, **QWEN3, max_new_tokens=12)
        chat = [{"role": "user", "content": "Hi"}]
        template = "{% for m in messages %}{{ m.content }}{% endfor %}"

        def ask(params: SamplingParams | None) -> list[list[int]]:
            llm = make_llm(text_dir, skip_tokenizer_init=False, seed=5)
            outputs = [
                *llm.generate(PROMPTS, params, use_tqdm=False),
                *llm.chat(chat, params, use_tqdm=False, chat_template=template),
                list(llm.stream(PROMPTS[0], params))[-1],
            ]
            return [output["token_ids"] for output in outputs]

        async def ask_async(params: SamplingParams | None) -> list[list[int]]:
            options = {"device": "cpu", "dtype": "float32", "num_kvcache_blocks": 32, "seed": 5}
            async with AsyncLLM(str(text_dir), **options) as llm:
                assert llm.get_default_sampling_params() == expected
                calls = (llm.generate(PROMPTS[0], params), llm.chat(chat, params, chat_template=template))
                return [[output async for output in call][-1]["token_ids"] for call in calls]

        expected = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, max_tokens=12)
        assert ask(None) == ask(expected) != ask(SamplingParams(max_tokens=12))
        assert asyncio.run(ask_async(None)) == asyncio.run(ask_async(expected))

    def test_leaves_parameters_that_are_given_alone(self, model_dir: Path, make_llm: Callable[..., LLM]) -> None:
        llm = make_llm(save(model_dir, temperature=0.0, max_new_tokens=3), seed=5)
        plain = make_llm(model_dir, generation_config="vllm", seed=5)
        assert one(llm, SamplingParams()) == one(plain, SamplingParams())
        assert one(llm, None)[0] == Reference(model_dir).greedy(PROMPTS[0], 3)

    def test_option_vllm_passes_over_all_but_the_ids(self, model_dir: Path, make_llm: Callable[..., LLM]) -> None:
        llm = make_llm(save(model_dir, **QWEN3), generation_config="vllm")
        assert llm.get_default_sampling_params() == SamplingParams()
        assert llm.engine.eos_token_ids == {3}

    def test_option_may_name_another_directory(
        self, model_dir: Path, make_llm: Callable[..., LLM], tmp_path: Path
    ) -> None:
        save(model_dir, **QWEN3)
        other = save(tmp_path / "other", temperature=0.3, eos_token_id=7)
        llm = make_llm(model_dir, generation_config=str(other))
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.3)
        assert llm.engine.eos_token_ids == {7}
        with pytest.raises(FileNotFoundError, match="generation_config=.*nowhere.* must be 'auto', 'vllm'"):
            make_llm(model_dir, generation_config=str(tmp_path / "nowhere"))

    def test_override_goes_before_the_file(self, model_dir: Path, make_llm: Callable[..., LLM]) -> None:
        save(model_dir, **QWEN3)
        override = {"temperature": 0.2, "max_new_tokens": 9}
        llm = make_llm(model_dir, override_generation_config=override)
        expected = SamplingParams(temperature=0.2, top_k=20, top_p=0.95, max_tokens=9)
        assert llm.get_default_sampling_params() == expected
        llm = make_llm(model_dir, override_generation_config=override, generation_config="vllm")
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.2, max_tokens=9)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("temperature", "0.6"), ("temperature", -1), ("top_k", 20.0), ("top_p", 2.0), ("max_new_tokens", 0)],
    )
    def test_bad_value_is_refused_by_file_and_key(
        self, key: str, value: Any, model_dir: Path, make_llm: Callable[..., LLM]
    ) -> None:
        save(model_dir, **{key: value})
        with pytest.raises(ValueError, match=rf"generation_config\.json: {key}: .*={value!r} must be"):
            make_llm(model_dir)
        make_llm(model_dir, generation_config="vllm")
        with pytest.raises(ValueError, match=f"override_generation_config: {key}: .*={value!r} must be"):
            make_llm(model_dir, generation_config="vllm", override_generation_config={key: value})

    def test_override_of_what_is_no_sampling_is_refused(self, model_dir: Path, make_llm: Callable[..., LLM]) -> None:
        with pytest.raises(ValueError, match="override_generation_config has 'eos_token_id': its keys are temperature"):
            make_llm(model_dir, override_generation_config={"eos_token_id": 3})
