"""Promises of the decode plan and of decode attention, kept by the kernel (interpreted on a CPU) and the reference."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cache import PagedCase, assert_within_rounding, dense_attention, make_case

from nanovllm.kernels import paged_decode as kernels

HEAD_DIMS = [24, 48, 64, 80, 96, 128, 256]
GROUPS = [1, 2, 3, 5, 7, 8]
BLOCK_SIZES = [16, 48, 64, 256]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PIECE = kernels.PIECE_MULTIPLE


def draw_lengths(rng: random.Random, block_size: int, most: int) -> list[int]:
    """A few lengths with the borders of blocks, tiles and pieces well represented, and a padding entry now and then."""
    border = [0, 1, block_size, block_size + 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE - 1]
    lengths = [rng.choice([*border, rng.randint(1, 3 * PIECE)]) for _ in range(rng.randint(1, most))]
    return [*lengths, rng.randint(PIECE + 1, 3 * PIECE)]


def decode_inputs(case: PagedCase, group: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q as a slice of a wider projection, as a model has it, and a poisoned out."""
    num_heads = case.k_cache.shape[1] * group
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(len(case.keys), num_heads + 2, case.k_cache.shape[3], generator=generator)
    q = wide.to(case.k_cache.dtype).to(case.k_cache.device)[:, :num_heads]
    return q, torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)


def make_plan(case: PagedCase, group: int, target_pieces: int, min_piece: int = PIECE) -> kernels.DecodePlan:
    num_kv_heads, head_dim = case.k_cache.shape[1], case.k_cache.shape[3]
    plan = kernels.DecodePlan.allocate(
        len(case.keys) + 3,
        num_kv_heads * group,
        num_kv_heads,
        head_dim,
        case.k_cache.device,
        target_pieces=target_pieces,
        min_piece=min_piece,
    )
    plan.partial_out.fill_(float("nan"))
    plan.partial_lse.fill_(float("nan"))
    plan.arrivals.fill_(12345)
    return plan


