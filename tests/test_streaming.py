"""What `LLM` makes of text and of requests on their way: streams, stop strings, n completions, chat, aborts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import SHAPES, random_prompts, save_checkpoint, save_spaced_tokenizer
from inside import text_engine_reference

from nanovllm import LLM, Logprob, RequestOutputKind, SamplingParams, demo_model
from nanovllm.outputs import RequestOutput

NUM_BLOCKS = 64
PROMPTS = random_prompts([5, 33, 1, 17, 64], seed=5, vocab_size=256)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
    "{{ extra or '' }}"
)


@pytest.fixture(scope="module")
def shared(text_model: Path) -> Iterator[LLM]:
    with make(text_model) as llm:
        yield llm


def make(path: Path | str, **options: Any) -> LLM:
    defaults = {
        "device": "cpu",
        "dtype": "float32",
        "kvcache_block_size": 16,
        "num_kvcache_blocks": NUM_BLOCKS,
        "max_num_seqs": 8,
    }
    return LLM(str(path), **{**defaults, **options})


@pytest.fixture(params=[0, 1], ids=["read_at_once", "read_one_behind"])
def llm(request: pytest.FixtureRequest, shared: LLM) -> Iterator[LLM]:
    """The shared engine, which reads tokens as on a CPU or as on a GPU, and must be left with nothing running."""
    shared.engine.max_behind = request.param
    shared.reset_prefix_cache()
    yield shared
    assert is_idle(shared)


def is_idle(llm: LLM) -> bool:
    stats = llm.stats()
    state = (stats.cache_usage, stats.num_running, stats.num_waiting)
    return state == (0.0, 0, 0) and not llm.engine.has_unfinished_requests


def generate(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def decode(llm: LLM, ids: list[int], **options: Any) -> str:
    return llm.get_tokenizer().decode(ids, **{"skip_special_tokens": True, **options})


class TestStream:
    def test_outputs_grow_into_what_generate_gives(self, llm: LLM) -> None:
        expected = generate(llm, PROMPTS)
        outputs: dict[int, list[RequestOutput]] = {}
        for output in llm.stream(PROMPTS, GREEDY):
            outputs.setdefault(int(output.request_id), []).append(output)
        assert len(outputs) == len(PROMPTS)
        for (_, parts), full, prompt in zip(sorted(outputs.items()), expected, PROMPTS, strict=True):
            assert [len(part["token_ids"]) for part in parts] == list(range(1, 25))
            for part in parts:
                n = len(part["token_ids"])
                assert part.prompt_token_ids == prompt and part["token_ids"] == full["token_ids"][:n]
                known = decode(llm, part["token_ids"])
                assert part["text"] == (known if n == 24 else known.removesuffix("\ufffd"))
            assert [part.finished for part in parts] == [False] * 23 + [True]
            assert [part["finish_reason"] for part in parts] == [None] * 23 + ["length"]
            assert parts[-1]["text"] == full["text"]

    def test_streams_and_calls_of_generate_share_the_engine(self, llm: LLM) -> None:
        expected = [o["token_ids"] for o in generate(llm, PROMPTS)]
        first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
        last = [next(first), next(second)]
        assert [o["token_ids"] for o in generate(llm, PROMPTS[2:])] == expected[2:]
        last[0] = [*first][-1]
        last[1] = [*second][-1]
        assert [o["token_ids"] for o in last] == expected[:2] and last[1].finished

    @pytest.mark.parametrize("num_taken", [0, 1, 7])
    def test_leaving_early_aborts_and_gives_the_blocks_back(self, llm: LLM, num_taken: int) -> None:
        stream = llm.stream(PROMPTS, GREEDY)
        for _ in range(num_taken):
            next(stream)
        assert (llm.stats().cache_usage > 0) == (num_taken > 0)
        stream.close()
        assert is_idle(llm)
        for _ in llm.stream(PROMPTS, GREEDY):
            break  # drops the iterator
        assert is_idle(llm)

    def test_bad_prompts_are_refused_before_the_first_output(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
            llm.stream([PROMPTS[0], []], GREEDY)

    def test_failure_under_way_ends_every_stream(self, llm: LLM) -> None:
        stream, other = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
        next(stream), next(other)

        def fail() -> None:
            raise RuntimeError("device lost")

        llm.engine.scheduler.schedule = fail
        with pytest.raises(RuntimeError, match="device lost"):
            list(stream)
        (end,) = other
        assert end.finished and end["finish_reason"] == "abort"
        assert generate(llm, PROMPTS[0])[0]["finish_reason"] == "length"

    def test_closing_the_engine_under_a_stream_ends_it_and_gives_the_memory_back(self, text_model: Path) -> None:
        llm = make(text_model)
        text_engine = text_engine_reference(llm)
        streams = [llm.stream(PROMPTS[:2], GREEDY), llm.stream(PROMPTS[2], GREEDY), llm.stream(PROMPTS[3], GREEDY)]
        for stream in streams[:2]:
            next(stream)
        llm.close()
        assert text_engine() is None
        for stream in (streams[0], streams[2]):
            with pytest.raises(RuntimeError, match="this LLM is closed"):
                list(stream)
        streams[1].close()


class TestStopStrings:
    @pytest.mark.parametrize("is_streaming", [False, True])
    @pytest.mark.parametrize("include", [False, True])
    def test_end_the_request_where_their_text_is_complete(self, llm: LLM, include: bool, is_streaming: bool) -> None:
        for prompt in PROMPTS:
            plain = generate(llm, prompt)[0]
            text, ids = plain["text"], plain["token_ids"]
            stop = text[5:7]
            params = SamplingParams(
                temperature=0.0, max_tokens=24, stop=["not to be found", stop], include_stop_str_in_output=include
            )
            if is_streaming:
                parts = list(llm.stream(prompt, params))
                output = parts[-1]
                assert all(output["text"].startswith(part["text"]) for part in parts)
            else:
                output = generate(llm, prompt, params)[0]
            start = text.index(stop)
            assert output["text"] == text[: start + (2 if include else 0)]
            assert (output["finish_reason"], output.outputs[0].stop_reason) == ("stop", stop)
            # Tokens end with the first after which the stop string can no longer change.
            n = len(output["token_ids"])
            assert output["token_ids"] == ids[:n]
            settled = [decode(llm, ids[:i]).removesuffix("\ufffd") for i in (n - 1, n)]
            assert n == 24 or (stop not in settled[0] and stop in settled[1])

    def test_leave_the_neighbours_alone(self, llm: LLM) -> None:
        plain = generate(llm, PROMPTS)
        params = [GREEDY] * len(PROMPTS)
        params[1] = SamplingParams(temperature=0.0, max_tokens=24, stop=plain[1]["text"][3])
        outputs = generate(llm, PROMPTS, params)
        assert outputs[1]["text"] == plain[1]["text"][: plain[1]["text"].index(plain[1]["text"][3])]
        for i in (0, 2, 3, 4):
            assert (outputs[i]["token_ids"], outputs[i]["text"]) == (plain[i]["token_ids"], plain[i]["text"])

    def test_on_the_last_token_are_a_stop(self, llm: LLM) -> None:
        plain = generate(llm, PROMPTS[0])[0]
        settled = [decode(llm, plain["token_ids"][:n]).removesuffix("\ufffd") for n in range(25)]
        stop = settled[10][-1:]
        n = next(i for i in range(25) if stop in settled[i])
        output = generate(llm, PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=n, stop=stop))[0]
        assert (output["finish_reason"], output.outputs[0].stop_reason) == ("stop", stop)
        assert stop not in output["text"]

    def test_stop_token_is_no_text_unless_it_is_to_be_included(self, llm: LLM) -> None:
        ids = generate(llm, PROMPTS[0])[0]["token_ids"]
        end = ids.index(ids[9]) + 1
        for include in (False, True):
            params = SamplingParams(
                temperature=0.0, max_tokens=24, stop_token_ids=[ids[9]], include_stop_str_in_output=include
            )
            outputs = [generate(llm, PROMPTS[0], params)[0], list(llm.stream(PROMPTS[0], params))[-1]]
            for output in outputs:
                assert output["token_ids"] == ids[:end]
                assert output["text"] == decode(llm, ids[: end - (not include)])
                assert output.outputs[0].stop_reason == ids[9]

    def test_without_a_tokenizer_are_refused(self, text_model: Path, make_llm: Callable[..., LLM]) -> None:
        llm = make_llm(text_model)
        with pytest.raises(ValueError, match="stop=.*needs a tokenizer"):
            generate(llm, [PROMPTS[0]], SamplingParams(stop="x"))
        with pytest.raises(ValueError, match="skip_tokenizer_init=True"):
            generate(llm, [PROMPTS[0]], SamplingParams(bad_words=["x"]))
        with pytest.raises(ValueError, match="skip_tokenizer_init=True"):
            llm.chat([{"role": "user", "content": "Hello"}])


class TestText:
    def test_is_not_made_unless_asked_for(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=24, detokenize=False, logprobs=1)
        for output in (generate(llm, PROMPTS[0], params)[0], list(llm.stream(PROMPTS[0], params))[-1]):
            assert output["text"] == "" and len(output["token_ids"]) == 24
            assert all(value.decoded_token is None for entry in output.outputs[0].logprobs for value in entry.values())

    def test_special_tokens_are_kept_if_asked_for(self, llm: LLM) -> None:
        end = llm.get_tokenizer().eos_token_id
        bias = {end: 100.0}
        for skip in (True, False):
            params = SamplingParams(
                temperature=0.0, max_tokens=4, logit_bias=bias, ignore_eos=True, skip_special_tokens=skip
            )
            for output in (generate(llm, PROMPTS[0], params)[0], list(llm.stream(PROMPTS[0], params))[-1]):
                assert output["token_ids"] == [end] * 4
                assert output["text"] == ("" if skip else "<|end|>" * 4)

    def test_logprobs_name_their_tokens(self, llm: LLM) -> None:
        def is_text_of(value: Logprob, token_id: int) -> bool:
            alone = decode(llm, [token_id])
            return value.decoded_token == alone or (alone == "\ufffd" and not value.decoded_token.endswith("\ufffd"))

        params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=2)
        for output in (generate(llm, PROMPTS[0], params)[0], list(llm.stream(PROMPTS[0], params))[-1]):
            completion = output.outputs[0]
            assert len(completion.logprobs) == 6
            for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
                assert next(iter(entry)) == token_id and entry[token_id].rank == 1 and len(entry) == 3
                for i, value in entry.items():
                    assert isinstance(value, Logprob) and is_text_of(value, i)
            chosen = [e[i].logprob for i, e in zip(completion.token_ids, completion.logprobs, strict=True)]
            assert completion.cumulative_logprob == pytest.approx(sum(chosen))
            assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(PROMPTS[0])
            for token_id, entry in zip(PROMPTS[0][1:], output.prompt_logprobs[1:], strict=True):
                assert next(iter(entry)) == token_id and is_text_of(entry[token_id], token_id)

    def test_a_characters_text_comes_with_its_last_byte(self, llm: LLM) -> None:
        def texts(entries: list[Any], ids: list[int]) -> list[str]:
            return [entry[i].decoded_token for entry, i in zip(entries, ids, strict=True)]

        ids = llm.encode_prompt("a中é!")
        params = SamplingParams(max_tokens=1, logprobs=0, prompt_logprobs=2, allowed_token_ids=ids[-1:])
        output = generate(llm, [ids], params)[0]
        assert texts(output.prompt_logprobs[1:], ids[1:]) == ["", "", "中", "", "é", "!"]
        assert texts(output.outputs[0].logprobs, ids[-1:]) == ["!"]
        output = generate(llm, [ids[:3]], SamplingParams(max_tokens=1, logprobs=0, allowed_token_ids=ids[3:4]))[0]
        assert texts(output.outputs[0].logprobs, ids[3:4]) == ["中"]

    def test_prompt_keeps_only_its_last_tokens_if_asked_to(self, llm: LLM) -> None:
        text = "Hello, Nano-vLLM."
        params = SamplingParams(temperature=0.0, max_tokens=4, truncate_prompt_tokens=5)
        output = generate(llm, text, params)[0]
        assert output.prompt == text
        assert output.prompt_token_ids == llm.encode_prompt(text)[-5:] == llm.encode_prompt("vLLM.")
        assert output["token_ids"] == generate(llm, "vLLM.", params)[0]["token_ids"]
        assert generate(llm, "LM.", params)[0].prompt_token_ids == llm.encode_prompt("LM.")
        long = [7] * 1000
        everything = SamplingParams(temperature=0.0, max_tokens=4, truncate_prompt_tokens=-1)
        output = generate(llm, long, everything)[0]
        assert len(output.prompt_token_ids) == llm.engine.max_model_len - 1 and len(output["token_ids"]) == 1
        assert len(long) == 1000

    def test_encode_prompt_takes_what_generate_takes(self, llm: LLM) -> None:
        for prompt in ("été", {"prompt": "été"}, llm.get_tokenizer().encode("été")):
            assert llm.encode_prompt(prompt) == generate(llm, [prompt])[0].prompt_token_ids
        with pytest.raises(TypeError, match="must be a string or a list of token ids"):
            llm.encode_prompt(3)


class TestSpacesInTokens:
    """With a tokenizer like Llama's, whose decoder leaves out the first space of a text."""

    @pytest.fixture(scope="class")
    def llm(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
        path = tmp_path_factory.mktemp("spaced")
        save_checkpoint(path, {**SHAPES["plain"], "vocab_size": save_spaced_tokenizer(path)})
        with make(path) as llm:
            yield llm

    def drawing(self, llm: LLM, token: str, **options: Any) -> SamplingParams:
        token_id = llm.get_tokenizer().convert_tokens_to_ids(token)
        return SamplingParams(**{"allowed_token_ids": [token_id], "max_tokens": 2, "temperature": 0.0, **options})

    def test_text_goes_on_where_the_prompt_ends(self, llm: LLM) -> None:
        ids = llm.encode_prompt("hi")
        assert llm.get_tokenizer().convert_ids_to_tokens(ids) == ["<s>", "▁hi"]
        for prompt in ("hi", ids, ids[1:], {"prompt": "hi", "prompt_token_ids": ids}, "hi é"):
            for special in (True, False):
                params = self.drawing(llm, "▁world", skip_special_tokens=special)
                assert generate(llm, [prompt], params)[0]["text"] == " world world"
                assert [o["text"] for o in llm.stream([prompt], params)] == [" world", " world world"]
                deltas = self.drawing(llm, "▁world", skip_special_tokens=special, output_kind=RequestOutputKind.DELTA)
                assert [o["text"] for o in llm.stream([prompt], deltas)] == [" world", " world"]
        two = self.drawing(llm, "▁world", n=2, temperature=1.0)
        assert [c.text for c in generate(llm, ["hi"], two)[0].outputs] == [" world world"] * 2
        assert generate(llm, ["hi"], self.drawing(llm, "d"))[0]["text"] == "dd"

    def test_a_prompt_that_shows_no_text_is_the_beginning_of_one(self, llm: LLM) -> None:
        for prompt in ("", [1], [1, 1, 1]):
            for special, text in ((True, "world world"), (False, " world world")):
                params = self.drawing(llm, "▁world", skip_special_tokens=special)
                assert generate(llm, [prompt], params)[0]["text"] == text
                assert [o["text"] for o in llm.stream([prompt], params)][-1] == text

    def test_stop_strings_and_logprobs_have_the_space(self, llm: LLM) -> None:
        output = generate(llm, ["hi"], self.drawing(llm, "▁world", stop=[" world"], logprobs=0))[0]
        assert (output["text"], output.outputs[0].stop_reason, len(output["token_ids"])) == ("", " world", 1)
        params = self.drawing(llm, "▁world", logprobs=0, prompt_logprobs=0)
        output = generate(llm, ["hi hi"], params)[0]
        entries = output.prompt_logprobs[1:] + output.outputs[0].logprobs
        assert [value.decoded_token for entry in entries for value in entry.values()] == [" hi"] * 2 + [" world"] * 2


class TestManyCompletions:
    @pytest.fixture
    def params(self) -> SamplingParams:
        return SamplingParams(n=4, temperature=1.0, max_tokens=20, seed=7)

    def test_differ_and_repeat_and_the_first_is_the_only_one_of_n_1(self, llm: LLM, params: SamplingParams) -> None:
        first, again = generate(llm, [PROMPTS[1]] * 2, params)
        assert [c.index for c in first.outputs] == [0, 1, 2, 3]
        texts = [tuple(c.token_ids) for c in first.outputs]
        assert len(set(texts)) == 4
        assert texts == [tuple(c.token_ids) for c in again.outputs]
        alone = SamplingParams(temperature=1.0, max_tokens=20, seed=7)
        assert tuple(generate(llm, PROMPTS[1], alone)[0]["token_ids"]) == texts[0]
        for completion in first.outputs:
            assert completion.text == decode(llm, completion.token_ids) and completion.finish_reason == "length"
        neighbour = SamplingParams(n=4, temperature=1.0, max_tokens=20, seed=8)
        others = [tuple(c.token_ids) for c in generate(llm, PROMPTS[1], neighbour)[0].outputs]
        assert not set(others) & set(texts)

    def test_without_a_seed_differ_from_each_other_and_from_call_to_call(self, llm: LLM) -> None:
        params = SamplingParams(n=4, max_tokens=20)
        answers = [tuple(c.token_ids) for _ in range(2) for c in generate(llm, PROMPTS[1], params)[0].outputs]
        assert len(set(answers)) == 8

    def test_share_the_blocks_of_their_prompt(self, llm: LLM, params: SamplingParams) -> None:
        before = llm.stats()
        stream = llm.stream(PROMPTS[4], params)  # four blocks of 16: three are shared, the last is computed by each
        output = next(stream)
        after = llm.stats()
        assert after.num_prefill_tokens - before.num_prefill_tokens == 64 + 3 * 16
        assert after.prefix_hits - before.prefix_hits == 3 * 48
        assert after.num_running == 4 and round(after.cache_usage * NUM_BLOCKS) in (3 + 4, 3 + 8)
        assert output.num_cached_tokens == 0  # by others
        stream.close()

    def test_do_not_share_without_the_prefix_cache_and_are_the_same(
        self, text_model: Path, llm: LLM, params: SamplingParams
    ) -> None:
        expected = [c.token_ids for c in generate(llm, PROMPTS[4], params)[0].outputs]
        with make(text_model, enable_prefix_caching=False, max_num_seqs=3) as other:
            assert [c.token_ids for c in generate(other, PROMPTS[4], params)[0].outputs] == expected
            assert other.stats().prefix_hits == 0

    def test_end_each_for_itself(self, llm: LLM, params: SamplingParams) -> None:
        texts = [c.text for c in generate(llm, PROMPTS[1], params)[0].outputs]
        stop = next(c for c in texts[2] if all(c not in texts[i] for i in (0, 1, 3)))
        stopping = SamplingParams(n=4, temperature=1.0, max_tokens=20, seed=7, stop=stop)
        for output in (generate(llm, PROMPTS[1], stopping)[0], list(llm.stream(PROMPTS[1], stopping))[-1]):
            assert [c.finish_reason for c in output.outputs] == ["length", "length", "stop", "length"]
            assert [c.stop_reason for c in output.outputs] == [None, None, stop, None]
            assert [c.text for c in output.outputs] == [*texts[:2], texts[2][: texts[2].index(stop)], texts[3]]

    def test_of_a_stream_come_together(self, llm: LLM, params: SamplingParams) -> None:
        expected = [c.token_ids for c in generate(llm, PROMPTS[1], params)[0].outputs]
        outputs = list(llm.stream(PROMPTS[1], params))
        assert [c.token_ids for c in outputs[-1].outputs] == expected
        assert all(len(o.outputs) == 4 for o in outputs) and len({o.request_id for o in outputs}) == 1
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]

    def test_score_the_prompt_once(self, llm: LLM) -> None:
        params = SamplingParams(n=3, max_tokens=4, seed=1, prompt_logprobs=0, logprobs=0)
        before = llm.stats().num_prefill_tokens
        output = generate(llm, PROMPTS[4], params)[0]
        assert llm.stats().num_prefill_tokens - before == 64 + 2 * 16
        assert len(output.prompt_logprobs) == 64
        assert all(len(c.logprobs) == 4 and c.cumulative_logprob < 0 for c in output.outputs)


