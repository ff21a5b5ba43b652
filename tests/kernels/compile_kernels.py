"""Compiles all kernels for a GPU on a machine without one, and prints their names.

With tests/ on PYTHONPATH: python compile_kernels.py [compute capability: 90, Hopper's, by default; 80, 86, 89, 100, …]

It calls the launchers as ever, but a launch only compiles. On a CPU the other tests use Triton's interpreter, which
accepts what the compiler refuses, such as a variable whose type changes in a loop. This is a program of its own because
it must import Triton as a compiler.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from inside import launch_kernels_early, tiling_of_product
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nanovllm.kernels.attention import paged_decode_kernel, paged_prefill_kernel
from nanovllm.kernels.attention.decode_splits import DecodeSplits, split_contexts_triton
from nanovllm.kernels.attention.paged_decode_kernel import paged_decode_triton
from nanovllm.kernels.attention.paged_prefill_kernel import paged_prefill_triton
from nanovllm.kernels.attention.qk_norm_rope_store import qk_norm_rope_store_triton
from nanovllm.kernels.linear import skinny_linear
from nanovllm.kernels.linear.gate_mul import gate_mul_triton
from nanovllm.kernels.linear.skinny_linear import skinny_linear_triton
from nanovllm.kernels.moe import experts as moe_experts
from nanovllm.kernels.moe.experts import ExpertWeights, sum_experts_triton
from nanovllm.kernels.moe.route import route_triton
from nanovllm.kernels.moe.tilings import TILINGS, Tiling
from nanovllm.kernels.norm.all_reduce import PeerBuffers, make_inboxes, one_shot_add_rms_norm, one_shot_all_reduce
from nanovllm.kernels.norm.rms_norm import (
    add_rms_norm_triton,
    rms_norm_triton,
)
from nanovllm.kernels.prepare_inputs import StepInputs, prepare_inputs_triton
from nanovllm.kernels.sampling.logprobs import summarize_triton
from nanovllm.kernels.sampling.sample_kernel import sample_triton
from nanovllm.kernels.sampling.tensors import SamplingTensors, TokenBits
from nanovllm.kernels.sampling.token_masks import mask_triton

CAPABILITY = int(sys.argv[1]) if len(sys.argv) > 1 else 90
TARGET = GPUTarget("cuda", CAPABILITY, 32)
KIB_OF_SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SEQS, VOCAB = 3, 1000


class AbsentDevice:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def compile_instead_of_launching() -> set[str]:
    """Make every launch compile only, from here on. Returns a set, to which it adds the compiled kernels' names."""
    compiled: set[str] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **options: Any) -> Any:
        compiled.add(self.fn.__name__)
        kernel = run(self, *args, warmup=True, **options)
        if kernel.metadata.shared > KIB_OF_SHARED_MEMORY[CAPABILITY] << 10:
            sys.exit(f"{self.fn.__name__} takes {kernel.metadata.shared} bytes of shared memory, with {options}")
        return kernel

    driver.set_active(AbsentDevice())
    JITFunction.run = compile_only
    for module in (moe_experts, paged_decode_kernel, paged_prefill_kernel, skinny_linear):
        module.shared_memory_bytes = lambda device: KIB_OF_SHARED_MEMORY[CAPABILITY] << 10
    if CAPABILITY >= 90:
        launch_kernels_early()
    else:
        paged_decode_kernel.is_hopper = lambda device: False
    return compiled


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.int32)


def call_linear_kernels() -> None:
    x, weight = zeros(SEQS, 1024), zeros(1024)
    rms_norm_triton(x, weight, 1e-6)
    add_rms_norm_triton(x, x.clone(), weight, 1e-6)
    gate_mul_triton(zeros(SEQS, 2048))
    gate_mul_triton(zeros(SEQS, 2048), "gelu")
    for rows in (1, 3, 20, 40, 60, 90, 100, 180, 200):
        for n in (128, 6144, 8192):
            for options in ({}, {"gate": "silu"}, {"gate": "gelu"}, {"in_slices": True}):
                if options == {"gate": "gelu"} and rows > 3:
                    continue  # silu's kernels, but for a constant
                if rows == 1 or tiling_of_product(rows, n, 1024, "gate" in options, "in_slices" in options):
                    out = skinny_linear_triton(zeros(rows, 1024), zeros(n, 1024), bias=zeros(n), **options)
                    if "in_slices" in options:
                        add_rms_norm_triton(out, zeros(rows, n), zeros(n), 1e-6)
    addresses, stop = zeros(3, dtype=torch.int64), ints(1)
    peers = PeerBuffers(
        0, 2, 8, 1024, x.dtype, make_inboxes(2, 8, 1024, x.dtype, lambda s, t: torch.empty(s, dtype=t)), addresses,
        ints(8), stop,
    )  # fmt: skip
    one_shot_all_reduce(x, peers)
    one_shot_add_rms_norm(x, x.clone(), weight, 1e-6, peers)
    one_shot_add_rms_norm(zeros(2, SEQS, 1024, dtype=torch.float32), x.clone(), weight, 1e-6, peers)


