"""Stand-ins for the fused kernels in plain PyTorch, with which the ablation measures what the kernels gain.

A kernel's reference is the stand-in if it is a few dense operations. Other references loop over the entries, work in
pieces that fit a CPU's cache, or wait for the device, which no CUDA graph can capture; for those, this file has dense
stand-ins for any device. Padding entries repeat the first entry's writes, so that shapes do not depend on their number;
the engine reads none of their results.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from nanovllm.kernels.attention import paged_decode
from nanovllm.kernels.attention import qk_norm_rope_store as rope_store
from nanovllm.kernels.attention.contract import AttentionSpec, ChunkBatch, DecodeBatch, KVCache
from nanovllm.kernels.linear import gate_mul, skinny_linear
from nanovllm.kernels.linear.gate_mul import Gate
from nanovllm.kernels.norm import rms_norm
from nanovllm.kernels.sampling import sample
from nanovllm.kernels.sampling.tensors import SamplingTensors
from nanovllm.sampling_params import MIN_TEMPERATURE


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Replace the kernels by the stand-ins, for engines that the caller makes and runs inside."""
    plain = {
        rms_norm.rms_norm: rms_norm.rms_norm_reference,
        rms_norm.add_rms_norm: rms_norm.add_rms_norm_reference,
        rms_norm.norm_add_rms_norm: rms_norm.norm_add_rms_norm_reference,
        gate_mul.gate_mul: plain_gate_mul,
        skinny_linear.skinny_linear: plain_skinny_linear,
        rope_store.qk_norm_rope_store: plain_qk_norm_rope_store,
        paged_decode.paged_decode: plain_paged_decode,
        sample.sample: plain_sample,
    }
    with replaced(plain):
        yield


@contextmanager
def replaced(functions: dict[Callable, Callable]) -> Iterator[None]:
    """Replace functions, old -> new, in all imported modules of nanovllm that have the old one by name.

    Enter it after making an engine, which imports the modules that engines need. Raises RuntimeError if only its own
    module has the old function: then no engine would run the new one.
    """
    places = []
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "nanovllm"]
    for old, new in functions.items():
        own = [(module, name, old, new) for module in modules for name, value in vars(module).items() if value is old]
        if all(module.__name__ == old.__module__ for module, *_ in own):
            raise RuntimeError(f"{old.__module__}.{old.__name__} is used by no module that is imported")
        places += own
    for module, name, _, new in places:
        setattr(module, name, new)
    try:
        yield
    finally:
        for module, name, old, _ in places:
            setattr(module, name, old)


_skinny_linear = skinny_linear.skinny_linear
_paged_decode = paged_decode.paged_decode


def plain_skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gate: Gate | None = None,
    in_slices: bool = False,
) -> torch.Tensor:
    """The kernel's product, never in slices, then the gate as operations of its own."""
    out = _skinny_linear(x, weight, bias)
    return plain_gate_mul(out, gate) if gate else out


def plain_gate_mul(gate_up: torch.Tensor, gate: Gate = "silu") -> torch.Tensor:
    """`gate_up [tokens, 2 * size]` -> `[tokens, size]`."""
    x, up = gate_up.chunk(2, dim=-1)
    x = F.silu(x.float()) if gate == "silu" else F.gelu(x.float(), approximate="tanh")
    return (x * up).to(gate_up.dtype)


def plain_qk_norm_rope_store(
    qkv: torch.Tensor, spec: AttentionSpec, cache: KVCache, chunks: ChunkBatch
) -> torch.Tensor:
    """`qk_norm_rope_store`. The first token must not be a padding entry (slot -1)."""
    block_size = cache.k.shape[2]
    q, k, v = _plain_heads(qkv, spec, chunks.positions)
    source = _padding_repeats_first(chunks.slot_mapping)
    slot = chunks.slot_mapping[source].clamp(min=0)
    block, offset = slot // block_size, slot % block_size
    cache.k[block, :, offset] = k[source]
    cache.v[block, :, offset] = v[source]
    return q


def plain_paged_decode(
    qkv: torch.Tensor, spec: AttentionSpec, cache: KVCache, decodes: DecodeBatch, out: torch.Tensor
) -> None:
    """`paged_decode` with norms and RoPE as operations of their own; the kernel still stores and attends."""
    heads = _plain_heads(qkv, spec, (decodes.seq_lens - 1).clamp(min=0))
    done = torch.cat(heads, dim=1).flatten(1)
    _paged_decode(done, replace(spec, rope=None, q_norm=None, k_norm=None), cache, decodes, out)


def _plain_heads(
    qkv: torch.Tensor, spec: AttentionSpec, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k, normalized and rotated, and v: each `[tokens, heads, head_dim]`."""
    head_dim, cos_sin = spec.head_dim, spec.cos_sin(qkv.device)
    q_weight, k_weight, eps = spec.norms
    half = cos_sin.shape[1] // 2
    place = positions.long() if spec.rope else 0  # without RoPE there is one rotation, of no dimension
    cos, sin = cos_sin[place, None].chunk(2, dim=-1)  # [tokens, 1, half]

    def normalize_and_rotate(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x.float()
        if weight is not None:
            x = F.rms_norm(x, (head_dim,), weight.float(), eps)
        a, b, rest = x.split([half, half, head_dim - 2 * half], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(qkv.dtype)

    sizes = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split(sizes, dim=1)
    return normalize_and_rotate(q, q_weight), normalize_and_rotate(k, k_weight), v


def plain_sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    params: SamplingTensors,
    token_ids: torch.Tensor,
    out: torch.Tensor,
    *_: object,
) -> None:
    """`sample` with a temperature alone, the one parameter that the benchmark sets; PyTorch draws the noise."""
    rows, seq_lens = rows[: len(logits)], seq_lens[: len(logits)].long()
    row = rows.clamp(min=0).long()
    temperature = params.temperature[row, None]  # [entries, 1]
    scores = logits.float() / temperature.clamp(min=MIN_TEMPERATURE)
    noise = torch.empty_like(scores).exponential_().log_().neg_()  # Gumbel noise
    token = torch.where(temperature < MIN_TEMPERATURE, scores, scores + noise).argmax(dim=-1).int()
    out.copy_(token.masked_fill(rows < 0, 0))
    source = _padding_repeats_first(rows)
    token_ids[row[source], seq_lens[source]] = token[source]


def _padding_repeats_first(index: torch.Tensor) -> torch.Tensor:
    """For each entry the entry that it repeats: itself, or the first if it is padding (negative)."""
    return torch.where(index >= 0, torch.arange(len(index), device=index.device), 0)