class TestAbort:
    def test_gives_the_blocks_back_and_tells_the_reader(self, llm: LLM) -> None:
        stream = llm.stream(PROMPTS, GREEDY)
        ids = sorted({next(stream).request_id for _ in PROMPTS}, key=int)
        assert len(ids) == len(PROMPTS)
        llm.abort(ids[0])
        assert llm.stats().num_running == len(PROMPTS) - 1
        llm.abort(["no such request", *ids[1:3], ids[0]])
        last = {output.request_id: output for output in stream}
        assert [last[i]["finish_reason"] for i in ids] == ["abort"] * 3 + ["length"] * 2
        assert all(output.finished for output in last.values())
        assert all(last[i]["text"] == decode(llm, last[i]["token_ids"]) for i in ids)
        llm.abort(ids)

    def test_takes_all_completions(self, llm: LLM) -> None:
        stream = llm.stream(PROMPTS[1], SamplingParams(n=3, max_tokens=20))
        llm.abort(next(stream).request_id)
        assert is_idle(llm)
        (output,) = stream
        assert [c.finish_reason for c in output.outputs] == ["abort"] * 3

    def test_of_one_that_waits(self, text_model: Path) -> None:
        with make(text_model, max_num_seqs=1) as llm:
            stream = llm.stream(PROMPTS, GREEDY)
            first = next(stream)
            waiting = [str(int(first.request_id) + i) for i in (1, 2)]
            llm.abort(waiting)
            last = {output.request_id: output for output in stream}
            assert [last[i]["finish_reason"] for i in waiting] == ["abort"] * 2
            assert [last[i]["text"] for i in waiting] == [""] * 2
            assert len(last) == len(PROMPTS) and is_idle(llm)


