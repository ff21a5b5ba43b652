"""Whatever a request asks of its tokens, against the plain formulas on transformers' logits; and nobody else notices.

On the CPU, and the same on a GPU: float32 either way.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE, Reference, random_prompts
from drawn_from import assert_drawn_from
from inside import watch_logits_of_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.sampling.reference import distribution, edited_logits
from nanovllm.outputs import TokenLogprobs
from nanovllm.worker import logit_extras

BadWords = tuple[tuple[int, ...], ...]
PROMPTS = random_prompts([40, 1, 17, 70, 2, 33, 15], seed=1)
TOLERANCE = 2e-3
NUM_DRAWS = 3000
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
# What the engine may do to a request: chunks, preemption, one step ahead, padding and replays
SITUATIONS: list[dict[str, Any]] = [
    {},
    {"max_behind": 1},
    {"max_num_batched_tokens": 33},
    {"num_kvcache_blocks": 12, "max_behind": 1},
    {"num_kvcache_blocks": 12, "max_num_batched_tokens": 33, "max_num_seqs": 5, "max_behind": 1},
    {"max_behind": 1, "with_graphs": True},
    {"num_kvcache_blocks": 12, "max_num_batched_tokens": 300, "max_behind": 1, "with_graphs": True},
]

EVERYTHING = SamplingParams(
    temperature=0.8,
    top_k=30,
    top_p=0.9,
    min_p=0.01,
    seed=11,
    max_tokens=30,
    min_tokens=5,
    stop_token_ids=[9],
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    presence_penalty=-0.4,
    logit_bias={3: 4.0, 5: -100.0, 9: 3.0},
    allowed_token_ids=[*range(0, VOCAB_SIZE, 3), 5],
)
ASKED = [
    SamplingParams(temperature=0.0, max_tokens=25, repetition_penalty=1.5),
    SamplingParams(temperature=0.0, max_tokens=25, frequency_penalty=1.5),
    SamplingParams(temperature=0.0, max_tokens=25, presence_penalty=-2.0),
    SamplingParams(temperature=0.0, max_tokens=25, logit_bias={i: 100.0 for i in (2, 7)}, frequency_penalty=2.0),
    SamplingParams(temperature=0.0, max_tokens=25, allowed_token_ids=[4, 8, 15], min_tokens=9, stop_token_ids=[4]),
    SamplingParams(temperature=1.0, max_tokens=25, seed=5, repetition_penalty=0.8, top_k=50),
    EVERYTHING,
]


@pytest.fixture
def make(checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> Callable[..., LLM]:
    return lambda device="cpu", **options: make_llm(checkpoint("plain"), device=device, **options)


def run(llm: LLM, requests: list[tuple[list[int], SamplingParams]], bad_words: BadWords = ()) -> list[Sequence]:
    engine = llm.engine
    seqs = [engine.make_sequence(prompt, params, bad_words=bad_words) for prompt, params in requests]
    for seq in seqs:
        engine.add(seq)
    while engine.has_unfinished_requests:
        engine.step()
    return seqs


def distribution_asked(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    return distribution(logits, params.temperature, params.top_k, params.top_p, params.min_p)


def draws(llm: LLM, prompt: list[int], params: dict[str, Any]) -> list[tuple[int, ...]]:
    """What as many requests as NUM_DRAWS answer, each with a seed of its own."""
    requests = [(prompt, SamplingParams(**params, seed=seed)) for seed in range(NUM_DRAWS)]
    return [tuple(seq.output_token_ids) for seq in run(llm, requests)]


@pytest.mark.parametrize("device", DEVICES)
class TestDistributions:
    @pytest.mark.parametrize(
        "asked",
        [
            {},
            {"temperature": 0.5},
            {"temperature": 2.0},
            {"top_k": 7},
            {"top_p": 0.7},
            {"min_p": 0.1},
            {"top_k": 20, "top_p": 0.8},
            {"top_k": 20, "min_p": 0.1},
            {"top_p": 0.8, "min_p": 0.05},
            {"temperature": 0.7, "top_k": 15, "top_p": 0.9, "min_p": 0.03},
            {"top_p": 0.9, "repetition_penalty": 1.4},
            {"top_k": 10, "logit_bias": {1: 3.0, 2: 5.0}, "repetition_penalty": 0.6},
            {"min_p": 0.05, "allowed_token_ids": list(range(40)), "temperature": 1.5},
        ],
        ids=str,
    )
    def test_tokens_are_drawn_as_the_formulas_on_transformers_logits_say(
        self, asked: dict[str, Any], device: str, make: Callable[..., LLM], checkpoint: Callable[..., Path]
    ) -> None:
        prompt = PROMPTS[2]
        params = SamplingParams(**asked)
        logits = Reference(checkpoint("plain")).logits(prompt)[-1]
        p = distribution_asked(edited_logits(logits, params, prompt, []), params)
        llm = make(device, max_num_seqs=250)
        drawn = [tokens[0] for tokens in draws(llm, prompt, {**asked, "max_tokens": 1})]
        assert len(set(drawn)) > 3
        assert_drawn_from(drawn, p)

    def test_continuations_are_drawn_as_the_penalties_of_their_own_tokens_say(
        self, device: str, make: Callable[..., LLM], checkpoint: Callable[..., Path]
    ) -> None:
        """All continuations of three tokens out of four, each with its probability."""
        asked = {
            "allowed_token_ids": [10, 20, 30, 40],
            "frequency_penalty": 0.9,
            "presence_penalty": -0.5,
            "repetition_penalty": 1.2,
            "top_p": 0.95,
            "temperature": 2.0,
        }
        prompt = [*PROMPTS[4], 20, 20]
        params, reference = SamplingParams(**asked), Reference(checkpoint("plain"))
        p: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(3):
            longer = {}
            for output, probability in p.items():
                logits = reference.logits([*prompt, *output])[-1]
                next_p = distribution_asked(edited_logits(logits, params, prompt, list(output)), params)
                longer |= {(*output, t): probability * float(next_p[t]) for t in params.allowed_token_ids}
            p = longer
        assert_drawn_from(draws(make(device, max_num_seqs=250), prompt, {**asked, "max_tokens": 3}), p)


@pytest.mark.parametrize("device", DEVICES)
class TestEdits:
    def test_edited_logits_are_the_formulas_on_transformers_logits(
        self, device: str, make: Callable[..., LLM], checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At every token of every request, in a batch in which each asks for something else, with steps in flight."""
        seen: dict[tuple[int, int], torch.Tensor] = {}
        sample = logit_extras.sample

        def spy(x: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor, *others: Any) -> None:
            for row, seq_len, logits in zip(rows.tolist(), seq_lens.tolist(), x.cpu(), strict=True):
                seen[row, seq_len] = logits.clone()
            sample(x, rows, seq_lens, *others)

        monkeypatch.setattr(logit_extras, "sample", spy)
        monkeypatch.setattr(logit_extras, "MAX_BATCH_ROWS", 3)  # so that the step takes several row batches
        llm, bad_words = make(device, max_behind=1), ((7,), (2, 3), (2, 2, 2))
        seqs = [
            llm.engine.make_sequence(prompt, params, bad_words=bad_words)
            for prompt, params in zip(PROMPTS, ASKED, strict=True)
        ]
        for seq in seqs:
            llm.engine.add(seq)
        llm.engine.step()
        rows = [seq.row for seq in seqs]  # all run at once, and keep their rows
        assert len(set(rows)) == len(seqs) and -1 not in rows
        while llm.engine.has_unfinished_requests:
            llm.engine.step()
        for i, (seq, params) in enumerate(zip(seqs, ASKED, strict=True)):
            logits = Reference(checkpoint("plain")).logits(seq.token_ids)
            prompt, output = PROMPTS[i], seq.output_token_ids
            assert len(output) >= 5
            for n in range(len(output)):
                length = len(prompt) + n
                # Stop ids are masked by the sampler, after this.
                masked = [] if n >= params.min_tokens else list(seq.stop_ids)
                edited = seen[rows[i], length].double()
                expected = edited_logits(logits[length - 1], params, prompt, output[:n], bad_words)
                torch.testing.assert_close(edited, expected, rtol=0, atol=TOLERANCE)
                edited[masked] = -float("inf")
                if params.temperature == 0:
                    assert output[n] == int(edited.argmax())
                else:
                    assert distribution_asked(edited, params)[output[n]] > 0

    def test_what_is_not_allowed_never_comes(self, device: str, make: Callable[..., LLM]) -> None:
        llm = make(device)
        asked = [
            SamplingParams(allowed_token_ids=[5, 17, 200], max_tokens=20, temperature=5.0, seed=1),
            SamplingParams(logit_bias={i: -100.0 for i in range(100)}, max_tokens=20, temperature=1.0, seed=2),
            SamplingParams(logit_bias={77: 100.0}, max_tokens=20, temperature=1.0, seed=3),
        ]
        limited, biased, forced = run(llm, [(PROMPTS[0], params) for params in asked])
        assert set(limited.output_token_ids) == {5, 17, 200}
        assert min(biased.output_token_ids) >= 100
        assert set(forced.output_token_ids) == {77}

    def test_any_number_of_stop_ids_is_held_back(
        self, device: str, make: Callable[..., LLM], checkpoint: Callable[..., Path]
    ) -> None:
        """64 in the row, and more besides; of requests that run side by side, one of which has few."""
        reference, prompt = Reference(checkpoint("plain")), PROMPTS[0]
        asked = [
            SamplingParams(temperature=0.0, max_tokens=25, min_tokens=9, stop_token_ids=list(stop_ids))
            for stop_ids in (range(0, VOCAB_SIZE, 2), range(100, 164), range(100, 165), range(3))
        ]
        for seq in run(make(device, max_behind=1), [(prompt, params) for params in asked]):
            output = seq.output_token_ids
            for n, token_id in enumerate(output):
                logits = reference.logits([*prompt, *output[:n]])[-1]
                expected = edited_logits(logits, seq.params, prompt, output[:n], stop_ids=sorted(seq.stop_ids))
                assert token_id == int(expected.argmax())
                assert n >= 9 or token_id not in seq.stop_ids
                assert (token_id in seq.stop_ids) == (seq.finish_reason == "stop" and n == len(output) - 1)
            assert len(output) >= 10

    def test_a_bias_forces_and_bans_whatever_its_size(self, device: str, make: Callable[..., LLM]) -> None:
        biases: list[dict[int, float]] = [{5: 1e300}, {5: float("inf")}, {i: -float("inf") for i in range(100)}]
        asked = [
            SamplingParams(logit_bias=bias, max_tokens=9, temperature=t, seed=1, repetition_penalty=0.5)
            for bias in (*biases, {i: -1e300 for i in range(100)})
            for t in (0.0, 1e-5, 1.0)
        ]
        outputs = [seq.output_token_ids for seq in run(make(device), [(PROMPTS[0], params) for params in asked])]
        assert outputs[:6] == [[5] * 9] * 6
        assert outputs[6:9] == outputs[9:] and min(map(min, outputs[6:])) >= 100

    def test_bad_words_never_come_though_their_tokens_do(self, device: str, make: Callable[..., LLM]) -> None:
        params = SamplingParams(allowed_token_ids=[1, 2], max_tokens=100, temperature=3.0, seed=4)
        output = run(make(device), [(PROMPTS[0], params)], bad_words=((1, 1), (2, 2, 2)))[0].output_token_ids
        text = "".join(map(str, output))
        assert "11" not in text and "222" not in text and "22" in text and "1" in text

    def test_a_row_keeps_nothing_of_its_last_owner(self, device: str, make: Callable[..., LLM]) -> None:
        llm = make(device, max_num_seqs=1)
        plain = SamplingParams(temperature=0.0, max_tokens=10)
        before = run(llm, [(PROMPTS[0], plain)])[0].token_ids
        run(llm, [(PROMPTS[0], EVERYTHING)])
        assert run(llm, [(PROMPTS[0], plain)])[0].token_ids == before


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_in_which_nobody_asks_does_nothing_extra(
    device: str, make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_extras.LogitExtras, "run", lambda *_: pytest.fail("asked"))
    truncated = SamplingParams(top_k=5, top_p=0.9, min_p=0.1, seed=1, min_tokens=3, stop_token_ids=[3])
    neutral = SamplingParams(temperature=0.0, repetition_penalty=1.0, logit_bias={}, logprobs=None)
    llm = make(device)
    for seq in run(llm, [(prompt, params) for prompt in PROMPTS for params in (truncated, neutral)]):
        assert seq.output_token_ids and seq.cumulative_logprob is None and seq.prompt_logprobs is None


