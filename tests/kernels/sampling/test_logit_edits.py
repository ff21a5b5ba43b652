"""Promises of the logit edits, against a dense formula for one row at a time; on the CPU, and the same on a GPU."""

import math
import random

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.kernels.sampling.logit_edits import edit_logits
from nanovllm.kernels.sampling.reference import edited_logits
from nanovllm.step_plan import LogitEdits
from nanovllm.worker.logit_extras import row_edits

VOCAB_SIZE = 97
GARBAGE = 2**31 - 1  # what stands in a row past its tokens may be anything
Case = tuple[SamplingParams, tuple[tuple[int, ...], ...], list[int], list[int]]  # with bad words, prompt, output


def edited(cases: list[Case], logits: torch.Tensor, device: str, width: int = 64) -> torch.Tensor:
    """`edit_logits` of one entry for each case."""
    token_ids = torch.full((len(cases), 2 * width), GARBAGE, dtype=torch.int32)[:, ::2]
    for row, (_, _, prompt, output) in enumerate(cases):
        token_ids[row, : len(prompt + output)] = torch.tensor(prompt + output)
    edits = [
        row_edits(
            LogitEdits(
                prompt_len=len(prompt),
                repetition_penalty=params.repetition_penalty,
                frequency_penalty=params.frequency_penalty,
                presence_penalty=params.presence_penalty,
                logit_bias=params.logit_bias,
                allowed_token_ids=params.allowed_token_ids,
                bad_words=bad_words,
                held_back=tuple(params.stop_token_ids),
                min_len=len(prompt) + params.min_tokens,
            ),
            torch.device(device),
        )
        for params, bad_words, prompt, _ in cases
    ]
    seq_lens = torch.tensor([len(prompt + output) for _, _, prompt, output in cases], dtype=torch.int32)
    x = logits.to(device, copy=True)
    edit_logits(x, edits, token_ids.to(device), seq_lens.to(device), int(seq_lens.max()))
    return x.cpu()


def random_case(rng: random.Random) -> Case:
    tokens = rng.sample(range(VOCAB_SIZE), 12)  # few, so that they repeat
    prompt, output = ([rng.choice(tokens) for _ in range(rng.randrange(low, 31))] for low in (1, 0))
    asked = {}
    if rng.random() < 0.6:
        asked |= {"repetition_penalty": rng.choice([0.7, 1.3, 2.0])}
    if rng.random() < 0.6:
        asked |= {"frequency_penalty": rng.uniform(-2, 2), "presence_penalty": rng.uniform(-2, 2)}
    if rng.random() < 0.5:
        asked["logit_bias"] = {t: rng.uniform(-100, 100) for t in rng.sample(range(VOCAB_SIZE), 5)}
    if rng.random() < 0.4:
        asked["allowed_token_ids"] = rng.choices(range(VOCAB_SIZE), k=rng.randrange(1, 60))
    if rng.random() < 0.4:
        asked |= {"stop_token_ids": rng.sample(range(VOCAB_SIZE), 70), "min_tokens": rng.randrange(31)}
    words = []
    for _ in range(rng.choice([0, 0, 1, 4])):
        known = output[len(output) - rng.randrange(4) :] if rng.random() < 0.6 else rng.choices(tokens, k=2)
        words.append((*known, rng.choice(tokens)))
    return SamplingParams(**asked, max_tokens=None), tuple(words), prompt, output


def draw(seed: int, entries: int) -> torch.Tensor:
    return torch.randn(entries, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("seed", range(20))
def test_every_row_gets_what_it_asks_for_whatever_the_others_ask(seed: int, device: str) -> None:
    rng = random.Random(seed)
    cases = [random_case(rng) for _ in range(9)]
    logits = draw(seed, len(cases))
    ours = edited(cases, logits, device)
    for i, (params, bad_words, prompt, output) in enumerate(cases):
        expected = edited_logits(logits[i], params, prompt, output, bad_words, params.stop_token_ids)
        torch.testing.assert_close(ours[i].double(), expected, rtol=3e-7, atol=3e-5)  # a few roundings near 100
        assert torch.equal(ours[i : i + 1], edited(cases[i : i + 1], logits[i : i + 1], device)), "not as alone"


def test_what_is_not_asked_for_is_not_touched(device: str) -> None:
    logits = draw(0, 3)
    logits[0, :4] = torch.tensor([-0.0, 0.0, 1e30, -math.inf])
    plain = (SamplingParams(), (), [1, 2, 3], [3, 3])
    penalized = (SamplingParams(frequency_penalty=1.0), (), [7], [7, 8, 8])
    limited = (SamplingParams(allowed_token_ids=[5]), ((5, 6),), [7], [5])
    ours = edited([plain, penalized, limited], logits, device)
    assert torch.equal(ours[0].view(torch.int32), logits[0].view(torch.int32))
    changed = (ours[1] != logits[1]).nonzero().flatten().tolist()
    assert changed == [7, 8]
    assert ours[1, 8] == logits[1, 8] - 2.0 and ours[1, 7] == logits[1, 7] - 1.0
    assert ours[2, 5] == logits[2, 5] and (ours[2].isneginf().sum() == VOCAB_SIZE - 1)


def test_a_bad_word_is_banned_only_where_the_output_ends_with_its_start(device: str) -> None:
    words = ((4, 5, 6), (9, 6), (7,))

    def banned(prompt: list[int], output: list[int]) -> list[int]:
        logits = draw(1, 1)
        return (
            edited([(SamplingParams(), words, prompt, output)], logits, device)[0].isneginf().nonzero()[:, 0].tolist()
        )

    assert banned([4, 5], []) == [7], "the prompt is not the output"
    assert banned([4], [5]) == [7]
    assert banned([4], [4, 5]) == [6, 7]
    assert banned([1], [4, 5, 1]) == [7]
    assert banned([1], [9]) == [6, 7], "one of two words that end alike"
    assert banned([1], [5]) == [7], "a word longer than the output"


def test_a_masked_token_stays_masked_whatever_else_it_gets(device: str) -> None:
    params = SamplingParams(
        allowed_token_ids=[1, 2], logit_bias={3: 100.0}, repetition_penalty=0.5, frequency_penalty=-2.0
    )
    ours = edited([(params, ((2,),), [3, 2], [3, 3])], draw(2, 1), device)[0]
    assert ours.isfinite().nonzero().flatten().tolist() == [1]