def test_metrics_tell_when_things_happened(text_model: Path) -> None:
    with make(text_model, max_num_seqs=2) as llm:
        for output in generate(llm, PROMPTS):
            m = output.metrics
            times = [m.arrival_time, m.first_scheduled_time, m.first_token_time, m.finished_time]
            assert times == sorted(times) and m.time_in_queue == times[1] - times[0] and m.num_preemptions == 0
        waited = [o.metrics.time_in_queue for o in generate(llm, [PROMPTS[0]] * 6)]
        assert max(waited[:2]) < min(waited[2:])
    with make(text_model, num_kvcache_blocks=8, max_model_len=100) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=40)
        outputs = generate(llm, PROMPTS, params)
        assert sum(o.metrics.num_preemptions for o in outputs) == llm.stats().num_preemptions > 0


def test_a_request_of_several_completions_is_finished_when_all_are(llm: LLM) -> None:
    stop_early = SamplingParams(n=3, max_tokens=30, stop_token_ids=list(range(60)), seed=1)
    outputs = list(llm.stream(PROMPTS[0], stop_early))
    assert any(c.finish_reason for output in outputs[:-1] for c in output.outputs)
    assert outputs[0].metrics.finished_time is None and outputs[-1].finished
    seen = []
    for output in llm.stream(PROMPTS[0], stop_early):
        seen.append((output.finished, output.metrics.finished_time is not None))
    assert all(finished == has_time for finished, has_time in seen)


