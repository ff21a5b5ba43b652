"""Promises of the CPU's linear layers over packed weights."""

import gc
import weakref

import pytest
import torch

from nanovllm.kernels.linear.packed_linear import PackedWeight, pack_weight, packed_linear, packed_rows, unpack_weight

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
SHAPES = [(4096, 1024), (1000, 72), (33, 17), (96, 48), (1, 64), (640, 3072)]


def _packed(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, PackedWeight]:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = pack_weight(weight)
    if packed is None:
        pytest.skip(f"this CPU packs no {dtype}")
    return weight, packed


def _assert_is_rounded_dot_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """One rounding to the dtype, on top of float32 sums in any order."""
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    bound = exact.abs() * torch.finfo(out.dtype).eps / 2 + magnitude * torch.finfo(torch.float32).eps * 8
    if out.dtype == torch.float16:
        bound += 2.0**-25  # half of a float16 subnormal's spacing
    assert out.dtype == weight.dtype and out.shape == exact.shape
    excess = ((out.double() - exact).abs() - bound).max().item()
    assert excess <= 0, f"exceeds the rounding bound by {excess}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_linear_rounds_the_exact_product_once(shape: tuple[int, int], dtype: torch.dtype):
    weight, packed = _packed(*shape, dtype)
    bias = torch.randn(shape[0]).to(dtype)
    for num_rows in (1, 2, 7, 16, 65):
        x = torch.randn(num_rows, shape[1]).to(dtype)
        _assert_is_rounded_dot_product(packed_linear(x, packed), x, weight, None)
        _assert_is_rounded_dot_product(packed_linear(x, packed, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_linear_takes_strided_batched_and_empty_inputs(dtype: torch.dtype):
    weight, packed = _packed(96, 48, dtype)
    wide = torch.randn(5, 80).to(dtype)
    _assert_is_rounded_dot_product(packed_linear(wide[:, 16:64], packed), wide[:, 16:64], weight, None)
    last = wide[[4], 16:64].expand(3, 48)
    _assert_is_rounded_dot_product(packed_linear(last, packed), last, weight, None)
    batch = torch.randn(2, 3, 48).to(dtype)
    assert torch.equal(packed_linear(batch, packed), packed_linear(batch.view(6, 48), packed).view(2, 3, 96))
    assert packed_linear(batch[:, :0], packed).shape == (2, 0, 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_rows_are_the_weight_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype):
    weight, packed = _packed(*shape, dtype)
    if packed.rows is None:
        pytest.skip("this CPU's layout is not a known one")
    ids = torch.randint(0, shape[0], (50,), dtype=torch.int32)
    for index in (torch.arange(shape[0]), ids, ids[:0]):
        rows = packed_rows(packed, index)
        assert rows.dtype == dtype and torch.equal(rows, weight[index.long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacked_weight_is_the_weight_bit_for_bit_and_packs_again(shape: tuple[int, int], dtype: torch.dtype):
    weight, packed = _packed(*shape, dtype)
    unpacked = unpack_weight(packed)
    assert unpacked.dtype == dtype and unpacked.is_contiguous() and torch.equal(unpacked, weight)
    x = torch.randn(3, shape[1]).to(dtype)
    before = packed_linear(x, packed)
    again = pack_weight(unpacked)
    assert torch.equal(packed_linear(x, again), before)
    unpacked.fill_(float("nan"))  # shares nothing with either
    assert torch.equal(packed_linear(x, packed), before) and torch.equal(packed_linear(x, again), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_bit_pattern_survives_packing_and_unpacking(dtype: torch.dtype):
    """Negative zeros and subnormals too; of bfloat16 also infinities and NaN payloads."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    if dtype == torch.float16:
        bits = torch.where(bits.view(dtype).isfinite(), bits, 0)
    packed = pack_weight(bits.view(dtype).view(128, 512))
    if packed is None:
        pytest.skip(f"this CPU packs no {dtype}")
    assert torch.equal(unpack_weight(packed).view(torch.int16).flatten(), bits)


def test_rows_survive_the_weight_and_every_bit_pattern():
    """NaN payloads, infinities and negative zeros come back, after the plain weight is gone."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    weight = bits.view(torch.bfloat16).view(128, 512)
    packed = pack_weight(weight)
    if packed is None or packed.rows is None:
        pytest.skip("this CPU packs no bfloat16")
    del weight
    assert torch.equal(packed_rows(packed, torch.arange(128)).view(torch.int16).flatten(), bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weight_shares_nothing_with_the_plain_one(dtype: torch.dtype):
    weight, packed = _packed(128, 64, dtype)
    x = torch.randn(3, 64).to(dtype)
    before = packed_linear(x, packed)
    weight.fill_(float("nan"))
    assert torch.equal(packed_linear(x, packed), before)
    gone = weakref.ref(weight)
    del weight
    gc.collect()
    assert gone() is None


def test_transposed_weights_are_packed_by_value():
    weight = torch.randn(64, 128).to(torch.bfloat16).t()
    packed = pack_weight(weight)
    if packed is None:
        pytest.skip("this CPU packs no bfloat16")
    x = torch.randn(4, 64).to(torch.bfloat16)
    _assert_is_rounded_dot_product(packed_linear(x, packed), x, weight, None)


def test_what_cannot_be_packed_is_left_alone():
    assert pack_weight(torch.ones(4, 4, dtype=torch.float64)) is None
    assert pack_weight(torch.ones(4, dtype=torch.bfloat16)) is None
    assert pack_weight(torch.ones(0, 4, dtype=torch.bfloat16)) is None
    assert pack_weight(torch.ones(4, 4, dtype=torch.bfloat16, device="meta")) is None


def test_bad_arguments_are_refused():
    _, packed = _packed(96, 48, torch.float32)
    with pytest.raises(RuntimeError):
        packed_linear(torch.ones(1, 48, dtype=torch.bfloat16), packed)
    with pytest.raises(RuntimeError):
        packed_linear(torch.ones(1, 47), packed)
    hidden = PackedWeight(packed.opaque, packed.shape, packed.dtype, None)
    with pytest.raises(ValueError, match="plain weight"):
        packed_rows(hidden, torch.zeros(1, dtype=torch.int64))