def call_moe_kernels() -> None:
    """Every shape of tiles, few pairs and sorted ones; an expert's size that no tile divides; float32."""
    num, k, hidden_size = 4, 2, 2880
    biases = zeros(num, 2 * 360), zeros(num, hidden_size)
    plain = ExpertWeights(zeros(num, 512, hidden_size), zeros(num, hidden_size, 256), None, None, "silu", 0, num)
    clamped = ExpertWeights(zeros(num, 720, hidden_size), zeros(num, hidden_size, 360), *biases, "clamped", 0, num)
    for most in TILINGS:
        tokens = min(most, 500) * num // k
        weights, ids = route_triton(zeros(tokens, num), k, True)
        sum_experts_triton(zeros(tokens, hidden_size), weights, ids, clamped, in_slices=True)
    shorter_than_a_cache_line = Tiling(16, 16, 32, 2)
    most_pairs = (replace(tiling, copy_engine=False) for tiling in TILINGS[max(TILINGS)])
    for tilings in (TILINGS[min(TILINGS)], tuple(most_pairs), (shorter_than_a_cache_line,) * 2):
        sum_experts_triton(zeros(tokens, hidden_size), weights, ids, plain, tilings=tilings)
    weights, ids = route_triton(zeros(1, num), k, False)
    sum_experts_triton(zeros(1, hidden_size), weights, ids, plain, in_slices=True)
    weights_and_biases = (clamped.gate_up, clamped.down, clamped.gate_up_bias, clamped.down_bias)
    exact = ExpertWeights(*(tensor.float() for tensor in weights_and_biases), "clamped", 0, num)
    for tokens in (1, 200):
        weights, ids = route_triton(zeros(tokens, num, dtype=torch.float32), k, False)
        sum_experts_triton(zeros(tokens, hidden_size, dtype=torch.float32), weights, ids, exact)


def call_attention_kernels(
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    has_norm: bool,
    rotary_dim: int | None = None,
    heads: int = 16,
    window: int | None = None,
    **changes: Any,
) -> None:
    kv_heads, lens = 8, ints(SEQS) + 1
    k_cache, v_cache = zeros(2, 4, kv_heads, block_size, head_dim, dtype=dtype).unbind(0)
    table, rows, starts = ints(4, 4), ints(SEQS), torch.arange(SEQS + 1, dtype=torch.int32)
    qkv = zeros(SEQS, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cos_sin = zeros(9, head_dim if rotary_dim is None else rotary_dim, dtype=torch.float32)
    weight = zeros(head_dim, dtype=dtype) if has_norm else None
    norms, cache = (weight, weight, 1e-6), (k_cache, v_cache)
    slots = zeros(SEQS, dtype=torch.int64)
    q = qk_norm_rope_store_triton(qkv, *norms, ints(SEQS), cos_sin, slots, *cache, heads)
    paged_prefill_triton(q, *cache, table, rows, starts, lens, 0.1, torch.empty_like(q), window=window, **changes)
    splits = DecodeSplits.allocate(SEQS, heads, kv_heads, head_dim, "cpu", target_splits=8, min_split=128)
    split_contexts_triton(lens, kv_heads, splits, window)
    paged_decode_triton(qkv, *norms, cos_sin, *cache, table, rows, lens, splits, 0.1, torch.empty_like(q), **changes)
    for num_groups in (1, 7):
        inputs = StepInputs(ints(SEQS), ints(SEQS), zeros(num_groups, SEQS, dtype=torch.int64), lens)
        prepare_inputs_triton(rows, starts, ints(4, 9), ints(4), ints(num_groups, 4, 4), block_size, inputs)


def call_sampler(dtype: torch.dtype) -> None:
    by_row, numbers = zeros(4, dtype=torch.float32), ints(4)
    params = SamplingTensors(by_row, numbers, by_row, by_row, numbers, numbers, numbers, ints(4, 64))
    summarize_triton(zeros(SEQS, VOCAB, dtype=dtype), ints(SEQS))
    masks = TokenBits(zeros(2, dtype=torch.int64), ints(2, VOCAB // 32 + 1))
    for of_some in (None, masks):
        sample_triton(zeros(SEQS, VOCAB, dtype=dtype), ints(SEQS), ints(SEQS), params, ints(4, 9), ints(SEQS), of_some)
    mask_triton(zeros(SEQS, VOCAB, dtype=torch.float32), masks.entries, masks.bits)


if __name__ == "__main__":
    names = compile_instead_of_launching()
    call_linear_kernels()
    call_moe_kernels()
    call_attention_kernels(128, 256, torch.bfloat16, has_norm=True)
    paged_decode_kernel.multiprocessors = lambda device: 1  # many programs for each
    call_attention_kernels(128, 256, torch.bfloat16, has_norm=True)
    call_attention_kernels(80, 48, torch.float32, has_norm=False)
    call_attention_kernels(128, 256, torch.bfloat16, has_norm=True, rotary_dim=0)
    bf16 = torch.bfloat16
    call_attention_kernels(64, 256, bf16, has_norm=False, heads=64, window=128, sinks=zeros(64))
    call_attention_kernels(96, 48, bf16, has_norm=False, rotary_dim=72, window=2047, soft_cap=30.0, sinks=zeros(16))
    call_attention_kernels(256, 256, bf16, has_norm=True, window=4096, soft_cap=50.0)
    call_attention_kernels(256, 16, bf16, has_norm=False, soft_cap=50.0, sinks=zeros(16))
    call_sampler(torch.bfloat16)
    call_sampler(torch.float32)
    print(*sorted(names))