class TestWhatIsRefused:
    def test_a_request_made_before_sleep_and_started_after(self, llm: LLM) -> None:
        outputs = llm.stream(PROMPTS[0], GREEDY)
        llm.sleep()
        with pytest.raises(RuntimeError, match=r"call wake_up\(\)"):
            next(outputs)
        llm.wake_up()
        assert generate(llm, [PROMPTS[0]])[0].finished

    @pytest.mark.parametrize(
        ("given", "name"),
        [
            ({"prompts": "a\ud83d"}, r"prompts\[0\]='a\\ud83d' has a lone surrogate, '\\ud83d' at character 1"),
            ({"prompts": ["a", {"prompt": "\udcff"}]}, r"prompts\[1\]\['prompt'\]="),
            ({"prompts": {"prompt": "\ud800", "prompt_token_ids": [5]}}, r"prompts\[0\]\['prompt'\]="),
            ({"stop": ["a", "\ud800"]}, r"stop\[1\]="),
            ({"bad_words": ["\ud800a"]}, r"bad_words\[0\]="),
        ],
        ids=["text", "dict", "dict with ids", "stop", "bad_words"],
    )
    def test_lone_surrogates_by_name(self, llm: LLM, given: dict[str, Any], name: str) -> None:
        prompts = given.get("prompts", "a")
        params = SamplingParams(**{key: value for key, value in given.items() if key != "prompts"})
        with pytest.raises(ValueError, match=name):
            generate(llm, prompts, params)
        with pytest.raises(ValueError, match=name):
            llm.stream(prompts, params)

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [("\ud800", "a lone surrogate"), ({1: 2, "a": 3}, "has the keys 1, 'a'"), ({}, "has the keys none")],
        ids=str,
    )
    def test_prompts_with_the_cause(self, llm: LLM, prompt: Any, message: str) -> None:
        with pytest.raises(ValueError, match=rf"prompts\[0\].*{message}"):
            llm.generate([prompt], GREEDY, use_tqdm=False)

    def test_template_options_given_twice(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match="must not have 'add_generation_prompt'"):
            llm.chat(
                [{"role": "user", "content": "a"}],
                chat_template=CHATML,
                chat_template_kwargs={"add_generation_prompt": True},
            )

    def test_biases_changed_under_a_request_count_for_nothing(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={5: 100.0})
        outputs = llm.stream(PROMPTS[0], params)
        params.logit_bias[10**6] = 5.0
        assert list(outputs)[-1].outputs[0].token_ids == [5] * 4


