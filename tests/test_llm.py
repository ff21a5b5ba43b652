"""What a user of `LLM` may rely on, beyond which tokens come out."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import SHAPES, Reference, random_prompts, save_byte_tokenizer, save_checkpoint
from inside import text_engine_of

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.outputs import CompletionOutput, RequestOutput

PROMPTS = random_prompts([5, 33, 1, 17, 8, 20], seed=5)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
LISTS_OF_TOKENS = list[list[int]]


@pytest.fixture
def llm(checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> LLM:
    return make_llm(checkpoint("plain"))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer of bytes."""
    path = save_checkpoint(tmp_path_factory.mktemp("text"), {**SHAPES["plain"], "vocab_size": 257})
    save_byte_tokenizer(path)
    return path


def tokens(llm: LLM, prompts: Any, params: Any = GREEDY) -> LISTS_OF_TOKENS:
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def is_idle(llm: LLM) -> bool:
    stats = llm.stats()
    return (stats.cache_usage, stats.num_running, stats.num_waiting) == (0.0, 0, 0) and (
        not llm.engine.has_unfinished_requests
    )


class TestOutputs:
    def test_come_in_the_order_of_the_prompts(self, llm: LLM) -> None:
        params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (9, 2, 7, 1, 30, 3)]
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert [o.prompt_token_ids for o in outputs] == PROMPTS
        assert [len(o["token_ids"]) for o in outputs] == [9, 2, 7, 1, 30, 3]
        assert [o["token_ids"] for o in outputs] == [tokens(llm, p, q)[0] for p, q in zip(PROMPTS, params, strict=True)]

    def test_more_prompts_than_rows_come_in_order_too(
        self, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], llm: LLM
    ) -> None:
        few = make_llm(checkpoint("plain"), max_num_seqs=2)
        assert tokens(few, PROMPTS) == tokens(llm, PROMPTS)
        assert few.stats().num_steps > llm.stats().num_steps

    @pytest.mark.parametrize("max_behind", [0, 1])
    def test_are_the_same_when_the_device_begins_before_the_last_prompt_is_a_request(
        self, max_behind: int, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], monkeypatch: Any
    ) -> None:
        """As on a GPU. Some are finished by then, a stream is open beside them, and a bad prompt is refused as ever."""
        prompts = random_prompts([7, 40, 3, 25, 9, 31, 12, 2, 28, 17], seed=8)
        params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (1, 5, 2, 9, 1, 3, 12, 4, 1, 6)]
        llm = make_llm(checkpoint("plain"), max_behind, max_num_batched_tokens=32)
        expected = tokens(llm, prompts, params)
        llm.reset_prefix_cache()
        monkeypatch.setattr(llm.engine, "has_idle_device", lambda: True)
        made, steps = [], []
        text_engine = text_engine_of(llm)
        make, step = text_engine.make_request, text_engine.step
        monkeypatch.setattr(text_engine, "make_request", lambda *a, **k: made.append(1) or make(*a, **k))
        monkeypatch.setattr(text_engine, "step", lambda: steps.append(len(made)) or step())
        stream = llm.stream([prompts[1]], params[1])
        next(stream)
        assert tokens(llm, prompts, params) == expected
        assert any(1 < num_made < 11 for num_made in steps), "no step before all were made"
        assert [output["token_ids"] for output in stream][-1] == expected[1]
        with pytest.raises(ValueError, match=r"prompts\[9\] is empty"):
            tokens(llm, [*prompts[:9], []], params)
        assert is_idle(llm)

    def test_are_vllms_object_and_upstreams_dict(self, llm: LLM) -> None:
        output = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]
        assert isinstance(output, RequestOutput) and isinstance(output.outputs[0], CompletionOutput)
        assert output["token_ids"] is output.outputs[0].token_ids
        assert output["text"] == output.outputs[0].text == ""  # no tokenizer
        assert output["finish_reason"] == output.outputs[0].finish_reason == "length"
        assert output.finished and output.outputs[0].index == 0 and output.prompt is None
        with pytest.raises(KeyError, match="'texts'.*'text', 'token_ids' and 'finish_reason'"):
            output["texts"]

    def test_have_ids_of_their_own(self, llm: LLM) -> None:
        ids = [o.request_id for _ in range(2) for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
        assert len(set(ids)) == len(ids)

    def test_one_prompt_or_a_list_in_any_form(self, llm: LLM) -> None:
        one = tokens(llm, [PROMPTS[1]])
        assert tokens(llm, PROMPTS[1]) == one
        assert tokens(llm, {"prompt_token_ids": PROMPTS[1]}) == one
        assert tokens(llm, [{"prompt_token_ids": PROMPTS[1]}, PROMPTS[1]]) == one * 2
        assert tokens(llm, (PROMPTS[1], PROMPTS[1])) == one * 2
        assert tokens(llm, tuple(PROMPTS[1])) == tokens(llm, [tuple(PROMPTS[1])]) == one

    def test_ids_may_be_numpys_and_keys_that_ask_for_nothing_may_be_there(self, llm: LLM) -> None:
        one = tokens(llm, [PROMPTS[1]])
        for ids in (list(np.array(PROMPTS[1])), tuple(np.array(PROMPTS[1], dtype=np.uint8))):
            (output,) = llm.generate(ids, GREEDY, use_tqdm=False)
            assert [output["token_ids"]] == one == tokens(llm, [ids])
            assert output.prompt_token_ids == PROMPTS[1] and set(map(type, output.prompt_token_ids)) == {int}
        nothing = {"multi_modal_data": None, "mm_processor_kwargs": {}, "cache_salt": None, "prompt": None}
        assert tokens(llm, {"prompt_token_ids": PROMPTS[1], **nothing}) == one

    def test_one_sampling_params_or_one_each(self, llm: LLM) -> None:
        assert tokens(llm, PROMPTS, [GREEDY] * len(PROMPTS)) == tokens(llm, PROMPTS, GREEDY)
        assert tokens(llm, PROMPTS, (GREEDY,) * len(PROMPTS)) == tokens(llm, PROMPTS, GREEDY)
        assert len(llm.generate(PROMPTS[0], use_tqdm=False)[0]["token_ids"]) == 16  # the default

    def test_do_not_alias_the_prompt(self, llm: LLM) -> None:
        prompt = list(PROMPTS[0])
        output = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
        assert prompt == PROMPTS[0]
        prompt.append(0)
        assert output.prompt_token_ids == PROMPTS[0]

    def test_say_how_much_of_the_prompt_was_cached(self, llm: LLM) -> None:
        cached = [
            [o.num_cached_tokens for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)],
            [o.num_cached_tokens for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)],
        ]
        assert cached == [[0] * 6, [0, 32, 0, 16, 0, 16]]
        llm.reset_prefix_cache()
        assert [o.num_cached_tokens for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == [0] * 6


class TestText:
    def test_prompts_and_answers_go_through_the_tokenizer(self, text_model: Path, make_llm: Callable[..., LLM]) -> None:
        llm = make_llm(text_model, skip_tokenizer_init=False)
        outputs = llm.generate(["Hello, Nano-vLLM.", {"prompt": "été"}], GREEDY, use_tqdm=False)
        assert [o.prompt for o in outputs] == ["Hello, Nano-vLLM.", "été"]
        tokenizer = llm.get_tokenizer()
        assert outputs[1].prompt_token_ids == tokenizer.encode("été")
        for output in outputs:
            assert output["token_ids"] == Reference(text_model).greedy(output.prompt_token_ids, 8)
            assert output["text"] == tokenizer.decode(output["token_ids"], skip_special_tokens=True)
        assert llm.generate("Hello, Nano-vLLM.", GREEDY, use_tqdm=False)[0]["text"] == outputs[0]["text"]

    def test_empty_text_is_refused(self, text_model: Path, make_llm: Callable[..., LLM]) -> None:
        llm = make_llm(text_model, skip_tokenizer_init=False)
        for prompts in ("", ["Hello", ""], [{"prompt": ""}]):
            with pytest.raises(ValueError, match="is empty: it must have at least one token"):
                llm.generate(prompts, GREEDY, use_tqdm=False)
        with pytest.raises(TypeError, match=r"prompts\[1\]=None must be"):
            llm.generate(["Hello", None], GREEDY, use_tqdm=False)
        assert is_idle(llm)

    def test_tokenizer_of_another_directory(
        self, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], tmp_path: Path, text_model: Path
    ) -> None:
        save_byte_tokenizer(tmp_path)
        llm = make_llm(text_model, skip_tokenizer_init=False, tokenizer=str(tmp_path))
        assert llm.generate("ab", GREEDY, use_tqdm=False)[0].prompt_token_ids == llm.get_tokenizer().encode("ab")

    def test_without_a_tokenizer_there_is_none_to_get(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match="skip_tokenizer_init=True"):
            llm.get_tokenizer()


