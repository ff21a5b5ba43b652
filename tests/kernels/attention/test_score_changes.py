"""Sliding windows, soft caps and sinks, alone and together: each version of attention against dense attention.

Blocks that lie wholly below a window hold NaN, and the block table's entries for them are stale.
"""

import random
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cache import (
    PagedCase,
    assert_within_rounding,
    dense_attention,
    forget_what_no_query_sees,
    make_case,
)

from nanovllm.kernels.attention import cpu_attention, kv_gather, paged_decode_kernel
from nanovllm.kernels.attention.contract import AttentionSpec, ChunkBatch, DecodeBatch, KVCache
from nanovllm.kernels.attention.cpu_attention import paged_decode_cpu, paged_prefill_cpu
from nanovllm.kernels.attention.cpu_rope_store import TokenPlaces
from nanovllm.kernels.attention.decode_splits import (
    SPLIT_MULTIPLE,
    DecodeSplits,
    split_contexts,
    split_contexts_reference,
    split_contexts_triton,
)
from nanovllm.kernels.attention.kv_gather import gather_blocks
from nanovllm.kernels.attention.paged_decode import paged_decode, paged_decode_reference
from nanovllm.kernels.attention.paged_decode_kernel import DecodeConfig, paged_decode_triton
from nanovllm.kernels.attention.paged_prefill import paged_prefill, paged_prefill_reference
from nanovllm.kernels.attention.paged_prefill_kernel import PrefillConfig, paged_prefill_triton

SPLIT = SPLIT_MULTIPLE
SCALE = 0.3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WINDOWS = [1, 16, 17, 40, 64, 130, 5000, None]
HEADS = [(1, 3), (1, 7), (2, 3), (2, 1), (1, 16)]  # kv heads, query heads of each
HEAD_DIMS = [64, 96, 24, 256, 80]
BLOCK_SIZES = [16, 48, 64, 24]
SMALL_TILES = PrefillConfig(rows=32, tile=16, num_warps=4, num_stages=2, pack=True)


