"""Promises of prefill attention, kept by the kernel (interpreted on a CPU) and the reference."""

import random
from itertools import accumulate

import pytest
import torch
from paged_cache import PagedCase, assert_within_rounding, dense_attention, make_case

from nanovllm.kernels.attention import paged_prefill_kernel as kernels
from nanovllm.kernels.attention.paged_prefill import paged_prefill_reference

HEAD_DIMS = [24, 48, 64, 80, 96, 128, 256]
GROUPS = [1, 2, 3, 5, 7, 8]
BLOCK_SIZES = [16, 48, 64, 256]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL_TILES = kernels.PrefillConfig(rows=32, tile=16, num_warps=4, num_stages=2, pack=True)


class Chunks:
    """The newest `chunks[i]` tokens of each sequence as queries, with other tokens before and after them in q."""

    def __init__(self, case: PagedCase, chunks: list[int], group: int, seed: int, before: int = 3) -> None:
        num_heads, head_dim = case.k_cache.shape[1] * group, case.k_cache.shape[3]
        generator = torch.Generator().manual_seed(seed)
        wide = torch.randn(before + sum(chunks) + 2, num_heads + 2, head_dim, generator=generator)
        device = case.k_cache.device
        self.case = case
        self.starts = list(accumulate(chunks, initial=before))
        self.q = wide.to(case.k_cache.dtype).to(device)[:, :num_heads]
        self.query_start = torch.tensor(self.starts, dtype=torch.int32, device=device)
        self.out = torch.full(self.q.shape, float("nan"), dtype=self.q.dtype, device=device)

    def arguments(self, scale: float) -> tuple:
        case = self.case
        cache = (case.k_cache, case.v_cache, case.block_table)
        return (self.q, *cache, case.rows, self.query_start, case.seq_lens, scale, self.out)

    def assert_out_is_dense_attention(self, scale: float) -> None:
        for i, (keys, values) in enumerate(zip(self.case.keys, self.case.values, strict=True)):
            span = slice(self.starts[i], self.starts[i + 1])
            expected, bound = dense_attention(self.q[span], keys, values, scale)
            assert_within_rounding(self.out[span], expected, bound)
        assert bool(self.out[: self.starts[0]].isnan().all()), "tokens before the slice must not be written"
        assert bool(self.out[self.starts[-1] :].isnan().all()), "tokens after the slice must not be written"


def draw_chunks(rng: random.Random, block_size: int, num_seqs: int, most: int) -> tuple[list[int], list[int]]:
    """Lengths and, of each, the newest tokens to compute: all, one, or any number."""
    border = [length for length in (1, 16, 17, block_size, block_size + 1, most) if length <= most]
    lengths = [rng.choice([*border, rng.randint(1, most), rng.randint(1, most)]) for _ in range(num_seqs)]
    return lengths, [rng.choice([length, 1, rng.randint(1, length)]) for length in lengths]