class TestStopping:
    def test_stop_token_ids_end_the_request_and_are_named(self, llm: LLM) -> None:
        plain = tokens(llm, PROMPTS, SamplingParams(temperature=0.0, max_tokens=20))
        stop_id = plain[0][5]
        params = SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=[stop_id])
        for output, free in zip(llm.generate(PROMPTS, params, use_tqdm=False), plain, strict=True):
            end = free.index(stop_id) + 1 if stop_id in free else 20
            assert output["token_ids"] == free[:end]
            assert output["finish_reason"] == ("stop" if stop_id in free else "length")
            assert output.outputs[0].stop_reason == (stop_id if stop_id in free else None)

    def test_stop_on_the_last_token_is_a_stop(self, llm: LLM) -> None:
        plain = tokens(llm, PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=20))[0]
        first = plain.index(plain[4])
        params = SamplingParams(temperature=0.0, max_tokens=first + 1, stop_token_ids=[plain[4]])
        assert llm.generate(PROMPTS[1], params, use_tqdm=False)[0]["finish_reason"] == "stop"

    def test_ignore_eos_goes_on_but_not_past_stop_token_ids(
        self, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], llm: LLM
    ) -> None:
        plain = tokens(llm, PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=20))[0]
        llm.engine.eos_token_ids = frozenset({plain[3]})
        end = plain.index(plain[3]) + 1
        assert tokens(llm, PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=20))[0] == plain[:end]
        ignoring = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        assert tokens(llm, PROMPTS[1], ignoring)[0] == plain
        both = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=[plain[3]])
        assert tokens(llm, PROMPTS[1], both)[0] == plain[:end]

    @pytest.mark.parametrize("max_behind", [0, 1])
    def test_min_tokens_holds_back_eos_and_stop_token_ids(self, llm: LLM, max_behind: int) -> None:
        llm.engine.max_behind = max_behind
        plain = tokens(llm, PROMPTS, SamplingParams(temperature=0.0, max_tokens=20))
        eos, stop_id = plain[1][2], plain[3][3]
        llm.engine.eos_token_ids = frozenset({eos})
        params = SamplingParams(temperature=0.0, max_tokens=20, min_tokens=7, stop_token_ids=[stop_id])
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        for output, free in zip(outputs, plain, strict=True):
            assert not {eos, stop_id} & set(output["token_ids"][:7])
            assert len(output["token_ids"]) >= 7
            if not {eos, stop_id} & set(free[:7]):
                assert output["token_ids"][:7] == free[:7], "nothing was held back, yet the tokens differ"
        assert {eos, stop_id} & set(plain[1][:7] + plain[3][:7])

    def test_min_tokens_equal_to_max_tokens_gives_exactly_as_many(self, llm: LLM) -> None:
        llm.engine.eos_token_ids = frozenset(range(64))
        params = SamplingParams(temperature=1.5, max_tokens=9, min_tokens=9, seed=1)
        for output in llm.generate(PROMPTS, params, use_tqdm=False):
            assert len(output["token_ids"]) == 9 and min(output["token_ids"]) >= 64

    def test_max_tokens_none_runs_to_the_models_length(
        self, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        llm = make_llm(checkpoint("plain"), max_model_len=60)
        for output in llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=None), use_tqdm=False):
            assert len(output.prompt_token_ids) + len(output["token_ids"]) == 60
            assert output["finish_reason"] == "length"