@dataclass
class Work:
    """Random queries over a paged cache, the newest of each sequence, and what changes their scores."""

    case: PagedCase
    q: torch.Tensor  # [queries, heads, head_dim]
    starts: list[int]  # where each sequence's queries begin, and the end
    window: int | None
    soft_cap: float | None
    sinks: torch.Tensor | None
    out: torch.Tensor

    @classmethod
    def draw(
        cls,
        seed: int,
        device: str,
        lengths: list[int],
        queries: list[int],
        dtype: torch.dtype | None = None,
        **changes: float | None,
    ) -> "Work":
        """Each seed takes the next of every list above; `changes` replace `window`, `soft_cap` and the sinks' size."""
        (num_kv_heads, group), dtype = HEADS[seed % 5], dtype or DTYPES[seed % 3]
        head_dim, block_size = HEAD_DIMS[(seed + seed // 5) % 5], BLOCK_SIZES[(seed + seed // 4) % 4]
        drawn = {
            "window": WINDOWS[seed % 8],
            "soft_cap": (None, 2.0, 50.0)[seed // 2 % 3],
            "sinks": (None, 2.0)[seed % 2],
        }
        drawn |= changes
        case = make_case(2 * seed, lengths, num_kv_heads, head_dim, block_size, dtype, device)
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(sum(queries), num_kv_heads * group, head_dim, generator=generator).to(dtype).to(device)
        sinks = None
        if drawn["sinks"] is not None:
            sinks = (torch.randn(num_kv_heads * group, generator=generator) * drawn["sinks"]).to(dtype).to(device)
        starts = list(accumulate(queries, initial=0))
        forget_what_no_query_sees(case, queries, drawn["window"])
        return cls(case, q, starts, drawn["window"], drawn["soft_cap"], sinks, torch.full_like(q, float("nan")))

    @property
    def softmax_changes(self) -> dict:
        return {"soft_cap": self.soft_cap, "sinks": self.sinks}

    @property
    def cache(self) -> tuple[torch.Tensor, ...]:
        return self.case.k_cache, self.case.v_cache, self.case.block_table, self.case.rows

    def decode(self, function, *, splits: DecodeSplits | None = None, **options) -> torch.Tensor:
        """With each sequence's newest key and value to be stored, over NaN."""
        case, changes = self.case, self.softmax_changes
        num_heads, num_kv_heads, block_size = self.q.shape[1], case.k_cache.shape[1], case.k_cache.shape[2]
        qkv = F.pad(self.q, (0, 0, 0, 2 * num_kv_heads))
        for i, length in enumerate(case.seq_lens.tolist()):
            if length > 0:
                qkv[i, num_heads:] = torch.cat([case.keys[i][-1], case.values[i][-1]])
                block = case.block_table[case.rows[i], (length - 1) // block_size]
                case.k_cache[block, :, (length - 1) % block_size] = float("nan")
                case.v_cache[block, :, (length - 1) % block_size] = float("nan")
        if splits is None:
            changes["window"], last = self.window, ()
        else:
            last = (splits,)
            torch.zeros(1, device=self.q.device)  # a launch between this one and the splits'
        no_rope = torch.empty(9999, 0, device=self.q.device)
        own = (qkv.flatten(1), None, None, 0.0, no_rope)
        function(*own, *self.cache, case.seq_lens, *last, SCALE, self.out, **changes, **options)
        return self.out

    def splits(self, target_splits: int, min_split: int = SPLIT) -> DecodeSplits:
        heads = (self.q.shape[1], self.case.k_cache.shape[1], self.q.shape[2])
        splits = DecodeSplits.allocate(
            len(self.q), *heads, self.q.device, target_splits=target_splits, min_split=min_split
        )
        splits.partial_out.fill_(float("nan"))
        splits.partial_lse.fill_(float("nan"))
        return split_contexts_triton(self.case.seq_lens, heads[1], splits, self.window)

    def prefill(self, function, **options) -> torch.Tensor:
        starts = torch.tensor(self.starts, dtype=torch.int32, device=self.q.device)
        where = (*self.cache, starts, self.case.seq_lens)
        function(self.q, *where, SCALE, self.out, window=self.window, **self.softmax_changes, **options)
        return self.out

    def assert_out_is_dense_attention(self) -> None:
        for i, (keys, values) in enumerate(zip(self.case.keys, self.case.values, strict=True)):
            part = slice(self.starts[i], self.starts[i + 1])
            if len(keys) == 0:
                assert bool((self.out[part] == 0).all()), "a padding entry must get zeros"
                continue
            q, changes = self.q[part], (self.window, self.soft_cap, self.sinks)
            expected, bound = dense_attention(q, keys, values, SCALE, *changes)
            score_error = (self.soft_cap or 0) * 2.0**-20  # a few roundings of the largest score
            if self.soft_cap is None:
                score_error = self._largest_score(q, keys) * 2.0**-23
            assert_within_rounding(self.out[part], expected, bound, score_error)

    def assert_out_is_nearly_dense_attention(self) -> None:
        """On a CPU scores are rounded too, and an eps of a score changes its weight by as much."""
        for i, (keys, values) in enumerate(zip(self.case.keys, self.case.values, strict=True)):
            part = slice(self.starts[i], self.starts[i + 1])
            q = self.q[part]
            expected, bound = dense_attention(q, keys, values, SCALE, self.window, self.soft_cap, self.sinks)
            score_error = torch.finfo(q.dtype).eps * (1 + self._largest_score(q, keys))
            score_error += (self.soft_cap or 0) * 2.0**-20
            assert_within_rounding(self.out[part], expected, bound, score_error)

    @staticmethod
    def _largest_score(q: torch.Tensor, keys: torch.Tensor) -> float:
        """More than any |q·k| there is: what a score's rounding, as a sum, is in proportion to."""
        return (SCALE * q.cpu().float().norm(dim=-1).max() * keys.float().norm(dim=-1).max()).item()


def draw_lengths(seed: int, most: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice([1, SPLIT, SPLIT + 1, rng.randint(2, most)]), rng.randint(SPLIT + 1, most)]


def draw_queries(seed: int, lengths: list[int]) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice([1, length, rng.randint(1, length)]) for length in lengths]


# ---- the references --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_references_equal_dense_attention(seed: int) -> None:
    lengths = [*draw_lengths(seed, 3 * SPLIT), 0, 5]
    work = Work.draw(seed, "cpu", lengths, [1] * 4)
    work.decode(paged_decode_reference)
    work.assert_out_is_dense_attention()
    queries = draw_queries(seed, lengths[:2])
    work = Work.draw(seed, "cpu", lengths[:2], queries)
    work.prefill(paged_prefill_reference)
    work.assert_out_is_dense_attention()


# ---- the kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40 if torch.cuda.is_available() else 24))
def test_decode_kernel_equals_dense_attention(seed: int, device: str) -> None:
    lengths = [*draw_lengths(seed, 3 * SPLIT), 0]
    work = Work.draw(seed, device, lengths, [1] * 3)
    splits = work.splits(target_splits=seed % 4 + 1)
    work.decode(paged_decode_triton, splits=splits)
    work.assert_out_is_dense_attention()
    assert not splits.arrivals[: len(lengths)].any(), "the next layer must find the arrival counts at zero"


@pytest.mark.parametrize("window", [1, 16, 17, 63, 130, 200])
def test_decode_kernel_takes_tiles_much_smaller_than_a_split(window: int, device: str) -> None:
    """Below the window a split may begin with whole tiles that the query does not see."""
    work = Work.draw(2, device, [5, 130, 191, 0], [1] * 4, window=window)
    config = DecodeConfig(tile=16, num_warps=2, num_stages=2)
    work.decode(paged_decode_triton, splits=work.splits(target_splits=2), config=config)
    work.assert_out_is_dense_attention()


def test_several_splits_of_a_window_are_merged_with_one_sink(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_decode_kernel, "MERGE_ELEMENTS", 1)  # two splits at a time
    work = Work.draw(1, device, [7 * SPLIT - 3], [1], window=5 * SPLIT + 7, sinks=3.0)
    splits = work.splits(target_splits=7)
    assert splits.table[0, 5] == 6
    work.decode(paged_decode_triton, splits=splits)
    work.assert_out_is_dense_attention()


@pytest.mark.parametrize("seed", range(40 if torch.cuda.is_available() else 24))
def test_prefill_kernel_equals_dense_attention(seed: int, device: str) -> None:
    lengths = draw_lengths(seed, 2 * SPLIT)
    work = Work.draw(seed, device, lengths, draw_queries(seed, lengths))
    work.prefill(paged_prefill_triton, config=None if seed % 3 else SMALL_TILES)
    work.assert_out_is_dense_attention()


def test_chunks_one_after_the_other_equal_the_whole_prompt(device: str) -> None:
    """Before each chunk the blocks are given back that it does not see."""
    whole = Work.draw(0, device, [90], [90], window=21, sinks=1.0, soft_cap=5.0)
    whole.prefill(paged_prefill_triton, config=SMALL_TILES)
    whole.assert_out_is_dense_attention()
    work = Work.draw(0, device, [90], [90], window=21, sinks=1.0, soft_cap=5.0)
    expected, q = whole.out, work.q
    for begin, end in ((0, 37), (37, 38), (38, 90)):
        work.case.seq_lens.fill_(end)
        forget_what_no_query_sees(work.case, [end - begin], 21)
        work.q, work.starts, work.out = q[begin:end], [0, end - begin], torch.empty_like(q[begin:end])
        work.prefill(paged_prefill_triton, config=SMALL_TILES)
        torch.testing.assert_close(work.out, expected[begin:end], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("size", [-1e4, 1e4, float("-inf")])
def test_sinks_far_from_all_scores(size: float, device: str) -> None:
    """Far below they change nothing; far above they leave zeros, and no NaN. Padding gets zeros whatever they are."""
    lengths = [SPLIT + 9, 3, 0]
    for target_splits in (1, 4):
        work = Work.draw(1, device, lengths, [1, 1, 1], sinks=1.0, window=None)
        work.sinks.fill_(size)
        work.decode(paged_decode_triton, splits=work.splits(target_splits))
        work.assert_out_is_dense_attention()
    work = Work.draw(1, device, lengths[:2], [20, 3], sinks=1.0, window=7)
    work.sinks.fill_(size)
    work.prefill(paged_prefill_triton)
    work.assert_out_is_dense_attention()


def test_scores_far_above_a_cap_become_the_cap(device: str) -> None:
    work = Work.draw(0, device, [SPLIT + 9, 30], [1, 1], soft_cap=3.0, dtype=torch.float32)
    work.q *= 1e6
    work.decode(paged_decode_triton, splits=work.splits(2))
    work.assert_out_is_dense_attention()
    work = Work.draw(0, device, [SPLIT + 9, 30], [20, 3], soft_cap=3.0, dtype=torch.float32)
    work.q *= 1e6
    work.prefill(paged_prefill_triton)
    work.assert_out_is_dense_attention()


# ---- a CPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_decode_on_a_cpu_equals_dense_attention(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    dtype = DTYPES[seed % 2]
    lengths = [*draw_lengths(seed, 4 * SPLIT), 7, 7, *(rng.randint(1, 300) for _ in range(seed % 5))]
    work = Work.draw(seed, "cpu", lengths, [1] * len(lengths), dtype=dtype)
    case = work.case
    block_bytes = 2 * case.k_cache[0].numel() * dtype.itemsize
    monkeypatch.setattr(kv_gather, "GROUP_BYTES", rng.choice([3, 8, 50]) * block_bytes)
    make_past_the_end_finite(work)
    gather = None
    for _ in range(2):  # the second time over the first one's workspace
        gather = gather_blocks(case.seq_lens, case.rows, case.block_table, case.k_cache, gather, work.window)
        work.out.fill_(float("nan"))
        paged_decode_cpu(work.q, case.k_cache, case.v_cache, gather, SCALE, work.out, **work.softmax_changes)
        work.assert_out_is_nearly_dense_attention()


@pytest.mark.parametrize("seed", range(60))
def test_prefill_on_a_cpu_equals_dense_attention(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "QUERY_TILE", 16)
    lengths = draw_lengths(seed, 3 * SPLIT)
    work = Work.draw(seed, "cpu", lengths, draw_queries(seed, lengths), dtype=DTYPES[seed % 2])
    work.prefill(paged_prefill_cpu)
    work.assert_out_is_nearly_dense_attention()


def make_past_the_end_finite(work: Work) -> None:
    """As a cache on a CPU is, which begins as zeros."""
    block_size = work.case.k_cache.shape[2]
    for row, length in zip(work.case.rows.tolist(), work.case.seq_lens.tolist(), strict=True):
        if length % block_size:
            last = work.case.block_table[row, length // block_size]
            for cache in (work.case.k_cache, work.case.v_cache):
                cache[last, :, length % block_size :] = 1000.0


def test_a_sequence_in_a_window_reads_only_the_blocks_that_the_window_touches() -> None:
    table = torch.arange(40, dtype=torch.int32).view(2, 20)
    cache = torch.zeros(40, 1, 16, 8)
    gather = gather_blocks(torch.tensor([100, 33]), torch.tensor([0, 1]), table, cache, window=20)
    read = sorted(block for group in gather.groups for block in group.index.tolist())
    assert set(read) == {5, 6, 20, 21, 22}  # tokens 80 to 99, and 13 to 32
    assert gather.window == 20


# ---- splits ----------------------------------------------------------------------------------------------------------


def empty_splits(max_seqs: int, target_splits: int, min_split: int, device: str = "cpu") -> DecodeSplits:
    return DecodeSplits.allocate(max_seqs, 2, 1, 8, device, target_splits=target_splits, min_split=min_split)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 5000), st.integers(0, 200_000)), min_size=1),
    window=st.one_of(st.integers(1, 200), st.integers(1, 300_000)),
    target_splits=st.integers(1, 600),
    min_split=st.integers(1, 8).map(lambda n: n * SPLIT),
)
def test_splits_cover_each_window_and_always_fit(
    lengths: list[int], window: int, target_splits: int, min_split: int
) -> None:
    splits = split_contexts(
        torch.tensor(lengths, dtype=torch.int32), 1, empty_splits(len(lengths), target_splits, min_split), window
    )
    entries = [entry for entry in splits.table[: len(lengths) + target_splits].tolist() if entry[0] >= 0]
    assert sorted(entry[3] for entry in entries) == list(range(len(entries)))
    whole = set()
    for seq, length in enumerate(lengths):
        own = sorted(entry for entry in entries if entry[0] == seq)
        assert own[0][1] == max(0, length - window) // SPLIT * SPLIT
        assert [entry[1] for entry in own[1:]] == [entry[2] for entry in own[:-1]]
        assert own[-1][2] == length
        assert all(entry[4] == own[0][4] and entry[5] == len(own) for entry in own)
        whole |= {entry[2] - entry[1] for entry in own[:-1]}
    assert len(whole) <= 1 and all(size % SPLIT == 0 and size >= min_split for size in whole)
    assert splits.window == window


@pytest.mark.parametrize("window", [1, 64, 100, 20_000])
def test_split_kernel_equals_its_reference(window: int, device: str) -> None:
    rng = random.Random(window)
    lengths = [0, 1, window, window + 1, *(rng.randint(0, 40_000) for _ in range(9))]
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    expected, actual = (empty_splits(20, 17, 2 * SPLIT, device) for _ in range(2))
    split_contexts_reference(seq_lens, 1, expected, window)
    split_contexts_triton(seq_lens, 1, actual, window)
    assert torch.equal(actual.table, expected.table)


# ---- the front -------------------------------------------------------------------------------------------------------


def test_decodes_that_were_planned_for_another_window_are_refused() -> None:
    spec = AttentionSpec(1, 1, 8, 1.0, window=4)
    cache = KVCache(torch.zeros(3, 1, 16, 8), torch.zeros(3, 1, 16, 8))
    lens, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    gather = gather_blocks(lens, lens - 1, table, cache.k, window=5)
    splits = split_contexts(lens, 1, DecodeSplits.allocate(1, 1, 1, 8, "cpu"))
    for plan in ({"gather": gather}, {"splits": splits}):
        with pytest.raises(ValueError, match=r"window=(5|None), the layer has 4"):
            paged_decode(
                torch.zeros(1, 24), spec, cache, DecodeBatch(lens - 1, lens, table, **plan), torch.zeros(1, 1, 8)
            )


def spec_of(work: Work) -> AttentionSpec:
    heads = (work.q.shape[1], work.case.k_cache.shape[1], work.q.shape[2])
    sinks = SimpleNamespace(weight=work.sinks)
    return AttentionSpec(*heads, SCALE, window=work.window, soft_cap=work.soft_cap, sinks=sinks)


@pytest.mark.parametrize("on_cpu_path", [False, True], ids=["kernel", "cpu"])
def test_decode_hands_on_what_the_layer_has(on_cpu_path: bool, device: str) -> None:
    device = "cpu" if on_cpu_path else device
    work = Work.draw(1, device, [100, 30], [1, 1], window=17, soft_cap=4.0, sinks=1.0)
    spec, case, splits = spec_of(work), work.case, None if on_cpu_path else work.splits(target_splits=2)

    def front(qkv, *rest, **changes) -> None:
        batch = DecodeBatch(case.rows, case.seq_lens, case.block_table, splits)
        if on_cpu_path:
            make_past_the_end_finite(work)
            positions, block_size = case.seq_lens - 1, case.k_cache.shape[2]
            blocks = case.block_table[case.rows, positions // block_size].long()
            batch.places = TokenPlaces.of(positions, blocks * block_size + positions % block_size, block_size)
            batch.gather = gather_blocks(case.seq_lens, case.rows, case.block_table, case.k_cache, window=17)
        paged_decode(qkv, spec, KVCache(case.k_cache, case.v_cache), batch, work.out)

    work.decode(front)
    work.assert_out_is_nearly_dense_attention()


def test_prefill_hands_on_what_the_layer_has(device: str) -> None:
    work = Work.draw(1, device, [100, 30], [20, 3], window=17, soft_cap=4.0, sinks=1.0)
    spec = spec_of(work)

    def front(q, k_cache, v_cache, table, rows, starts, lens, *rest, **changes) -> None:
        batch = ChunkBatch(starts, starts, rows, starts, lens, table)  # it reads no positions and slots
        paged_prefill(q, spec, KVCache(k_cache, v_cache), batch, work.out)

    work.prefill(front)
    work.assert_out_is_nearly_dense_attention()
