"""Promises of the product with few rows, kept by the kernels (interpreted on a CPU) and the library beside them."""

import pytest
import torch
from inside import kernel_takes, replace_skinny_launch, slices_of_product, tiles_cut_to_fit, tiling_of_product

from nanovllm.kernels.linear import skinny_linear as kernels
from nanovllm.kernels.linear import skinny_tilings
from nanovllm.kernels.linear.gate_mul import gate_mul

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
    (60, 40, 512),
    (70, 40, 256),
    (100, 72, 512),
    (130, 72, 512),
    (193, 65, 256),
]


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


def assert_is_rounded_gate(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, kind: str = "silu"
) -> None:
    """The bound: silu' and gelu' are at most 1.2, silu(g) and gelu(g) at most |g|: so errors carry over."""
    gate, up = (x.double() @ weight.double().T + bias.double()).chunk(2, dim=1)
    magnitude = (x.double().abs() @ weight.double().abs().T + bias.double().abs()).chunk(2, dim=1)
    z = gate if kind == "silu" else 2 * (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    exact = gate * torch.sigmoid(z) * up
    error = (1.2 * magnitude[0] * up.abs() + gate.abs() * magnitude[1]) * torch.finfo(torch.float32).eps * 8
    allowed = error + exact.abs() * torch.finfo(out.dtype).eps / 2
    if out.dtype == torch.float16:
        allowed += 2.0**-25
    assert out.dtype == x.dtype and out.shape == exact.shape and out.is_contiguous()
    assert bool(((out.double() - exact).abs() <= allowed).all())


@pytest.fixture(params=[skinny_tilings.LARGE, 0], ids=["small", "large"], autouse=True)
def least_elements_of_large_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether weights of a test's size, which the interpreter can manage, count as large ones."""
    monkeypatch.setattr(skinny_tilings, "LARGE", request.param)
    monkeypatch.setattr(skinny_tilings, "NARROW", 0)


def multiply(x: torch.Tensor, weight: torch.Tensor, *args: object, **options: bool) -> torch.Tensor:
    """The kernel's product. If there is no tiling for it, checks that the kernel refuses it, and skips the test."""
    asked = [options.get("gate") is not None, options.get("in_slices", False)]
    if len(x) == 1 or tiling_of_product(len(x), *weight.shape, *asked):
        return kernels.skinny_linear_triton(x, weight, *args, **options)
    with pytest.raises(ValueError, match="that has tiles"):
        kernels.skinny_linear_triton(x, weight, *args, **options)
    pytest.skip("a product for the library, and refused")


@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(m, 2 * n, k) for m, n, k in SHAPES])
def test_a_gated_product_is_swiglu_or_geglu_rounded_once(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: str, device: str
):
    x, weight, bias = draw(shape, dtype, device)
    weight *= 0.05  # products of float16 would overflow
    assert_is_rounded_gate(multiply(x, weight, bias, gate=kind), x, weight, bias, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype, device: str):
    x, weight, bias = draw(shape, dtype, device)
    assert_is_rounded_product(multiply(x, weight), x, weight, None)
    assert_is_rounded_product(multiply(x, weight, bias), x, weight, bias)


def assert_slices_sum_to_the_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
    """The slices' sum is as exact as one sum in float32."""
    if out.dim() == 3:
        assert out.dtype == torch.float32 and out.shape[0] > 1
        out = out.sum(dim=0).to(x.dtype)
    assert_is_rounded_product(out, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_sum_to_the_product_and_only_one_has_the_bias(shape, dtype: torch.dtype, device: str):
    x, weight, bias = draw(shape, dtype, device)
    out = multiply(x, weight, bias, in_slices=True)
    assert_slices_sum_to_the_product(out, x, weight, bias)
    is_split = shape[0] > 1 and shape[2] >= 2 * skinny_tilings.MIN_SLICE  # so small a weight is, if it can be
    assert (out.dim() == 3) == is_split


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 31, 48, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("kind", ["plain", "in_slices", "gate"])
def test_the_product_is_rounded_once_at_a_models_sizes(num_tokens: int, kind: str, device: str):
    options = {"plain": {}, "in_slices": {"in_slices": True}, "gate": {"gate": "silu"}}[kind]
    exact = {"plain": assert_is_rounded_product, "in_slices": assert_slices_sum_to_the_product}
    for n, k in [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]:
        x, weight, bias = draw((num_tokens, n, k), torch.bfloat16, device)
        exact.get(kind, assert_is_rounded_gate)(multiply(x, weight, bias, **options), x, weight, bias)


def test_products_have_the_tiles_that_were_chosen_for_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # the real bounds of large and narrow weights
    small, large, none = skinny_tilings.TILINGS, skinny_tilings.LARGE_TILINGS, {}
    for (n, k), tables in [  # of a plain product, one in slices, a gated one
        ((1024, 2048), (small, small, small)),
        ((4096, 1024), (small, large, small)),
        ((8192, 4096), (large, large, large)),
        ((4096, 4096), (none, large, none)),
        ((32768, 4096), (none, none, none)),
    ]:
        for num_tokens in (2, 16, 17, 32, 33, 48, 49, 64, 65, 96, 97, 128, 129, 192, 193, 256, 257):
            for kind, (table, asked) in enumerate(zip(tables, ((0, 0), (0, 1), (1, 0)), strict=True)):
                row = next((tilings for most, tilings in table.items() if num_tokens <= most), (None, None, None))
                assert tiling_of_product(num_tokens, n, k, *asked) == row[kind]


@pytest.mark.parametrize(
    ("programs", "k", "longest", "slices"),
    [
        (16, 2048, 1 << 30, 8),  # Qwen3-0.6B's output projection: 128 programs
        (16, 3072, 1 << 30, 6),  # 96 programs are enough
        (64, 12288, 3584, 4),  # Qwen3-8B's down projection: shorter slices are wanted
        (40, 10240, 1 << 30, 2),  # Gemma 3 4B's: 4 slices would be 160 programs, of which 28 begin when 132 have ended
        (45, 4096, 1 << 30, 2),
        (300, 4096, 1 << 30, 1),
    ],
)
def test_slices_fill_the_device_and_leave_no_few_programs_over(
    programs: int, k: int, longest: int, slices: int, monkeypatch: pytest.MonkeyPatch
):
    assert slices_of_product(monkeypatch, programs, k, longest, multiprocessors=132) == slices


def test_what_the_kernel_is_not_for_is_left_to_the_library(device: str, monkeypatch: pytest.MonkeyPatch):
    replace_skinny_launch(monkeypatch, lambda *args: pytest.fail("the kernel was called"))
    x, weight, bias = (t.to(device) for t in draw((3, 8, 256), torch.float32, "cpu"))
    assert kernel_takes(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), None, False)
    for a, w in [
        (x, weight),  # float32
        (x[:, :100].bfloat16(), weight[:, :100].bfloat16()),  # an odd K
        (x[:0].bfloat16(), weight.bfloat16()),
        (x.bfloat16().repeat(90, 1), weight.bfloat16()),  # many rows
        (x.bfloat16().repeat(1, 2)[:, 3 : 3 + 256], weight.bfloat16()),  # rows that begin at odd places
    ]:
        assert not any(kernel_takes(a, w, None, gate, slices) for gate, slices in ((None, 0), (None, 1), ("silu", 0)))
        assert torch.equal(kernels.skinny_linear(a, w), torch.nn.functional.linear(a, w))
        assert torch.equal(kernels.skinny_linear(a, w, in_slices=True), torch.nn.functional.linear(a, w))
        expected = gate_mul(torch.nn.functional.linear(a, w))
        assert torch.equal(kernels.skinny_linear(a, w, gate="silu"), expected)