class TestSampling:
    def seeded(self, **values: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 1.0, "max_tokens": 20, "seed": 42, **values})

    def test_equal_seeds_draw_equal_tokens_whoever_shares_the_batch(
        self, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], llm: LLM
    ) -> None:
        alone = tokens(llm, PROMPTS[1], self.seeded())[0]
        assert tokens(llm, PROMPTS[1], self.seeded())[0] == alone
        params = [self.seeded(seed=i, temperature=0.5 * i) for i in range(len(PROMPTS))]
        params[4] = self.seeded()
        for company in (llm, make_llm(checkpoint("plain"), 1, num_kvcache_blocks=12, max_num_batched_tokens=33)):
            prompts = [*PROMPTS[:4], PROMPTS[1], PROMPTS[5]]
            assert tokens(company, prompts, params)[4] == alone

    def test_seeded_tokens_survive_preemption(
        self, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM], llm: LLM
    ) -> None:
        params = [self.seeded(seed=i, max_tokens=60) for i in range(len(PROMPTS))]
        crowded = make_llm(checkpoint("plain"), 1, num_kvcache_blocks=10)
        assert tokens(crowded, PROMPTS, params) == tokens(llm, PROMPTS, params)
        assert crowded.stats().num_preemptions >= 3

    def test_seeds_reach_over_64_bits_and_signs(self, llm: LLM) -> None:
        seeds = [0, 1, -1, 2**32, -(2**63), 2**63 - 1, 1 << 40]
        answers = [tuple(tokens(llm, PROMPTS[1], self.seeded(seed=seed))[0]) for seed in seeds]
        assert len(set(answers)) == len(seeds)

    def test_without_seeds_answers_differ(self, llm: LLM) -> None:
        answers = tokens(llm, [PROMPTS[1]] * 4 + [PROMPTS[1]] * 4, self.seeded(seed=None))
        assert len({tuple(answer) for answer in answers}) == 8
        assert tokens(llm, [PROMPTS[1]], self.seeded(seed=None))[0] not in answers

    def test_engines_of_one_seed_repeat_each_other_and_others_do_not(
        self, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        answers = []
        for seed in (7, 7, 8, None, None):
            llm = make_llm(checkpoint("plain"), seed=seed)
            answers.append(tokens(llm, PROMPTS, self.seeded(seed=None)) + tokens(llm, PROMPTS, self.seeded(seed=None)))
        assert answers[0] == answers[1]
        assert all(a != b for i, a in enumerate(answers[1:]) for b in answers[i + 2 :])

    def test_prompts_of_one_call_do_not_share_their_draws(self, llm: LLM) -> None:
        answers = tokens(llm, [PROMPTS[1], PROMPTS[1]], [self.seeded(seed=1), self.seeded(seed=2)])
        assert answers[0] != answers[1]

    @pytest.mark.parametrize("values", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 0.0}], ids=str)
    def test_narrowest_sampling_is_greedy(self, llm: LLM, values: dict[str, Any]) -> None:
        greedy = tokens(llm, PROMPTS, SamplingParams(temperature=0.0, max_tokens=20))
        assert tokens(llm, PROMPTS, self.seeded(**values)) == greedy

    def test_each_request_of_a_batch_has_its_own_parameters(self, llm: LLM) -> None:
        params = [
            self.seeded(temperature=0.0),
            self.seeded(temperature=2.0),
            self.seeded(top_k=3),
            self.seeded(top_p=0.5),
            self.seeded(min_p=0.2),
            self.seeded(min_tokens=5, stop_token_ids=[1, 2, 3]),
        ]
        alone = [tokens(llm, prompt, q)[0] for prompt, q in zip(PROMPTS, params, strict=True)]
        assert tokens(llm, PROMPTS, params) == alone

    def test_top_k_draws_only_the_k_likeliest(self, llm: LLM, checkpoint: Callable[..., Path]) -> None:
        logits = Reference(checkpoint("plain")).logits(PROMPTS[1])[-1]
        allowed = set(logits.topk(3).indices.tolist())
        params = [SamplingParams(temperature=3.0, top_k=3, max_tokens=1, seed=i) for i in range(60)]
        assert {answer[0] for answer in tokens(llm, [PROMPTS[1]] * 60, params)} == allowed


