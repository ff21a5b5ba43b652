"""Chains of elementwise operations, compiled on a CPU."""

import shutil

import pytest
import torch
from torch import nn

from nanovllm.layers import pointwise
from nanovllm.layers.pointwise import Chain, compile_chains

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU torch.compile needs a C++ compiler")
TOKENS, SIZE = 24, 64


def bfloat16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def cases() -> dict[str, tuple[Chain, tuple]]:
    torch.manual_seed(0)
    x, weight = bfloat16(TOKENS, SIZE), torch.rand(SIZE) + 0.5
    positions = torch.arange(TOKENS, dtype=torch.int32) * 700
    return {
        "cap": (pointwise.cap, (10 * x, 3.0)),
        "norm_add": (pointwise.norm_add, (x, bfloat16(TOKENS, SIZE), weight, 1e-6)),
        "norm_add of slices": (
            pointwise.norm_add, (torch.randn(4, TOKENS, SIZE), bfloat16(TOKENS, SIZE), weight, 1e-6)
        ),
        "grow_queries": (pointwise.grow_queries, (x, positions, SIZE // 2, 0.1, 4096)),
        "scale_heads": (pointwise.scale_heads, (x, torch.rand(TOKENS, 2), weight[: SIZE // 2], SIZE // 4, 1e-6)),
    }  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", cases())
@torch.inference_mode()
def test_a_compiled_chain_rounds_to_16_bits_where_the_plain_one_does(name: str) -> None:
    """A compiler that keeps the numbers between two roundings in float32 changes a quarter of the sums' last bits."""
    chain, args = cases()[name]
    module = nn.Module()
    module.chains, module.chain = ("chain",), chain
    compile_chains(module)
    assert (chain(*args) != module.chain(*args)).float().mean() < 0.002  # a sum's order may tip a few
