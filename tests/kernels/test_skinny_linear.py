"""Promises of the small-batch linear layer, kept by the kernels (interpreted on a CPU) and whoever they leave it to."""

import pytest
import torch

from nanovllm.kernels import skinny_linear as kernels
from nanovllm.kernels.silu_mul import silu_mul

DTYPES = [torch.bfloat16, torch.float16]
# rows of x, N, K: narrow and wide weights, N no multiple of a tile, every number of tiles along K
SHAPES = [
    (1, 24, 1024),
    (1, 5, 2304),
    (2, 24, 256),
    (7, 9, 1280),
    (16, 40, 3072),
    (17, 33, 512),
    (33, 24, 768),
    (70, 40, 256),
    (130, 72, 512),
    (193, 65, 256),
]
WEIGHTS = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
GPU_SHAPES = [(m, n, k) for m in (1, 3, 16, 31, 64, 65, 128, 129, 256) for n, k in WEIGHTS]


def draw(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x as columns of a wider tensor, a weight and a bias."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(sum(shape))
    wide = torch.randn(m, k + 16, generator=generator)
    weight = torch.randn(n, k, generator=generator)
    bias = torch.randn(n, generator=generator) * 30
    wide, weight, bias = (t.to(device, dtype) for t in (wide, weight, bias))
    return wide[:, 8 : 8 + k], weight, bias


def assert_is_rounded_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """One rounding to the dtype, on top of float32 sums in any order."""
    exact, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    allowed = exact.abs() * torch.finfo(out.dtype).eps / 2 + magnitude * torch.finfo(torch.float32).eps * 8
    if out.dtype == torch.float16:
        allowed += 2.0**-25  # half the spacing of its subnormals
    assert out.dtype == x.dtype and out.shape == exact.shape and out.is_contiguous()
    assert bool(((out.double() - exact).abs() <= allowed).all())


def assert_is_rounded_swiglu(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """silu' is at most 1.1 and |silu(g)| at most |g|: what sums lose of gate and up, the result loses."""
    gate, up = (x.double() @ weight.double().T + bias.double()).chunk(2, dim=1)
    magnitude = (x.double().abs() @ weight.double().abs().T + bias.double().abs()).chunk(2, dim=1)
    exact = gate * torch.sigmoid(gate) * up
    error = (1.1 * magnitude[0] * up.abs() + gate.abs() * magnitude[1]) * torch.finfo(torch.float32).eps * 8
    allowed = error + exact.abs() * torch.finfo(out.dtype).eps / 2
    if out.dtype == torch.float16:
        allowed += 2.0**-25
    assert out.dtype == x.dtype and out.shape == exact.shape and out.is_contiguous()
    assert bool(((out.double() - exact).abs() <= allowed).all())


@pytest.fixture(params=[kernels.LARGE, 0], ids=["small", "large"], autouse=True)
def least_elements_of_large_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """0: a test's weights, which the interpreter can manage, are all treated as large ones."""
    monkeypatch.setattr(kernels, "LARGE", request.param)
    monkeypatch.setattr(kernels, "NARROW", 0)


def multiply(x: torch.Tensor, weight: torch.Tensor, *args: object, **options: bool) -> torch.Tensor:
    """The kernel's product. Ends the test where there are no tiles for it, and it says so."""
    asked = [options.get(name, False) for name in ("gated", "in_parts")]
    if len(x) == 1 or kernels._tiling(len(x), *weight.shape, *asked):
        return kernels.skinny_linear_triton(x, weight, *args, **options)
    with pytest.raises(ValueError, match="must have tiles"):
        kernels.skinny_linear_triton(x, weight, *args, **options)
    pytest.skip("a product for the library, and refused")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(m, 2 * n, k) for m, n, k in SHAPES])
def test_a_gated_product_is_swiglu_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype, device: str):
    x, weight, bias = draw(shape, dtype, device)
    weight *= 0.05  # products of float16 would overflow
    assert_is_rounded_swiglu(multiply(x, weight, bias, gated=True), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype, device: str):
    x, weight, bias = draw(shape, dtype, device)
    assert_is_rounded_product(multiply(x, weight), x, weight, None)
    assert_is_rounded_product(multiply(x, weight, bias), x, weight, bias)