def assert_decode_is_dense_attention(case: PagedCase, q: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    for i, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        if keys.shape[0] == 0:
            assert bool((out[i] == 0).all()), "a padding entry must get zeros"
        else:
            expected, bound = dense_attention(q[i : i + 1], keys, values, scale)
            assert_within_rounding(out[i : i + 1], expected, bound)


def run(case: PagedCase, q: torch.Tensor, plan: kernels.DecodePlan, scale: float, out: torch.Tensor) -> None:
    torch.zeros(1, device=q.device)  # a launch between this one and the plan's, which `plan_decode` asks for
    kernels.paged_decode_triton(
        q, case.k_cache, case.v_cache, case.block_table, case.rows, case.seq_lens, plan, scale, out
    )


# Each seed takes the next of every list, whose lengths make the pairings differ. The interpreter is slow: fewer there.
@pytest.mark.parametrize("seed", range(42 if torch.cuda.is_available() else 14))
def test_kernel_equals_dense_attention(seed: int, device: str) -> None:
    rng = random.Random(seed)
    group, block_size = GROUPS[seed % 6], BLOCK_SIZES[seed // 2 % 4]
    lengths = draw_lengths(rng, block_size, most=2 if device == "cpu" else 12)
    case = make_case(seed, lengths, rng.randint(1, 2), HEAD_DIMS[seed % 7], block_size, DTYPES[seed % 3], device)
    q, out = decode_inputs(case, group, seed)
    smallest_pieces = sum(-(-length // PIECE) for length in lengths)
    plan = make_plan(case, group, target_pieces=smallest_pieces)
    plan = kernels.plan_decode_triton(case.seq_lens, case.k_cache.shape[1], plan)
    scale = HEAD_DIMS[seed % 7] ** -0.5
    run(case, q, plan, scale, out)
    assert_decode_is_dense_attention(case, q, out, scale)
    assert not plan.arrivals[: len(lengths)].any(), "the next layer must find the arrival counts at zero"


@pytest.mark.parametrize("seed", range(12))
def test_reference_equals_dense_attention(seed: int) -> None:
    rng = random.Random(seed)
    block_size, dtype = BLOCK_SIZES[seed % 4], DTYPES[seed % 3]
    case = make_case(seed, draw_lengths(rng, block_size, 4), 2, HEAD_DIMS[seed % 7], block_size, dtype, "cpu")
    q, out = decode_inputs(case, GROUPS[seed % 6], seed)
    cache = (case.k_cache, case.v_cache, case.block_table)
    kernels.paged_decode_reference(q, *cache, case.rows, case.seq_lens, 0.2, out)
    assert_decode_is_dense_attention(case, q, out, 0.2)


def test_layers_share_a_workspace_however_sequences_are_cut(device: str) -> None:
    case = make_case(3, [3 * PIECE, 0, PIECE + 1, 7], 2, 64, 64, torch.float32, device)
    q, out = decode_inputs(case, 3, 3)
    for target_pieces, min_piece in ((1, PIECE), (6, 2 * PIECE), (6, PIECE)):
        plan = make_plan(case, 3, target_pieces, min_piece)
        plan = kernels.plan_decode_triton(case.seq_lens, 2, plan)
        for layer in range(2):
            out.fill_(float("nan"))
            run(case, q * (1 + layer), plan, 0.125, out)
            assert_decode_is_dense_attention(case, q * (1 + layer), out, 0.125)


def test_more_pieces_than_one_step_of_the_merge(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MERGE_ELEMENTS", 1)  # two pieces at a time
    case = make_case(4, [7 * PIECE - 3], 1, 24, 64, torch.float32, device)
    q, out = decode_inputs(case, 5, 4)
    plan = kernels.plan_decode_triton(case.seq_lens, 1, make_plan(case, 5, target_pieces=7))
    run(case, q, plan, 0.2, out)
    assert_decode_is_dense_attention(case, q, out, 0.2)


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
    q, out = decode_inputs(small, 2, 0)
    plan = kernels.plan_decode_triton(small.seq_lens, num_kv_heads, make_plan(small, 2, target_pieces=1))
    kernels.paged_decode_triton(q, k_cache, v_cache, table, small.rows, small.seq_lens, plan, 0.2, out)
    assert_decode_is_dense_attention(small, q, out, 0.2)


def test_one_captured_graph_serves_every_length_mix(device: str) -> None:
    if device == "cpu":
        pytest.skip("CUDA graphs need CUDA")
    case = make_case(5, [9 * PIECE, 3 * PIECE, 5, 0], 2, 128, 64, torch.bfloat16, device)
    q, out = decode_inputs(case, 2, 5)
    plan = make_plan(case, 2, target_pieces=8)
    full = case.seq_lens.clone()

    def step() -> None:
        run(case, q, kernels.plan_decode(case.seq_lens, 2, plan), 0.1, out)

    step()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    keys, values = case.keys, case.values
    for lengths in ([9 * PIECE, 3 * PIECE, 5, 0], [1, 2 * PIECE, 1, 0], [6 * PIECE + 1, 1, 4, 0]):
        case.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        case.keys = [dense[:length] for dense, length in zip(keys, lengths, strict=True)]
        case.values = [dense[:length] for dense, length in zip(values, lengths, strict=True)]
        out.fill_(float("nan"))
        graph.replay()
        assert_decode_is_dense_attention(case, q, out, 0.1)
    assert bool((case.seq_lens <= full).all())


def check_plan(plan: kernels.DecodePlan, lengths: list[int]) -> None:
    slots = plan.pieces[: len(lengths) + plan.target_pieces].tolist()
    used = [slot for slot in slots if slot[0] >= 0]
    assert slots[: len(used)] == used, "idle slots must be the last"
    is_end = [end == lengths[seq] for seq, _, end, *_ in used]
    assert is_end == sorted(is_end), "whole pieces must come first"
    ends = [end - begin for seq, begin, end, *_ in used if end == lengths[seq]]
    classes = [4 * end // (max(ends) + 1) for end in ends]
    assert classes == sorted(classes, reverse=True), "short pieces must come last"
    assert sorted(slot[3] for slot in used) == list(range(len(used))), "each needs a place for its partial result"
    whole_sizes = set()
    for seq, length in enumerate(lengths):
        own = sorted(slot for slot in used if slot[0] == seq)
        assert [slot[1] for slot in own] == [0] + [slot[2] for slot in own][:-1], "pieces must follow each other"
        assert own[-1][2] == length, "pieces must reach the end"
        assert [slot[3] for slot in own] == [own[0][4] + i for i in range(len(own))]
        assert all(slot[4] == own[0][4] and slot[5] == len(own) for slot in own)
        assert length == 0 or own[-1][2] > own[-1][1], "no piece of a sequence is empty"
        whole_sizes |= {slot[2] - slot[1] for slot in own[:-1]}
    assert len(whole_sizes) <= 1, "all pieces but the last of a sequence have the same size"
    assert all(size % PIECE == 0 and size >= plan.min_piece for size in whole_sizes)


def empty_plan(max_seqs: int, target_pieces: int, min_piece: int, device: str = "cpu") -> kernels.DecodePlan:
    plan = kernels.DecodePlan.allocate(max_seqs, 2, 1, 8, device, target_pieces=target_pieces, min_piece=min_piece)
    plan.pieces.fill_(777)
    plan.arrivals.fill_(777)
    return plan


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 5000), st.integers(0, 200_000)), min_size=1),
    target_pieces=st.integers(1, 600),
    min_piece=st.integers(1, 8).map(lambda n: n * PIECE),
)
def test_pieces_cover_every_sequence_and_always_fit(lengths: list[int], target_pieces: int, min_piece: int) -> None:
    plan = empty_plan(len(lengths), target_pieces, min_piece)
    plan = kernels.plan_decode(torch.tensor(lengths, dtype=torch.int32), 1, plan)
    check_plan(plan, lengths)
    assert not plan.arrivals[: len(lengths)].any()


@pytest.mark.parametrize("seed", range(12))
def test_plan_kernel_equals_its_reference(seed: int, device: str) -> None:
    rng = random.Random(seed)
    most = rng.choice([10, 1000, 100_000])
    num_seqs = rng.randint(1, 20) if device == "cpu" or seed % 3 else 1024 + seed  # past one chunk of the kernel's sums
    seq_lens = torch.tensor([rng.randint(0, most) for _ in range(num_seqs)], dtype=torch.int32, device=device)
    target_pieces, min_piece = rng.randint(1, 300), rng.randint(1, 4) * PIECE
    expected = empty_plan(num_seqs + 2, target_pieces, min_piece, device)
    actual = empty_plan(num_seqs + 2, target_pieces, min_piece, device)
    kernels.plan_decode_reference(seq_lens, 1, expected)
    kernels.plan_decode_triton(seq_lens, 1, actual)
    assert torch.equal(actual.pieces, expected.pieces)
    assert torch.equal(actual.arrivals, expected.arrivals)


def test_what_does_not_fit_is_refused() -> None:
    plan = empty_plan(2, 4, PIECE)
    with pytest.raises(ValueError, match="up to 2 sequences"):
        kernels.plan_decode(torch.ones(3, dtype=torch.int32), 1, plan)
    with pytest.raises(ValueError, match="kv heads"):
        kernels.plan_decode(torch.ones(2, dtype=torch.int32), 2, plan)
    with pytest.raises(ValueError, match="min_piece=100"):
        empty_plan(2, 4, 100)
    with pytest.raises(ValueError, match="target_pieces=0"):
        empty_plan(2, 0, PIECE)
    q = torch.zeros(1, 4, 8)
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
            kernels.paged_decode_triton(q, k_cache, v_cache, table, lens - 1, lens, plan, 1.0, torch.empty_like(q))