class TestLife:
    def test_context_manager_closes_and_close_is_idempotent(self, checkpoint: Callable[..., Path]) -> None:
        with small_llm(checkpoint("plain")) as llm:
            assert len(tokens(llm, PROMPTS)) == len(PROMPTS)
        llm.close()
        llm.close()
        with pytest.raises(RuntimeError, match="closed"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        with pytest.raises(RuntimeError, match="closed"):
            llm.stats()

    def test_context_manager_closes_on_an_error(self, checkpoint: Callable[..., Path]) -> None:
        with pytest.raises(KeyError), small_llm(checkpoint("plain")) as llm:
            raise KeyError("mine")
        with pytest.raises(RuntimeError, match="closed"):
            llm.generate(PROMPTS)

    def test_closing_gives_the_model_and_the_cache_back(self, checkpoint: Callable[..., Path]) -> None:
        llm = small_llm(checkpoint("plain"))
        parts = held_memory(llm)
        tokens(llm, PROMPTS)
        llm.close()
        assert [part() for part in parts] == [None] * len(parts)

    def test_dropping_the_last_reference_gives_it_back_too(self, checkpoint: Callable[..., Path]) -> None:
        llm = small_llm(checkpoint("plain"))
        parts = held_memory(llm)
        tokens(llm, PROMPTS)
        gc.disable()  # not by the grace of the collector's next run
        try:
            del llm
            assert [part() for part in parts] == [None] * len(parts)
        finally:
            gc.enable()

    def test_outputs_outlive_the_engine(self, checkpoint: Callable[..., Path]) -> None:
        llm = small_llm(checkpoint("plain"))
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        parts = held_memory(llm)
        llm.close()
        assert [part() for part in parts] == [None] * len(parts)
        assert all(len(output["token_ids"]) == 8 for output in outputs)

    def test_two_engines_live_side_by_side(self, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> None:
        first, second = make_llm(checkpoint("plain")), make_llm(checkpoint("gqa3-dim48"))
        expected = {
            name: [Reference(checkpoint(name)).greedy(p, 8) for p in PROMPTS] for name in ("plain", "gqa3-dim48")
        }
        for _ in range(2):
            assert tokens(first, PROMPTS) == expected["plain"]
            assert tokens(second, PROMPTS) == expected["gqa3-dim48"]
        first.close()
        assert tokens(second, PROMPTS) == expected["gqa3-dim48"]

    def test_steps_of_two_engines_may_alternate(
        self, checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]
    ) -> None:
        engines = [make_llm(checkpoint("plain"), 1).engine for _ in range(2)]
        seqs = [engine.make_sequence(p, GREEDY) for engine in engines for p in PROMPTS]
        for i, seq in enumerate(seqs):
            engines[i // len(PROMPTS)].add(seq)
        while any(engine.has_unfinished_requests for engine in engines):
            for engine in engines:
                if engine.has_unfinished_requests:
                    engine.step()
        expected = [Reference(checkpoint("plain")).greedy(p, 8) for p in PROMPTS]
        assert [seq.output_token_ids for seq in seqs] == expected * 2


class Interrupt:
    """Replaces a method, and raises at its n-th call."""

    def __init__(self, owner: Any, name: str, at: int, error: BaseException) -> None:
        self.owner, self.name, self.at, self.error = owner, name, at, error
        self.original = getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args: Any) -> Any:
        self.at -= 1
        if self.at == 0:
            setattr(self.owner, self.name, self.original)
            raise self.error
        return self.original(*args)


class TestFailure:
    @pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()], ids=repr)
    @pytest.mark.parametrize("max_behind", [0, 1])
    @pytest.mark.parametrize("at", [1, 2, 5])
    @pytest.mark.parametrize("where", ["launch", "schedule", "add", "read"])
    def test_call_that_fails_leaves_no_request_behind(
        self, shared_engine: tuple[LLM, LISTS_OF_TOKENS], where: str, at: int, max_behind: int, error: BaseException
    ) -> None:
        llm, expected = shared_engine
        engine = llm.engine
        engine.max_behind = max_behind
        owner, name = {
            "launch": (engine.runner, "launch"),
            "schedule": (engine.scheduler, "schedule"),
            "add": (engine, "add"),
            "read": (engine, "_read_tokens"),
        }[where]
        Interrupt(owner, name, at, error)
        with pytest.raises(type(error), match=f"^{error}$"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert engine.current_stats().cache_usage == 0.0
        assert (llm.stats().num_running, llm.stats().num_waiting) == (0, 0)
        assert tokens(llm, PROMPTS) == expected
        assert is_idle(llm)

    def test_failure_between_the_steps_leaves_no_request_behind(
        self, shared_engine: tuple[LLM, LISTS_OF_TOKENS]
    ) -> None:
        llm, expected = shared_engine
        for max_behind in (0, 1):
            llm.engine.max_behind = max_behind
            step, calls = llm.engine.step, iter(range(3))

            def stop_after_three(step: Any = step, calls: Any = calls) -> Any:
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                return step()

            llm.engine.step = stop_after_three
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            del llm.engine.step
            assert llm.stats().cache_usage == 0.0 and llm.stats().num_waiting == llm.stats().num_running == 0
            assert tokens(llm, PROMPTS) == expected and is_idle(llm)


@pytest.fixture(scope="module")
def shared_engine(checkpoint: Callable[..., Path]) -> Any:
    """One engine through all the failures, with what it must answer after each."""
    path = checkpoint("plain")
    with small_llm(path) as llm:
        yield llm, [Reference(path).greedy(p, 8) for p in PROMPTS]


def small_llm(path: Path) -> LLM:
    return LLM(
        str(path),
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        kvcache_block_size=16,
        num_kvcache_blocks=24,
        max_num_seqs=4,
    )


def held_memory(llm: LLM) -> list[weakref.ref]:
    runner = llm.engine.runner
    return [weakref.ref(part) for part in (llm.engine, runner, runner.model, runner.kv_cache, runner.batch.state)]


class TestSpeech:
    def test_without_tqdm_nothing_is_printed(self, llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
        capfd.readouterr()
        tokens(llm, PROMPTS)
        assert capfd.readouterr() == ("", "")

    def test_progress_bar_shows_both_rates_on_stderr(self, llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
        capfd.readouterr()
        llm.generate(PROMPTS, GREEDY)
        out, err = capfd.readouterr()
        assert out == ""
        assert "6/6" in err and "prefill" in err and "decode" in err and "tok/s" in err

    def test_stats_count_what_was_done(self, llm: LLM) -> None:
        tokens(llm, PROMPTS)
        stats = llm.stats()
        assert stats.num_prefill_tokens == sum(map(len, PROMPTS)) == stats.prefix_queries
        assert stats.num_decode_tokens == 7 * len(PROMPTS)
        assert stats.num_steps == 8 and stats.prefix_hits == stats.num_preemptions == 0

    def test_stats_are_a_picture_of_their_moment(self, llm: LLM) -> None:
        before = llm.stats()
        tokens(llm, PROMPTS)
        assert before.num_steps == 0 < llm.stats().num_steps

    def test_counters_go_on_after_a_failure(self, llm: LLM) -> None:
        tokens(llm, PROMPTS)
        before = llm.stats()
        Interrupt(llm.engine.runner, "launch", 2, RuntimeError("device lost"))
        with pytest.raises(RuntimeError):
            tokens(llm, PROMPTS)
        assert llm.stats().prefix_queries > before.prefix_queries > 0
        assert llm.stats().num_steps > before.num_steps


class TestImport:
    def test_loads_neither_torch_nor_transformers(self) -> None:
        heavy = ["torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "triton", "tqdm"]
        code = (
            "import sys; before = set(sys.modules); import nanovllm; nanovllm.SamplingParams(); nanovllm.LLM\n"
            f"print([name for name in {heavy} if name in sys.modules and name not in before])"
        )
        assert run_python(code) == "[]"

    def test_takes_less_than_300_ms_beyond_the_interpreter(self) -> None:
        code = "import time; t = time.process_time(); import nanovllm; print(time.process_time() - t)"
        # The best of a few, in CPU time: a busy machine is no fault of the package.
        assert min(float(run_python(code)) for _ in range(3)) < 0.3

    def test_exports_what_the_readme_uses(self) -> None:
        assert set(nanovllm.__all__) <= set(dir(nanovllm))
        assert {"LLM", "AsyncLLM", "SamplingParams", "RequestOutput", "CompletionOutput"} <= set(nanovllm.__all__)


def run_python(code: str) -> str:
    root = Path(nanovllm.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()