def assert_parts_sum_to_the_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
    """As exact as one sum in float32, before the sum of the parts is rounded."""
    if out.dim() == 3:
        assert out.dtype == torch.float32 and out.shape[0] > 1
        out = out.sum(dim=0).to(x.dtype)
    assert_is_rounded_product(out, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_sum_to_the_product_and_only_one_has_the_bias(shape, dtype: torch.dtype, device: str):
    x, weight, bias = draw(shape, dtype, device)
    out = multiply(x, weight, bias, in_parts=True)
    assert_parts_sum_to_the_product(out, x, weight, bias)
    assert (out.dim() == 3) == (shape[0] > 1 and shape[2] >= 2 * kernels.MIN_PART)  # so small a weight is always split


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_the_product_is_rounded_once_at_a_models_sizes(shape: tuple[int, int, int], device: str):
    x, weight, bias = draw(shape, torch.bfloat16, device)
    assert_is_rounded_product(multiply(x, weight, bias), x, weight, bias)
    assert_parts_sum_to_the_product(multiply(x, weight, bias, in_parts=True), x, weight, bias)
    assert_is_rounded_swiglu(multiply(x, weight, bias, gated=True), x, weight, bias)


def test_what_the_kernel_is_not_for_is_left_to_the_library(device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "skinny_linear_triton", lambda *args: pytest.fail("the kernel was called"))
    x, weight, bias = (t.to(device) for t in draw((3, 8, 256), torch.float32, "cpu"))
    for a, w in [
        (x, weight),  # float32
        (x[:, :100].bfloat16(), weight[:, :100].bfloat16()),  # an odd K
        (x[:0].bfloat16(), weight.bfloat16()),
        (x.bfloat16().repeat(90, 1), weight.bfloat16()),  # many rows
        (x.bfloat16().repeat(1, 2)[:, 3 : 3 + 256], weight.bfloat16()),  # rows that begin at odd places
    ]:
        assert torch.equal(kernels.skinny_linear(a, w), torch.nn.functional.linear(a, w))
        assert torch.equal(kernels.skinny_linear(a, w, in_parts=True), torch.nn.functional.linear(a, w))
        expected = silu_mul(torch.nn.functional.linear(a, w))
        assert torch.equal(kernels.skinny_linear(a, w, gated=True), expected)


def test_few_rows_on_a_gpu_take_the_kernel(device: str, monkeypatch: pytest.MonkeyPatch):
    if device != "cuda":
        pytest.skip("the kernel is for GPUs")
    x, weight, bias = draw((3, 512, 1024), torch.bfloat16, device)
    calls = []
    monkeypatch.setattr(kernels, "skinny_linear_triton", lambda *args: calls.append(args) or x)
    kernels.skinny_linear(x, weight, bias)
    assert len(calls) == 1


@pytest.mark.parametrize("kib", [64, 99, 163, 227])  # of a program, from the oldest GPUs that know bfloat16 to Hopper
def test_tiles_fit_the_devices_shared_memory(kib: int):
    tilings = [t for table in (kernels.TILINGS, kernels.LARGE_TILINGS) for row in table.values() for t in row if t]
    for tiling in tilings:
        for columns in (256, 384, 1024):
            tile_k, depth = kernels._fit(tiling, columns, 2, kib * 1024)
            assert columns % tile_k == 0 and tile_k >= 16 and depth >= 2
            assert depth * tile_k * (tiling.rows + tiling.weight_rows) * 2 <= kib * 1024
            if kib == 227:  # what they were made for: nothing is cut
                assert tile_k == min(tiling.columns, columns & -columns)
                assert depth == min(tiling.depth, max(2, columns // tile_k))


def test_bad_shapes_are_refused(device: str):
    x, weight, _ = draw((3, 8, 256), torch.bfloat16, device)
    with pytest.raises(ValueError, match="multiple of 256"):
        kernels.skinny_linear_triton(x[:, :100], weight[:, :100])
    with pytest.raises(ValueError, match="must have tiles"):
        kernels.skinny_linear_triton(x.repeat(86, 1), weight)
    with pytest.raises(ValueError, match="begin at multiples of 16 bytes"):
        kernels.skinny_linear_triton(x.repeat(1, 2)[:, 3 : 3 + 256], weight)
