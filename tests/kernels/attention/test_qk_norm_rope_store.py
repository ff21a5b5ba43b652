"""Promises of QK-norm + RoPE + store, kept by the kernel (interpreted on a CPU) and the reference."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from nanovllm.kernels.attention import qk_norm_rope_store as kernels
from nanovllm.kernels.attention.contract import AttentionSpec, ChunkBatch, KVCache
from nanovllm.kernels.attention.cpu_rope_store import TokenPlaces

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def through_the_front(qkv, q_weight, k_weight, eps, positions, cos_sin, slot_mapping, k_cache, v_cache, num_heads):
    """The arguments as records, as a layer gives them: on a CPU its own fast version."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    q_norm, k_norm = (None if w is None else SimpleNamespace(weight=w, eps=eps) for w in (q_weight, k_weight))
    rope = SimpleNamespace(cos_sin=cos_sin)
    spec = AttentionSpec(num_heads, num_kv_heads, head_dim, 1.0, rope, q_norm, k_norm)
    places = None if qkv.is_cuda else TokenPlaces.of(positions, slot_mapping, block_size)
    unused = torch.empty(0)
    chunks = ChunkBatch(positions, slot_mapping, unused, unused, unused, unused, places)
    return kernels.qk_norm_rope_store(qkv, spec, KVCache(k_cache, v_cache), chunks)


FUNCTIONS = [kernels.qk_norm_rope_store_triton, kernels.qk_norm_rope_store_reference, through_the_front]
EPS = 1e-6
POISON = 123.0
# heads, kv_heads, head_dim, rotary_dim, block_size
SHAPES = [
    (1, 1, 24, 24, 16),
    (6, 2, 48, 48, 48),
    (7, 1, 80, 80, 16),
    (8, 1, 96, 48, 32),
    (2, 2, 256, 64, 16),
    (16, 8, 128, 128, 16),
    (3, 1, 64, 18, 16),
    (6, 2, 96, 72, 16),
]


@dataclass
class Case:
    """Random input. Caches are poisoned views of one tensor, so that a block's stride is not its size."""

    qkv: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    positions: torch.Tensor
    cos_sin: torch.Tensor
    slot_mapping: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    num_heads: int

    def arguments(self, q_norm: bool = True, k_norm: bool = True) -> tuple:
        weights = (self.q_weight if q_norm else None, self.k_weight if k_norm else None)
        where = (self.positions, self.cos_sin, self.slot_mapping, self.k_cache, self.v_cache)
        return (self.qkv, *weights, EPS, *where, self.num_heads)


def draw(num_tokens: int, shape: tuple[int, ...], dtype: torch.dtype, device: str, num_blocks: int = 8) -> Case:
    num_heads, num_kv_heads, head_dim, rotary_dim, block_size = shape
    generator = torch.Generator().manual_seed(sum(shape) + num_tokens)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    qkv = normal(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim + 8) * 2
    angles = torch.rand(500, rotary_dim // 2, generator=generator) * 100
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    slots[1::4] = -1
    cache = torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), POISON, dtype=dtype, device=device)
    return Case(
        qkv=qkv.to(device, dtype)[:, :-8],
        q_weight=normal(head_dim).to(device, dtype),
        k_weight=normal(head_dim).to(device, dtype),
        positions=torch.randint(0, 500, (num_tokens,), generator=generator, dtype=torch.int32).to(device),
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=1).to(device),
        slot_mapping=slots.to(device),
        k_cache=cache[:, 0],
        v_cache=cache[:, 1],
        num_heads=num_heads,
    )


def exact(case: Case, q_norm: bool, k_norm: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v `[tokens, heads, head_dim]` in float64."""
    num_kv_heads, head_dim = case.k_cache.shape[1], case.k_cache.shape[3]
    heads = case.qkv.double().unflatten(1, (-1, head_dim))
    q, k, v = heads.split([case.num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm:
        q = q / (q.square().mean(-1, keepdim=True) + EPS).sqrt() * case.q_weight.double()
    if k_norm:
        k = k / (k.square().mean(-1, keepdim=True) + EPS).sqrt() * case.k_weight.double()
    half = case.cos_sin.shape[1] // 2
    cos, sin = case.cos_sin.double()[case.positions.long(), None].chunk(2, dim=-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    return rotate(q), rotate(k), v


def assert_rounded_once(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Half a unit in the last place of the dtype, and a few of float32 of the head's largest term."""
    error = (actual.double() - expected).abs()
    largest = expected.abs().amax(-1, keepdim=True)
    allowed = expected.abs() * torch.finfo(actual.dtype).eps / 2 + largest * torch.finfo(torch.float32).eps * 8
    if actual.dtype == torch.float16:
        allowed += 2.0**-25  # half the spacing of its subnormals
    assert (error <= allowed).all(), f"{(error / allowed).max()} of what is allowed"


def assert_stores_and_returns(function, case: Case, q_norm: bool = True, k_norm: bool = True) -> None:
    q, k, v = exact(case, q_norm, k_norm)
    before = case.qkv.clone()
    actual = function(*case.arguments(q_norm, k_norm))
    assert actual.dtype == case.qkv.dtype and actual.shape == q.shape
    assert_rounded_once(actual, q)
    assert torch.equal(case.qkv, before)
    block_size = case.k_cache.shape[2]
    is_stored = case.slot_mapping >= 0
    slots = case.slot_mapping[is_stored]
    block, offset = slots // block_size, slots % block_size
    assert_rounded_once(case.k_cache[block, :, offset], k[is_stored])
    assert torch.equal(case.v_cache[block, :, offset].double(), v[is_stored])
    for cache in (case.k_cache, case.v_cache):  # nothing else was touched
        cache[block, :, offset] = POISON
        assert (cache == POISON).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_q_is_returned_and_k_and_v_are_in_their_slots(function, shape, dtype: torch.dtype, device: str):
    assert_stores_and_returns(function, draw(6, shape, dtype, device))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_norms_may_have_another_dtype(function, dtype: torch.dtype, device: str):
    case = draw(6, SHAPES[1], dtype, device)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    generator = torch.Generator().manual_seed(1)
    case.q_weight, case.k_weight = torch.randn(2, 48, generator=generator).to(device, other)
    assert_stores_and_returns(function, case)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("norms", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]])
