"""Promises of the splits and of decode attention, kept by the kernel (interpreted on a CPU) and the reference."""

import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import tiles_of_cache
from paged_cache import PagedCase, assert_within_rounding, dense_attention, make_case

from nanovllm.kernels.attention import paged_decode_kernel
from nanovllm.kernels.attention.contract import AttentionSpec, DecodeBatch, KVCache
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
from nanovllm.kernels.attention.paged_decode_kernel import paged_decode_triton

HEAD_DIMS = [24, 48, 64, 80, 96, 128, 256]
GROUPS = [1, 2, 3, 5, 7, 8]
BLOCK_SIZES = [16, 48, 64, 256]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SPLIT = SPLIT_MULTIPLE


def draw_lengths(rng: random.Random, block_size: int, most: int) -> list[int]:
    """A few lengths, many of them at the borders of blocks, tiles and splits; some are padding."""
    border = [0, 1, block_size, block_size + 1, SPLIT, SPLIT + 1, 2 * SPLIT, 3 * SPLIT - 1]
    lengths = [rng.choice([*border, rng.randint(1, 3 * SPLIT)]) for _ in range(rng.randint(1, most))]
    return [*lengths, rng.randint(SPLIT + 1, 3 * SPLIT)]


def decode_inputs(case: PagedCase, group: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The newest tokens' heads as a slice of a wider projection, and a poisoned out.

    Random queries; each sequence's newest key and value, whose slots in the cache are poisoned: they must be stored.
    """
    _, num_kv_heads, block_size, head_dim = case.k_cache.shape
    num_heads = num_kv_heads * group
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(len(case.keys), num_heads + 2 * num_kv_heads + 2, head_dim, generator=generator)
    wide = wide.to(case.k_cache.dtype)
    for i, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        if len(keys) > 0:
            wide[i, num_heads : num_heads + 2 * num_kv_heads] = torch.cat([keys[-1], values[-1]])
            offset, block = (len(keys) - 1) % block_size, case.block_table[case.rows[i], (len(keys) - 1) // block_size]
            case.k_cache[block, :, offset] = case.v_cache[block, :, offset] = float("nan")
    out = torch.full((len(wide), num_heads, head_dim), float("nan"), dtype=wide.dtype, device=case.k_cache.device)
    return wide.to(out.device).flatten(1)[:, : (num_heads + 2 * num_kv_heads) * head_dim], out


def make_splits(case: PagedCase, group: int, target_splits: int, min_split: int = SPLIT) -> DecodeSplits:
    num_kv_heads, head_dim = case.k_cache.shape[1], case.k_cache.shape[3]
    splits = DecodeSplits.allocate(
        len(case.keys) + 3,
        num_kv_heads * group,
        num_kv_heads,
        head_dim,
        case.k_cache.device,
        target_splits=target_splits,
        min_split=min_split,
    )
    splits.partial_out.fill_(float("nan"))
    splits.partial_lse.fill_(float("nan"))
    splits.arrivals.fill_(12345)
    return splits


def assert_decode_is_dense_attention(case: PagedCase, qkv: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    for i, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        if keys.shape[0] == 0:
            assert bool((out[i] == 0).all()), "a padding entry must get zeros"
        else:
            q = qkv[i : i + 1, : out[i].numel()].view(1, *out[i].shape)
            expected, bound = dense_attention(q, keys, values, scale)
            assert_within_rounding(out[i : i + 1], expected, bound)


def run(case: PagedCase, qkv: torch.Tensor, splits: DecodeSplits, scale: float, out: torch.Tensor) -> None:
    """Decode without norms, and without rotating any dimension."""
    torch.zeros(1, device=qkv.device)  # a launch between this one and the splits', which `split_contexts` asks for
    cache = (case.k_cache, case.v_cache, case.block_table, case.rows, case.seq_lens)
    paged_decode_triton(qkv, None, None, 0.0, torch.empty(1, 0, device=qkv.device), *cache, splits, scale, out)


# Each seed takes the next of every list, whose lengths make the pairings differ. The interpreter is slow: fewer there.
@pytest.mark.parametrize("seed", range(42 if torch.cuda.is_available() else 14))
def test_kernel_equals_dense_attention(seed: int, device: str) -> None:
    rng = random.Random(seed)
    group, block_size = GROUPS[seed % 6], BLOCK_SIZES[seed // 2 % 4]
    lengths = draw_lengths(rng, block_size, most=2 if device == "cpu" else 12)
    case = make_case(seed, lengths, rng.randint(1, 2), HEAD_DIMS[seed % 7], block_size, DTYPES[seed % 3], device)
    qkv, out = decode_inputs(case, group, seed)
    smallest_splits = sum(-(-length // SPLIT) for length in lengths)
    splits = make_splits(case, group, target_splits=smallest_splits)
    splits = split_contexts_triton(case.seq_lens, case.k_cache.shape[1], splits)
    scale = HEAD_DIMS[seed % 7] ** -0.5
    run(case, qkv, splits, scale, out)
    assert_decode_is_dense_attention(case, qkv, out, scale)
    assert not splits.arrivals[: len(lengths)].any(), "the next layer must find the arrival counts at zero"


@pytest.mark.parametrize("seed", range(12))
def test_reference_equals_dense_attention(seed: int) -> None:
    rng = random.Random(seed)
    block_size, dtype = BLOCK_SIZES[seed % 4], DTYPES[seed % 3]
    case = make_case(seed, draw_lengths(rng, block_size, 4), 2, HEAD_DIMS[seed % 7], block_size, dtype, "cpu")
    qkv, out = decode_inputs(case, GROUPS[seed % 6], seed)
    cache = (case.k_cache, case.v_cache, case.block_table, case.rows, case.seq_lens)
    paged_decode_reference(qkv, None, None, 0.0, torch.empty(9999, 0), *cache, 0.2, out)
    assert_decode_is_dense_attention(case, qkv, out, 0.2)


# head_dim, how much of it is rotated, heads a kv head, whether heads are normalized
HEADS = [
    (128, 128, 2, True),
    (64, 64, 1, True),
    (80, 40, 3, True),
    (128, 128, 4, False),
    (24, 12, 15, True),
    (96, 32, 5, False),
    (96, 72, 3, True),
    (64, 48, 8, False),
    (256, 256, 2, True),
]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("on_cpu_path", [False, True], ids=["kernel", "cpu"])
def test_newest_token_is_normalized_rotated_stored_and_attended_to(
    heads: tuple[int, int, int, bool], dtype: torch.dtype, on_cpu_path: bool, device: str
) -> None:
    head_dim, rotary_dim, group, has_norm = heads
    device = "cpu" if on_cpu_path else device
    block_size = 48 if group == 3 else 64
    lengths = [1, 2 * SPLIT + 5, block_size, block_size + 1] + ([] if on_cpu_path else [0])  # padding is for graphs
    case = make_case(7, lengths, 2, head_dim, block_size, dtype, device)
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(len(lengths), (2 * group + 4) * head_dim, generator=generator).to(dtype).to(device)
    norm_dtype = torch.float32 if group % 2 else dtype  # a model may keep its norms' weights in float32
    weights = (torch.rand(2, head_dim, generator=generator) + 0.5).to(norm_dtype).to(device)
    norms = (weights[0], weights[1], 1e-6) if has_norm else (None, None, 0.0)
    cos_sin = torch.randn(2 * SPLIT + 5, rotary_dim, generator=generator).to(device)
    where = (case.block_table, case.rows, case.seq_lens)
    caches, expected_caches = ([case.k_cache.clone(), case.v_cache.clone()] for _ in range(2))
    if on_cpu_path:  # there slots past the end must be finite
        caches, expected_caches = ([cache.nan_to_num(0.0) for cache in both] for both in (caches, expected_caches))
    out, expected = (
        torch.full((len(lengths), 2 * group, head_dim), float("nan"), dtype=dtype, device=device) for _ in "ab"
    )
    paged_decode_reference(qkv, *norms, cos_sin, *expected_caches, *where, 0.1, expected)
    if on_cpu_path:
        positions = case.seq_lens - 1
        slots = case.block_table[case.rows, positions // block_size].long() * block_size + positions % block_size
        q_norm, k_norm = (SimpleNamespace(weight=w, eps=1e-6) if has_norm else None for w in weights)
        spec = AttentionSpec(2 * group, 2, head_dim, 0.1, SimpleNamespace(cos_sin=cos_sin), q_norm, k_norm)
        gather = gather_blocks(case.seq_lens, case.rows, case.block_table, caches[0])
        places = TokenPlaces.of(positions, slots, block_size)
        decodes = DecodeBatch(case.rows, case.seq_lens, case.block_table, gather=gather, places=places)
        paged_decode(qkv, spec, KVCache(*caches), decodes, out)
    else:
        splits = split_contexts_triton(case.seq_lens, 2, make_splits(case, group, target_splits=4))
        torch.zeros(1, device=device)
        paged_decode_triton(qkv, *norms, cos_sin, *caches, *where, splits, 0.1, out)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps + 5e-6, "atol": 4 * torch.finfo(dtype).eps + 5e-6}
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(caches, expected_caches, **tolerance, equal_nan=True)


def test_one_norm_of_two_or_norms_of_two_dtypes_are_refused() -> None:
    case = make_case(0, [5], 1, 8, 16, torch.float32, "cpu")
    qkv, out = decode_inputs(case, 1, 0)
    cache = (case.k_cache, case.v_cache, case.block_table, case.rows, case.seq_lens)
    for k_weight in (None, torch.ones(8).half()):
        with pytest.raises(ValueError, match="k_weight must both"):
            paged_decode_triton(qkv, torch.ones(8), k_weight, 0.0, qkv, *cache, make_splits(case, 1, 1), 0.1, out)


def test_layers_share_a_workspace_however_sequences_are_cut(device: str) -> None:
    case = make_case(3, [3 * SPLIT, 0, SPLIT + 1, 7], 2, 64, 64, torch.float32, device)
    qkv, out = decode_inputs(case, 3, 3)
    for target_splits, min_split in ((1, SPLIT), (6, 2 * SPLIT), (6, SPLIT)):
        splits = make_splits(case, 3, target_splits, min_split)
        splits = split_contexts_triton(case.seq_lens, 2, splits)
        for layer in range(2):
            out.fill_(float("nan"))
            queries = qkv.clone()
            queries[:, : out[0].numel()] *= 1 + layer
            run(case, queries, splits, 0.125, out)
            assert_decode_is_dense_attention(case, queries, out, 0.125)


def test_more_splits_than_one_step_of_the_merge(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_decode_kernel, "MERGE_ELEMENTS", 1)  # two splits at a time
    case = make_case(4, [7 * SPLIT - 3], 1, 24, 64, torch.float32, device)
    qkv, out = decode_inputs(case, 5, 4)
    splits = split_contexts_triton(case.seq_lens, 1, make_splits(case, 5, target_splits=7))
    run(case, qkv, splits, 0.2, out)
    assert_decode_is_dense_attention(case, qkv, out, 0.2)


@pytest.mark.parametrize("block_size", [16, 128])  # tiles straddle blocks, or lie in one
def test_offsets_past_two_to_the_31_elements(block_size: int, device: str) -> None:
    stride, num_kv_heads, head_dim = 2**30, 2, 24
    block = num_kv_heads * block_size * head_dim
    storage = torch.empty(2 * stride + 2 * block, dtype=torch.bfloat16, device=device)
    size, strides = (3, num_kv_heads, block_size, head_dim), (stride, block_size * head_dim, head_dim, 1)
    k_cache, v_cache = storage.as_strided(size, strides), storage.as_strided(size, strides, block)
    small = make_case(0, [13], num_kv_heads, head_dim, block_size, torch.bfloat16, device)
    source = int(small.block_table[small.rows[0], 0])
    k_cache[2], v_cache[2] = small.k_cache[source], small.v_cache[source]
    table = torch.full_like(small.block_table, 2)
    qkv, out = decode_inputs(small, 2, 0)
    splits = split_contexts_triton(small.seq_lens, num_kv_heads, make_splits(small, 2, target_splits=1))
    where = (table, small.rows, small.seq_lens)
    paged_decode_triton(
        qkv, None, None, 0.0, torch.empty(1, 0, device=device), k_cache, v_cache, *where, splits, 0.2, out
    )
    assert_decode_is_dense_attention(small, qkv, out, 0.2)
    torch.testing.assert_close(k_cache[2, :, 12].cpu(), small.keys[0][-1], rtol=0, atol=0)


def test_tiles_past_two_to_the_31_elements(device: str) -> None:
    """In a contiguous cache. Of 100 tokens, the copy engine takes one tile, and the threads load the rest."""
    num_kv_heads, block_size, head_dim = 2, 128, 64
    last = 2**31 // (num_kv_heads * block_size * head_dim)
    size = (last + 1, num_kv_heads, block_size, head_dim)
    k_cache, v_cache = (torch.empty(size, dtype=torch.bfloat16, device=device) for _ in range(2))
    small = make_case(0, [100], num_kv_heads, head_dim, block_size, torch.bfloat16, device)
    source = int(small.block_table[small.rows[0], 0])
    k_cache[last], v_cache[last] = small.k_cache[source], small.v_cache[source]
    table = torch.full_like(small.block_table, last)
    qkv, out = decode_inputs(small, 2, 0)
    splits = split_contexts_triton(
        small.seq_lens, num_kv_heads, make_splits(small, 2, target_splits=1, min_split=2 * SPLIT)
    )
    where = (table, small.rows, small.seq_lens)
    paged_decode_triton(
        qkv, None, None, 0.0, torch.empty(1, 0, device=device), k_cache, v_cache, *where, splits, 0.2, out
    )
    assert_decode_is_dense_attention(small, qkv, out, 0.2)


def test_one_captured_graph_serves_every_length_mix(device: str) -> None:
    if device == "cpu":
        pytest.skip("CUDA graphs need CUDA")
    case = make_case(5, [9 * SPLIT, 3 * SPLIT, 5, 0], 2, 128, 64, torch.bfloat16, device)
    qkv, out = decode_inputs(case, 2, 5)
    splits = make_splits(case, 2, target_splits=8)
    full = case.seq_lens.clone()

    def step() -> None:
        run(case, qkv, split_contexts(case.seq_lens, 2, splits), 0.1, out)

    step()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    newest_keys, newest_values = qkv.unflatten(1, (-1, 128))[:, -4:].cpu().split(2, dim=1)
    keys, values = case.keys, case.values
    for lengths in ([9 * SPLIT, 3 * SPLIT, 5, 0], [1, 2 * SPLIT, 1, 0], [6 * SPLIT + 1, 1, 4, 0]):
        case.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        for i, length in enumerate(lengths):
            if length > 0:  # a shorter sequence's newest token takes an older one's place
                keys[i][length - 1], values[i][length - 1] = newest_keys[i], newest_values[i]
        case.keys = [dense[:length] for dense, length in zip(keys, lengths, strict=True)]
        case.values = [dense[:length] for dense, length in zip(values, lengths, strict=True)]
        out.fill_(float("nan"))
        graph.replay()
        assert_decode_is_dense_attention(case, qkv, out, 0.1)
    assert bool((case.seq_lens <= full).all())


def check_splits(splits: DecodeSplits, lengths: list[int]) -> None:
    entries = splits.table[: len(lengths) + splits.target_splits].tolist()
    used = [entry for entry in entries if entry[0] >= 0]
    assert entries[: len(used)] == used, "idle entries must be the last"
    is_end = [end == lengths[seq] for seq, _, end, *_ in used]
    assert is_end == sorted(is_end), "whole splits must come first"
    ends = [end - begin for seq, begin, end, *_ in used if end == lengths[seq]]
    assert ends == sorted(ends, reverse=True), "short splits must come last"
    assert sorted(entry[3] for entry in used) == list(range(len(used))), "each needs a place for its partial result"
    whole_sizes = set()
    for seq, length in enumerate(lengths):
        own = sorted(entry for entry in used if entry[0] == seq)
        assert [entry[1] for entry in own] == [0] + [entry[2] for entry in own][:-1], "splits must follow each other"
        assert own[-1][2] == length, "splits must reach the end"
        assert [entry[3] for entry in own] == [own[0][4] + i for i in range(len(own))]
        assert all(entry[4] == own[0][4] and entry[5] == len(own) for entry in own)
        assert length == 0 or own[-1][2] > own[-1][1], "no split of a sequence is empty"
        whole_sizes |= {entry[2] - entry[1] for entry in own[:-1]}
    assert len(whole_sizes) <= 1, "all splits but the last of a sequence have the same size"
    assert all(size % SPLIT == 0 and size >= splits.min_split for size in whole_sizes)


def empty_splits(max_seqs: int, target_splits: int, min_split: int, device: str = "cpu") -> DecodeSplits:
    splits = DecodeSplits.allocate(max_seqs, 2, 1, 8, device, target_splits=target_splits, min_split=min_split)
    splits.table.fill_(777)
    splits.arrivals.fill_(777)
    return splits


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 5000), st.integers(0, 200_000)), min_size=1),
    target_splits=st.integers(1, 600),
    min_split=st.integers(1, 8).map(lambda n: n * SPLIT),
)
def test_splits_cover_every_sequence_and_always_fit(lengths: list[int], target_splits: int, min_split: int) -> None:
    splits = empty_splits(len(lengths), target_splits, min_split)
    splits = split_contexts(torch.tensor(lengths, dtype=torch.int32), 1, splits)
    check_splits(splits, lengths)
    assert not splits.arrivals[: len(lengths)].any()


@pytest.mark.parametrize("seed", range(12))
def test_split_kernel_equals_its_reference(seed: int, device: str) -> None:
    rng = random.Random(seed)
    most = rng.choice([10, 1000, 100_000])
    num_seqs = rng.randint(1, 20) if device == "cpu" or seed % 3 else 1024 + seed  # past one chunk of the kernel's sums
    seq_lens = torch.tensor([rng.randint(0, most) for _ in range(num_seqs)], dtype=torch.int32, device=device)
    target_splits, min_split = rng.randint(1, 300), rng.randint(1, 4) * SPLIT
    expected = empty_splits(num_seqs + 2, target_splits, min_split, device)
    actual = empty_splits(num_seqs + 2, target_splits, min_split, device)
    split_contexts_reference(seq_lens, 1, expected)
    split_contexts_triton(seq_lens, 1, actual)
    assert torch.equal(actual.table, expected.table)
    assert torch.equal(actual.arrivals, expected.arrivals)


@pytest.mark.parametrize(("num_seqs", "split"), [(1, 64), (4, 64), (5, 128), (8, 128), (16, 256), (17, 512), (64, 512)])
def test_few_sequences_are_cut_finer_so_that_every_multiprocessor_has_a_split(num_seqs: int, split: int) -> None:
    splits = DecodeSplits.allocate(num_seqs, 16, 8, 8, "cpu", target_splits=1000)
    split_contexts(torch.full((num_seqs,), 4096, dtype=torch.int32), 8, splits)
    assert splits.table[0, 1:3].tolist() == [0, split]


def test_what_does_not_fit_is_refused() -> None:
    splits = empty_splits(2, 4, SPLIT)
    with pytest.raises(ValueError, match="up to 2 sequences"):
        split_contexts(torch.ones(3, dtype=torch.int32), 1, splits)
    with pytest.raises(ValueError, match="kv heads"):
        split_contexts(torch.ones(2, dtype=torch.int32), 2, splits)
    with pytest.raises(ValueError, match="min_split=100"):
        empty_splits(2, 4, 100)
    with pytest.raises(ValueError, match="target_splits=0"):
        empty_splits(2, 0, SPLIT)
    qkv, out = torch.zeros(1, 64), torch.empty(1, 4, 8)
    cache = torch.zeros(3, 2, 16, 8)
    lens = torch.ones(1, dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    for k_cache, v_cache in (
        (cache.transpose(1, 2), cache.transpose(1, 2)),  # not contiguous within a block
        (cache, torch.zeros(3, 4, 16, 8)[:, :2]),  # other strides
        (cache.half(), cache.half()),  # other dtype
        (torch.zeros(3, 3, 16, 8), torch.zeros(3, 3, 16, 8)),  # 4 heads on 3
    ):
        with pytest.raises(ValueError, match="cache"):
            paged_decode_triton(qkv, None, None, 0.0, qkv, k_cache, v_cache, table, lens - 1, lens, splits, 1.0, out)
    launch = partial(paged_decode_triton, qkv, None, None, 0.0, qkv, cache, cache, table, lens - 1, lens)
    with pytest.raises(ValueError, match="of 1 kv heads, the step has 1 of 2"):
        launch(splits, 1.0, out)
    with pytest.raises(ValueError, match="up to 0 sequences"):
        launch(DecodeSplits.allocate(0, 4, 2, 8, "cpu"), 1.0, out)
    for tile in (0, 8, 48, 2 * SPLIT):
        config = paged_decode_kernel.DecodeConfig(tile=tile, num_warps=2, num_stages=2)
        with pytest.raises(ValueError, match=f"tile={tile}: must divide {SPLIT} and be at least 16"):
            launch(DecodeSplits.allocate(1, 4, 2, 8, "cpu"), 1.0, out, config)


def test_only_caches_that_the_copy_engine_can_take_are_its_tiles() -> None:
    memory = torch.zeros(1 + 3 * 2 * 64 * 8)
    cache, unaligned = (memory[start:][: 3 * 2 * 64 * 8].view(3, 2, 64, 8) for start in (0, 1))
    assert tiles_of_cache(cache, 64) is not None
    assert tiles_of_cache(cache, 48) is None
    assert tiles_of_cache(cache[:, :1], 64) is None
    assert tiles_of_cache(unaligned, 64) is None