# Each seed takes the next of every list, whose lengths make the pairings differ. The interpreter is slow: fewer there.
@pytest.mark.parametrize("seed", range(42 if torch.cuda.is_available() else 14))
def test_kernel_equals_dense_attention(seed: int, device: str) -> None:
    rng = random.Random(seed)
    head_dim, block_size = HEAD_DIMS[seed % 7], BLOCK_SIZES[seed // 2 % 4]
    num_seqs, most = (rng.randint(1, 3), 100) if device == "cpu" else (rng.randint(1, 8), 400)
    lengths, chunks = draw_chunks(rng, block_size, num_seqs, most)
    case = make_case(seed, lengths, rng.randint(1, 2), head_dim, block_size, DTYPES[seed % 3], device)
    work = Chunks(case, chunks, GROUPS[seed % 6], seed)
    kernels.paged_prefill_triton(*work.arguments(head_dim**-0.5))
    work.assert_out_is_dense_attention(head_dim**-0.5)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_many_tiles_and_the_tightest_grid(group: int, pack: bool, device: str) -> None:
    chunks = [37, 1, 33, 16]
    case = make_case(group, [37, 50, 64, 90], 1, 48, 48, torch.float32, device)
    work = Chunks(case, chunks, group, seed=group, before=5)
    config = kernels.PrefillConfig(**{**{f: getattr(SMALL_TILES, f) for f in SMALL_TILES.__slots__}, "pack": pack})
    kernels.paged_prefill_triton(*work.arguments(0.2), num_tokens=sum(chunks), config=config)
    work.assert_out_is_dense_attention(0.2)


def test_more_sequences_than_one_look_at_query_start(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SEQS_AT_ONCE", 4)
    chunks = [1 + i % 2 for i in range(11)]
    case = make_case(1, chunks, 1, 16, 16, torch.float32, device)
    work = Chunks(case, chunks, 1, seed=1, before=0)
    kernels.paged_prefill_triton(*work.arguments(0.3))
    work.assert_out_is_dense_attention(0.3)


@pytest.mark.parametrize("function", [kernels.paged_prefill_triton, paged_prefill_reference])
def test_padding_entries_are_left_alone(function, device: str) -> None:
    """Chunks, then entries of no sequence: some without tokens, the last with all that the step has left."""
    case = make_case(5, [37, 20], 2, 64, 16, torch.float32, device)
    work = Chunks(case, [37, 5], 2, seed=5, before=0)
    end = work.starts[-1]
    work.q = torch.cat([work.q, work.q[:30]])
    work.out = torch.full(work.q.shape, float("nan"), device=device)
    pad = torch.tensor([-1, -1, -1], dtype=torch.int32, device=device)
    case.rows, case.seq_lens = torch.cat([case.rows, pad]), torch.cat([case.seq_lens, pad * 0])
    ends = torch.tensor([end, end, len(work.q)], dtype=torch.int32, device=device)
    work.query_start = torch.cat([work.query_start, ends])
    function(*work.arguments(0.2))
    work.assert_out_is_dense_attention(0.2)


@pytest.mark.parametrize("seed", range(12))
def test_reference_equals_dense_attention(seed: int) -> None:
    rng = random.Random(seed)
    lengths, chunks = draw_chunks(rng, BLOCK_SIZES[seed % 4], 3, 90)
    case = make_case(seed, lengths, 2, HEAD_DIMS[seed % 7], BLOCK_SIZES[seed % 4], DTYPES[seed % 3], "cpu")
    work = Chunks(case, chunks, GROUPS[seed % 6], seed)
    paged_prefill_reference(*work.arguments(0.2))
    work.assert_out_is_dense_attention(0.2)


def test_chunks_one_after_the_other_equal_the_whole_prompt(device: str) -> None:
    case = make_case(2, [45], 2, 64, 16, torch.float32, device)
    whole = Chunks(case, [45], 3, seed=2, before=0)
    kernels.paged_prefill_triton(*whole.arguments(0.125), config=SMALL_TILES)
    for begin, end in ((0, 20), (20, 21), (21, 45)):
        case.seq_lens.fill_(end)
        whole.query_start.copy_(torch.tensor([begin, end]))
        before = whole.out.clone()
        whole.out.fill_(float("nan"))
        kernels.paged_prefill_triton(*whole.arguments(0.125), config=SMALL_TILES)
        torch.testing.assert_close(whole.out[begin:end], before[begin:end], rtol=1e-5, atol=1e-6)
        whole.out.copy_(before)


def test_no_sequences_is_no_work(device: str) -> None:
    case = make_case(0, [4], 1, 16, 16, torch.float32, device)
    work = Chunks(case, [4], 1, seed=0)
    case.rows, case.seq_lens, work.query_start = case.rows[:0], case.seq_lens[:0], work.query_start[:1]
    kernels.paged_prefill_triton(*work.arguments(1.0))
    assert bool(work.out.isnan().all())