class TestChat:
    MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]

    @pytest.fixture(scope="class")
    def demo(self) -> Iterator[LLM]:
        with make(demo_model()) as llm:
            yield llm

    def test_writes_the_conversation_out_by_the_template(self, demo: LLM) -> None:
        text = "<system>Be brief.\n<user>Hi<assistant>"
        (output,) = demo.chat(self.MESSAGES, GREEDY, use_tqdm=False, chat_template=CHATML)
        assert output.prompt == text
        assert output.prompt_token_ids == demo.encode_prompt(text)
        assert output["text"] == generate(demo, text)[0]["text"]

    def test_takes_parts_and_gives_them_as_the_template_or_the_caller_says(self, demo: LLM) -> None:
        messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        (output,) = demo.chat(messages, GREEDY, use_tqdm=False, chat_template=CHATML)
        assert output.prompt == "<user>a\nb<assistant>"
        for form, shown in (("string", "True"), ("openai", "False")):
            options = {"chat_template": "{{ messages[0].content is string }}", "chat_template_content_format": form}
            assert demo.chat(messages, GREEDY, False, **options)[0].prompt == shown
        with pytest.raises(ValueError, match=r"messages\[1\]\[0\]\['content'\]\[0\] is of type 'image_url'"):
            image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
            demo.chat([messages, image], GREEDY, False, chat_template=CHATML)

    def test_takes_a_list_of_conversations(self, demo: LLM) -> None:
        params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (3, 5)]
        outputs = demo.chat([self.MESSAGES, self.MESSAGES[1:]], params, use_tqdm=False, chat_template=CHATML)
        assert [o.prompt for o in outputs] == ["<system>Be brief.\n<user>Hi<assistant>", "<user>Hi<assistant>"]
        assert [len(o["token_ids"]) for o in outputs] == [3, 5]

    def test_passes_the_templates_options_on(self, demo: LLM) -> None:
        tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}

        def prompt(**options: Any) -> str:
            one = SamplingParams(max_tokens=1)
            return demo.chat(self.MESSAGES[1:], one, False, chat_template=CHATML, **options)[0].prompt

        assert prompt(add_generation_prompt=False) == "<user>Hi"
        assert prompt(tools=[tool]) == "<user>Hi1 tools<assistant>"
        assert prompt(chat_template_kwargs={"extra": "!"}) == "<user>Hi<assistant>!"

    def test_continues_the_final_message(self, demo: LLM) -> None:
        messages = [*self.MESSAGES[1:], {"role": "assistant", "content": "def f("}]
        (output,) = demo.chat(
            messages, GREEDY, False, chat_template=CHATML + "<end>", add_generation_prompt=False,
            continue_final_message=True,
        )  # fmt: skip
        assert output.prompt == "<user>Hi\n<assistant>def f("
        with pytest.raises(ValueError, match="continue_final_message=True.*add_generation_prompt=False"):
            demo.chat(messages, GREEDY, False, chat_template=CHATML, continue_final_message=True)

    def test_that_the_template_does_not_take_is_refused(self, demo: LLM) -> None:
        with pytest.raises(ValueError, match="does not take messages: .*chat_template"):
            demo.chat(self.MESSAGES, GREEDY, False)  # the demo model has none
        with pytest.raises(ValueError, match=r"does not take messages\[1\]: no system"):
            template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
            demo.chat([self.MESSAGES[1:], self.MESSAGES], GREEDY, False, chat_template=template)
        for messages in ("Hi", [], [[]], ["Hi"], [{"content": "Hi"}], None):
            with pytest.raises(TypeError, match="messages"):
                demo.chat(messages, GREEDY, False, chat_template=CHATML)
        for option, value in {
            "chat_template": 5,
            "chat_template_kwargs": ["extra"],
            "tools": {"type": "function"},
            "add_generation_prompt": None,
            "continue_final_message": "no",
        }.items():
            with pytest.raises(TypeError, match=f"{option}=.* must be"):
                demo.chat(self.MESSAGES, GREEDY, False, **{"chat_template": CHATML, option: value})
        assert is_idle(demo)


def test_demo_model_streams_the_text_that_it_generates() -> None:
    prompts = ["def __len__(self):\n", 'def close(self):\n    """', "# é 中 😀\n"]
    params = SamplingParams(temperature=0.0, max_tokens=60)
    with make(demo_model()) as llm:
        expected = [o["text"] for o in generate(llm, prompts, params)]
        shown = {output.prompt: output["text"] for output in llm.stream(prompts, params)}
        assert [shown[prompt] for prompt in prompts] == expected
        stop = SamplingParams(temperature=0.0, max_tokens=60, stop=["return", "\n\n"])
        for output in generate(llm, prompts, stop):
            full = expected[prompts.index(output.prompt)]
            assert output["text"] == min((full.split(s)[0] for s in stop.stop), key=len)