def assert_logprobs(found: list[TokenLogprobs], logits: torch.Tensor, tokens: list[int], num_top: int) -> None:
    """`logits [tokens, vocab]`, transformers' for each of `tokens`."""
    expected = logits.double().log_softmax(1)
    assert len(found) == len(tokens)
    for of_token, p, token in zip(found, expected, tokens, strict=True):
        width = 1 + (num_top if num_top >= 0 else len(p))
        assert len(of_token.token_ids) == len(of_token.logprobs) == len(of_token.ranks) == width
        assert of_token.token_ids[0] == token
        logprobs = torch.tensor(of_token.logprobs).double()
        torch.testing.assert_close(logprobs, p[of_token.token_ids], rtol=0, atol=TOLERANCE)
        best = p.sort(descending=True).values[: width - 1]
        torch.testing.assert_close(logprobs[1:], best, rtol=0, atol=TOLERANCE)
        assert of_token.ranks[1:] == list(range(1, width)) and len(set(of_token.token_ids[1:])) == width - 1
        likelier = [int((p > p[token] + slack).sum()) for slack in (TOLERANCE, -TOLERANCE)]
        assert likelier[0] + 1 <= of_token.ranks[0] <= likelier[1]


@pytest.mark.parametrize("device", DEVICES)
class TestLogprobs:
    @pytest.mark.parametrize("options", SITUATIONS, ids=str)
    def test_logprobs_of_prompt_and_output_are_those_of_transformers(
        self, options: dict[str, Any], device: str, make: Callable[..., LLM], checkpoint: Callable[..., Path]
    ) -> None:
        """Of the model's own distribution, whatever edits and truncations made of it. Twice: prefixes are cached."""
        llm = make(device, **options)
        asked = [(0, None), (None, 2), (4, 0), (-1, -1), (2, 3), (0, 5), (1, None)]
        params = [
            SamplingParams(
                logprobs=a, prompt_logprobs=b, max_tokens=30, seed=i, top_k=20, repetition_penalty=1.0 + i % 2
            )
            for i, (a, b) in enumerate(asked)
        ]
        for _ in range(2):
            for seq, prompt in zip(run(llm, list(zip(PROMPTS, params, strict=True))), PROMPTS, strict=True):
                num_top, num_top_of_prompt = seq.params.logprobs, seq.params.prompt_logprobs
                logits = Reference(checkpoint("plain")).logits(seq.token_ids)
                if num_top_of_prompt is None:
                    assert seq.prompt_logprobs is None
                else:
                    assert seq.prompt_logprobs[0] is None and seq.num_cached_tokens == 0
                    of_prompt = seq.prompt_logprobs[1:]
                    assert_logprobs(of_prompt, logits[: len(prompt) - 1], prompt[1:], num_top_of_prompt)
                if num_top is None:
                    assert seq.logprobs == [] and seq.cumulative_logprob is None
                else:
                    assert_logprobs(seq.logprobs, logits[len(prompt) - 1 : -1], seq.output_token_ids, num_top)
                    total = sum(of_token.logprobs[0] for of_token in seq.logprobs)
                    assert seq.cumulative_logprob == pytest.approx(total)
        if "num_kvcache_blocks" in options:
            assert llm.stats().num_preemptions > 0

    def test_greedy_tokens_have_rank_1(self, device: str, make: Callable[..., LLM]) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=20, logprobs=1)
        for seq in run(make(device), [(prompt, params) for prompt in PROMPTS]):
            for token, of_token in zip(seq.output_token_ids, seq.logprobs, strict=True):
                assert of_token.token_ids == [token, token] and of_token.ranks == [1, 1]

    def test_prompts_take_part_in_the_prefix_cache_for_others(self, device: str, make: Callable[..., LLM]) -> None:
        llm = make(device)
        scored = run(llm, [(PROMPTS[3], SamplingParams(max_tokens=1, prompt_logprobs=0))])[0]
        plain, again = (run(llm, [(PROMPTS[3], SamplingParams(max_tokens=1, prompt_logprobs=p))])[0] for p in (None, 0))
        assert (scored.num_cached_tokens, plain.num_cached_tokens, again.num_cached_tokens) == (0, 64, 0)
        assert [p.ranks for p in again.prompt_logprobs[1:]] == [p.ranks for p in scored.prompt_logprobs[1:]]

    def test_logits_of_prompts_are_never_more_than_a_piece(
        self, device: str, make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logit_extras, "ROW_BATCH_BYTES", 4 * VOCAB_SIZE * 7)
        llm = make(device)
        sizes = watch_logits_of_prompts(llm.engine.runner.extras, monkeypatch)
        run(llm, [(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0)) for prompt in PROMPTS])
        assert max(sizes) == 7 and sum(sizes) == sum(len(prompt) - 1 for prompt in PROMPTS)


