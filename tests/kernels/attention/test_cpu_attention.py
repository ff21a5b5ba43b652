"""The CPU's attention against dense attention in float64; slots that must not count hold finite but absurd numbers."""

import random

import pytest
import torch
import torch.nn.functional as F
from paged_cache import PagedCase, dense_attention, make_case

from nanovllm.kernels.attention import cpu_attention, kv_gather
from nanovllm.kernels.attention.cpu_attention import paged_decode_cpu, paged_prefill_cpu
from nanovllm.kernels.attention.kv_gather import gather_blocks

SHAPES = [  # kv heads, query heads per kv head, head_dim, block size
    (2, 1, 24, 16),
    (1, 7, 48, 48),
    (3, 3, 80, 16),
    (8, 2, 128, 64),
    (2, 5, 64, 32),
]
SCALE = 0.2


def make_finite_case(seed: int, lengths: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> PagedCase:
    num_kv_heads, _, head_dim, block_size = shape
    case = make_case(2 * seed, lengths, num_kv_heads, head_dim, block_size, dtype, "cpu")  # even: K apart from V
    for cache in (case.k_cache, case.v_cache):
        cache.nan_to_num_(nan=1000.0)
    return case


def assert_is_dense_attention(case: PagedCase, q: torch.Tensor, out: torch.Tensor, starts: list[int]) -> None:
    """The bound: scores and weights are rounded to the dtype, and an eps of a score changes its weight by as much."""
    for i in range(len(case.seq_lens)):
        tokens = slice(starts[i], starts[i + 1])
        expected, bound = dense_attention(q[tokens], case.keys[i], case.values[i], SCALE)
        largest_score = SCALE * q[tokens].float().norm(dim=-1).max() * case.keys[i].float().norm(dim=-1).max()
        allowed = (torch.finfo(q.dtype).eps * (2 + largest_score.item()) + 5e-6) * bound
        error = (out[tokens].double() - expected).abs()
        assert bool((error <= allowed).all()), f"error is {(error / allowed).max():.3g} of what is allowed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_decode_equals_dense_attention(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    num_kv_heads, group, head_dim, block_size = SHAPES[seed]
    monkeypatch.setattr(kv_gather, "GROUP_BYTES", 3 * 2 * num_kv_heads * block_size * head_dim * dtype.itemsize)
    lengths = [1, 7, 7, 7, block_size, block_size + 1, *(rng.randint(1, 5 * block_size) for _ in range(6))]
    case = make_finite_case(seed, lengths, SHAPES[seed], dtype)
    num_padding = seed % 3
    seq_lens, rows = F.pad(case.seq_lens, (0, num_padding)), F.pad(case.rows, (0, num_padding), value=-1)
    q = torch.randn(len(rows), num_kv_heads * group, head_dim).to(dtype)
    gather = None
    for _ in range(2):  # the second time over the first one's workspace
        gather = gather_blocks(seq_lens, rows, case.block_table, case.k_cache, gather)
        out = torch.full_like(q, float("nan"))
        paged_decode_cpu(q, case.k_cache, case.v_cache, gather, SCALE, out)
        assert_is_dense_attention(case, q, out, list(range(len(lengths) + 1)))
    assert len(gather.groups) > 1


def test_a_batch_of_padding_alone_reads_nothing() -> None:
    case = make_finite_case(0, [5], SHAPES[0], torch.float32)
    gather = gather_blocks(torch.zeros(1, dtype=torch.int32), torch.tensor([-1]), case.block_table, case.k_cache)
    assert not gather.groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_prefill_equals_dense_attention(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(cpu_attention, "QUERY_TILE", 16)
    num_kv_heads, group, head_dim, _ = SHAPES[seed]
    chunks = [1, 16, 17, 45]
    lengths = [chunk + rng.choice([0, 1, 30]) for chunk in chunks]
    case = make_finite_case(seed, lengths, SHAPES[seed], dtype)
    q = torch.randn(sum(chunks) + 4, num_kv_heads * group, head_dim).to(dtype)
    out = torch.full_like(q, float("nan"))
    starts = [2, 3, 19, 36, 81]  # after two tokens of others
    query_start = torch.tensor([*starts, 83], dtype=torch.int32)
    cache = (case.k_cache, case.v_cache, case.block_table)
    rows, seq_lens = F.pad(case.rows, (0, 1), value=-1), F.pad(case.seq_lens, (0, 1))  # and before two of padding
    paged_prefill_cpu(q, *cache, rows, query_start, seq_lens, SCALE, out)
    assert_is_dense_attention(case, q, out, starts)
    assert bool(out[:2].isnan().all()) and bool(out[-2:].isnan().all())
