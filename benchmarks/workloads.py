"""Draws a benchmark's requests, lengths and ids, from `random.Random(seed)`: the same seed gives the same tokens.

The headline equals upstream nano-vLLM's (`bench.py` in github.com/GeeeekExplorer/nano-vllm), draw for draw.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields

MAX_TOKEN_ID = 10_000  # upstream's; a smaller vocabulary takes ids modulo its size, which changes no length


@dataclass(slots=True, frozen=True, kw_only=True)
class LengthMix:
    """The number of requests and the ranges of their lengths: uniform, both ends included."""

    num_seqs: int
    min_input: int
    max_input: int
    min_output: int
    max_output: int
    lengths_first: bool = False  # draw all lengths, then all ids; otherwise each prompt's length, then its ids


PRESETS = {
    "headline": LengthMix(num_seqs=256, min_input=100, max_input=1024, min_output=100, max_output=1024),
    "cpu-a": LengthMix(num_seqs=16, min_input=32, max_input=256, min_output=32, max_output=128, lengths_first=True),
    "cpu-b": LengthMix(num_seqs=1, min_input=64, max_input=64, min_output=128, max_output=128),
}


def few_streams(num_streams: int) -> LengthMix:
    """The latency workload: `num_streams` requests at once, 128 tokens in and 512 out."""
    return LengthMix(num_seqs=num_streams, min_input=128, max_input=128, min_output=512, max_output=512)


def shrunk(mix: LengthMix, by: int) -> LengthMix:
    """The mix with every number of requests and tokens divided by `by`, but at least 1."""
    sizes = {f.name: max(1, getattr(mix, f.name) // by) for f in fields(mix) if f.type is int}
    return LengthMix(**sizes, lengths_first=mix.lengths_first)


@dataclass(slots=True, frozen=True)
class Workload:
    """Prompts as token ids, and how many tokens to generate for each. Engines ignore EOS."""

    name: str
    prompts: list[list[int]]
    max_tokens: list[int]
    temperature: float

    @property
    def input_lens(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    @property
    def num_input_tokens(self) -> int:
        return sum(self.input_lens)

    @property
    def num_output_tokens(self) -> int:
        return sum(self.max_tokens)


def draw(name: str, mix: LengthMix, vocab_size: int, temperature: float = 0.6, seed: int = 0) -> Workload:
    """Draw a workload. The same arguments give the same tokens on any machine.

    Raises:
        ValueError: the mix has no requests, or an empty range of lengths.
    """
    _check(mix)
    rng = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [rng.randint(0, MAX_TOKEN_ID) % vocab_size for _ in range(length)]

    def lens(low: int, high: int) -> Iterator[int]:  # lazy: the order of the draws is part of the workload
        return (rng.randint(low, high) for _ in range(mix.num_seqs))

    if mix.lengths_first:
        input_lens = list(lens(mix.min_input, mix.max_input))
        output_lens = list(lens(mix.min_output, mix.max_output))
        return Workload(name, [ids(length) for length in input_lens], output_lens, temperature)
    prompts = [ids(length) for length in lens(mix.min_input, mix.max_input)]
    return Workload(name, prompts, list(lens(mix.min_output, mix.max_output)), temperature)


def _check(mix: LengthMix) -> None:
    if mix.num_seqs < 1:
        raise ValueError(f"num_seqs={mix.num_seqs} must be at least 1")
    for what in ("input", "output"):
        low, high = getattr(mix, f"min_{what}"), getattr(mix, f"max_{what}")
        if not 1 <= low <= high:
            raise ValueError(f"min_{what}={low}, max_{what}={high}: must be 1 <= min_{what} <= max_{what}")