@pytest.mark.parametrize("device", DEVICES)
class TestReproducible:
    @pytest.mark.parametrize("options", SITUATIONS, ids=str)
    def test_a_seeded_request_answers_the_same_alone_and_in_any_crowd(
        self, options: dict[str, Any], device: str, make: Callable[..., LLM]
    ) -> None:
        """Among others, before and after, from the prefix cache, in chunks, preempted: the same tokens."""
        rng = random.Random(0)
        seeded = [
            (prompt, SamplingParams(**{**as_dict(EVERYTHING), "seed": i, "top_p": rng.choice([0.7, 1.0])}))
            for i, prompt in enumerate(PROMPTS)
        ]
        bad_words = ((3, 3), (6,))
        alone = make(device)
        expected = [run(alone, [request], bad_words)[0].token_ids for request in seeded]
        assert len({tuple(tokens[-5:]) for tokens in expected}) == len(expected)
        crowd = [(prompt, SamplingParams(max_tokens=40, top_k=3)) for prompt in random_prompts([30, 20, 60, 5], seed=9)]
        llm = make(device, **options)
        for _ in range(3):
            requests = seeded + crowd
            order = rng.sample(range(len(requests)), len(requests))
            seqs = run(llm, [requests[i] for i in order], bad_words)
            found = {i: seq.token_ids for i, seq in zip(order, seqs, strict=True)}
            assert [found[i] for i in range(len(seeded))] == expected
        stats = llm.stats()
        assert stats.prefix_hits > 0
        if "num_kvcache_blocks" in options:
            assert stats.num_preemptions > 0

    def test_requests_without_a_seed_differ(self, device: str, make: Callable[..., LLM]) -> None:
        llm = make(device)
        outputs = [run(llm, [(PROMPTS[0], SamplingParams(top_k=100))] * 4) for _ in range(2)]
        assert len({tuple(seq.token_ids) for seqs in outputs for seq in seqs}) == 8