def test_a_model_without_a_norm_has_none(function, norms: tuple[bool, bool], shape, device: str):
    assert_stores_and_returns(function, draw(5, shape, torch.float32, device), *norms)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_is_what_transformers_does(function, device: str):
    case = draw(7, (6, 2, 48, 48, 16), torch.float32, device)
    case.slot_mapping.copy_(torch.arange(7))
    norms = []
    for weight in (case.q_weight, case.k_weight):
        norms.append(Qwen3RMSNorm(48, eps=EPS).to(device))
        norms[-1].weight.data.copy_(weight)
    q, k, _ = case.qkv.unflatten(1, (-1, 48)).split([6, 2, 2], dim=1)
    cos, sin = (c.repeat(1, 2)[None] for c in case.cos_sin[case.positions.long()].chunk(2, dim=-1))
    q, k = (norm(x).transpose(0, 1)[None] for norm, x in zip(norms, (q, k), strict=True))
    q, k = (x[0].transpose(0, 1).detach() for x in apply_rotary_pos_emb(q, k, cos, sin))
    actual = function(*case.arguments())
    torch.testing.assert_close(actual, q, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(case.k_cache[0, :, :7].transpose(0, 1), k, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_v_is_copied_bit_for_bit_even_if_infinite(function, device: str):
    case = draw(3, (2, 1, 24, 24, 16), torch.bfloat16, device)
    case.slot_mapping.copy_(torch.arange(3))
    case.qkv[:, -24:] = torch.tensor([float("inf"), -0.0, float("-inf")], device=device).repeat(8)
    function(*case.arguments())
    stored = case.v_cache[0, 0, :3].contiguous().view(torch.int16)
    assert torch.equal(stored, case.qkv[:, -24:].contiguous().view(torch.int16))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_prefill_of_many_tokens(function, device: str):
    num_tokens = 5000 if device == "cuda" else 70 if function is kernels.qk_norm_rope_store_triton else 600
    case = draw(num_tokens, (16, 8, 128, 128, 64) if device == "cuda" else SHAPES[1], torch.bfloat16, device, 100)
    assert_stores_and_returns(function, case)


def test_a_batch_without_tokens(device: str):
    case = draw(0, SHAPES[1], torch.float32, device)
    for function in FUNCTIONS:
        assert function(*case.arguments()).shape == (0, 6, 48)


def test_without_rope_nothing_is_rotated(device: str):
    case = draw(5, SHAPES[1], torch.float32, device)
    case.slot_mapping.copy_(torch.arange(5))
    spec = AttentionSpec(6, 2, 48, 1.0)
    places = TokenPlaces.of(case.positions, case.slot_mapping, 48) if device == "cpu" else None
    unused = torch.empty(0)
    chunks = ChunkBatch(case.positions, case.slot_mapping, unused, unused, unused, unused, places)
    q = kernels.qk_norm_rope_store(case.qkv, spec, KVCache(case.k_cache, case.v_cache), chunks)
    heads = case.qkv.unflatten(1, (-1, 48))
    assert torch.equal(q, heads[:, :6])
    assert torch.equal(case.k_cache[0, :, :5].transpose(0, 1), heads[:, 6:8])


def test_layers_that_share_a_table_look_its_rotations_up_once_a_step():
    """Each layer has a rope of its own: at one token the look-up costs as much as the rest of the work."""
    case = draw(4, SHAPES[1], torch.float32, "cpu")
    places = TokenPlaces.of(case.positions, case.slot_mapping, 48)
    first, second = (places.rotation(SimpleNamespace(cos_sin=case.cos_sin)) for _ in range(2))
    assert first is second


def test_layers_with_different_ropes_turn_by_their_own():
    """One step's places serve layers whose tables differ."""
    case = draw(4, SHAPES[1], torch.float32, "cpu")
    places = TokenPlaces.of(case.positions, case.slot_mapping, 48)
    unused = torch.empty(0)
    chunks = ChunkBatch(case.positions, case.slot_mapping, unused, unused, unused, unused, places)
    for cos_sin in (case.cos_sin, case.cos_sin.flip(0), case.cos_sin):
        spec = AttentionSpec(6, 2, 48, 1.0, SimpleNamespace(cos_sin=cos_sin))
        q = kernels.qk_norm_rope_store(case.qkv, spec, KVCache(case.k_cache, case.v_cache), chunks)
        where = (case.positions, cos_sin, case.slot_mapping, case.k_cache.clone(), case.v_cache.clone(), 6)
        expected = kernels.qk_norm_rope_store_reference(case.qkv, None, None, 0.0, *where)
        torch.testing.assert_close(q, expected, rtol=1e-5, atol=5e-6)