def test_few_rows_on_a_gpu_take_the_kernel(device: str, monkeypatch: pytest.MonkeyPatch):
    if device != "cuda":
        pytest.skip("the kernel is for GPUs")
    x, weight, bias = draw((3, 512, 1024), torch.bfloat16, device)
    calls = []
    replace_skinny_launch(monkeypatch, lambda *args: calls.append(args) or x)
    kernels.skinny_linear(x, weight, bias)
    assert len(calls) == 1


@pytest.mark.parametrize("kib", [64, 99, 163, 227])  # of a program, from the oldest GPUs that know bfloat16 to Hopper
def test_tiles_fit_the_devices_shared_memory(kib: int):
    tables = (skinny_tilings.TILINGS, skinny_tilings.LARGE_TILINGS)
    tilings = [tiling for table in tables for row in table.values() for tiling in row if tiling]
    for tiling in tilings:
        for columns in (256, 384, 1024):
            tile_k, depth = tiles_cut_to_fit(tiling, columns, 2, kib * 1024)
            assert columns % tile_k == 0 and tile_k >= 16 and depth >= 2
            assert depth * tile_k * (tiling.rows + tiling.weight_rows) * 2 <= kib * 1024
            if kib == 227:  # what they were made for: nothing is cut
                assert tile_k == min(tiling.columns, columns & -columns)
                assert depth == min(tiling.depth, max(2, columns // tile_k))


def test_what_the_kernels_cannot_take_is_refused(device: str):
    x, weight, bias = draw((3, 8, 256), torch.bfloat16, device)
    x, many = x.contiguous(), x.repeat(86, 1)
    unaligned = torch.zeros(weight.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(weight)
    refused = {
        "an odd K": (x[:, :128].contiguous(), weight[:, :128].contiguous(), None, False, False),
        "another K": (x, torch.zeros(8, 512, dtype=x.dtype, device=device), None, False, False),
        "no rows": (x[:0], weight, None, False, False),
        "many rows": (many, weight, None, False, False),
        "rows that begin at odd places": (x.repeat(1, 2)[:, 3 : 3 + 256], weight, None, False, False),
        "a weight that begins at an odd place": (x, unaligned, None, False, False),
        "a weight in columns": (x, weight.T.contiguous().T, None, False, False),
        "float32": (x.float(), weight.float(), None, False, False),
        "two dtypes": (x, weight.half(), None, False, False),
        "a short bias": (x, weight, bias[:5], False, False),
        "half of an odd number": (x, weight[:7], None, True, False),
        "a gate of sums to come": (x, weight, None, True, True),
    }
    kernels.skinny_linear_triton(x, weight, bias)
    for name, arguments in refused.items():
        with pytest.raises(ValueError, match="must be a product of 1 to 256 rows that has tiles"):
            pytest.fail(f"{name} was taken: {kernels.skinny_linear_triton(*arguments)}")


def test_a_product_that_fits_no_weight_is_an_error(device: str):
    x, weight, bias = draw((3, 8, 256), torch.bfloat16, device)
    for arguments in [(x, weight.repeat(1, 2)), (x, weight, bias[:5])]:
        with pytest.raises(RuntimeError):
            kernels.skinny_linear(*arguments)