def as_dict(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}


class TestRefusals:
    @pytest.mark.parametrize(
        ("asked", "bad_words", "message"),
        [
            ({"logit_bias": {VOCAB_SIZE: 1.0}}, (), "logit_bias has 211: ids must be in"),
            ({"allowed_token_ids": [1, VOCAB_SIZE]}, (), "allowed_token_ids has 211: ids must be in"),
            ({"stop_token_ids": [VOCAB_SIZE]}, (), "stop_token_ids has 211: ids must be in"),
            ({}, ((1, VOCAB_SIZE),), "bad_words has 211: ids must be in"),
            (
                {"allowed_token_ids": [3], "stop_token_ids": [3, 4], "min_tokens": 2},
                (),
                "leave none of allowed_token_ids",
            ),
            ({"allowed_token_ids": [3, 5]}, ((3,), (5,)), "leave none of allowed_token_ids"),
        ],
    )
    def test_what_does_not_fit_the_model_is_refused_and_the_engine_untouched(
        self, asked: dict[str, Any], bad_words: BadWords, message: str, make: Callable[..., LLM]
    ) -> None:
        llm = make()
        with pytest.raises(ValueError, match=message):
            llm.engine.make_sequence([1, 2], SamplingParams(**asked), bad_words=bad_words)
        assert not llm.engine.has_unfinished_requests


@pytest.mark.parametrize("device", DEVICES)
def test_log_likelihood_gives_the_logprobs_of_each_prompt(
    device: str, make: Callable[..., LLM], checkpoint: Callable[..., Path]
) -> None:
    llm = make(device, max_num_batched_tokens=33)
    longest = random_prompts([llm.engine.max_model_len - 1], seed=4)[0]
    for prompts in ([*PROMPTS, longest], PROMPTS[3]):
        scores = llm.log_likelihood(prompts, use_tqdm=False)
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        assert [score.token_ids for score in scores] == prompts
        for score, prompt in zip(scores, prompts, strict=True):
            expected = Reference(checkpoint("plain")).logits(prompt).double().log_softmax(1)
            expected = expected[torch.arange(len(prompt) - 1), prompt[1:]]
            assert score.logprobs[0] is None and len(score.logprobs) == len(prompt)
            torch.testing.assert_close(torch.tensor(score.logprobs[1:]).double(), expected, rtol=0, atol=TOLERANCE)
