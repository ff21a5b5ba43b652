"""What the fused kernels compute, in PyTorch's own operations: for the ablation, on any device.

It uses the kernels' references where it can. Three references cannot serve and are written anew here: they suit a CPU
(small tiles, a loop over the entries), or wait for the device, which a CUDA graph cannot capture. Here a padding entry,
whose results are unused, repeats what the first entry writes, so that shapes do not depend on the number of them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from nanovllm.kernels.attention import paged_decode
from nanovllm.kernels.attention import qk_norm_rope_store as rope_store
from nanovllm.kernels.attention.cpu_attention import CpuDecodePlan
from nanovllm.kernels.attention.decode_splits import DecodeSplits
from nanovllm.kernels.linear import silu_mul, skinny_linear
from nanovllm.kernels.norm import rms_norm
from nanovllm.kernels.sampling import sample
from nanovllm.kernels.sampling.sample import SamplingTensors
from nanovllm.sampling_params import MIN_TEMPERATURE


@contextmanager
def plain_kernels() -> Iterator[None]:
    """The fused kernels' plain forms in their place, for engines that are made and run inside."""
    plain = {
        rms_norm.rms_norm: rms_norm.rms_norm_reference,
        rms_norm.add_rms_norm: rms_norm.add_rms_norm_reference,
        silu_mul.silu_mul: plain_silu_mul,
        skinny_linear.skinny_linear: plain_skinny_linear,
        rope_store.qk_norm_rope_store: plain_qk_norm_rope_store,
        paged_decode.paged_decode: plain_paged_decode,
        sample.sample: plain_sample,
    }
    with replaced(plain):
        yield


@contextmanager
def replaced(functions: dict[Callable, Callable]) -> Iterator[None]:
    """Put functions in the place of others wherever a module of nanovllm that is imported knows them.

    Enter it once an engine has been made, for that imports what engines need. Raises RuntimeError if only the module
    that defines a function knows it: then no caller would run the other one.
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
    gated: bool = False,
    in_slices: bool = False,
) -> torch.Tensor:
    """The product as it is, its gate apart and its slices summed."""
    out = _skinny_linear(x, weight, bias)
    return plain_silu_mul(out) if gated else out


def plain_silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gate_up [tokens, 2 * size]` -> `[tokens, size]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up).to(gate_up.dtype)


def plain_qk_norm_rope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    *_: object,
) -> torch.Tensor:
    """`qk_norm_rope_store`; where a token of a batch pads it (slot -1), the first must not."""
    block_size = k_cache.shape[2]
    q, k, v = _plain_heads(qkv, q_weight, k_weight, eps, positions, cos_sin, k_cache.shape, num_heads)
    source = _padding_repeats_first(slot_mapping)
    slot = slot_mapping[source].clamp(min=0)
    block, offset = slot // block_size, slot % block_size
    k_cache[block, :, offset] = k[source]
    v_cache[block, :, offset] = v[source]
    return q


def plain_paged_decode(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    plan: DecodeSplits | CpuDecodePlan,
    scale: float,
    out: torch.Tensor,
) -> None:
    """`paged_decode` with norms and RoPE apart; the store stays with the attention."""
    positions = (seq_lens - 1).clamp(min=0)
    heads = _plain_heads(qkv, q_weight, k_weight, eps, positions, cos_sin, k_cache.shape, out.shape[1])
    done = torch.cat(heads, dim=1).flatten(1)
    if isinstance(plan, CpuDecodePlan):
        stores = plan.rope_store
        plan = replace(plan, rope_store=replace(stores, cos=stores.cos[..., :0], sin=stores.sin[..., :0]))
    cache = (k_cache, v_cache, block_table, rows, seq_lens)
    _paged_decode(done, None, None, 0.0, cos_sin[:, :0], *cache, plan, scale, out)


def _plain_heads(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    cache_shape: torch.Size,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k, normalized and rotated, and v: each `[tokens, heads, head_dim]`."""
    _, num_kv_heads, _, head_dim = cache_shape
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions.long(), None].split(half, dim=-1)  # [tokens, 1, half]

    def normalize_and_rotate(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x.float()
        if weight is not None:
            x = F.rms_norm(x, (head_dim,), weight.float(), eps)
        a, b, rest = x.split([half, half, head_dim - 2 * half], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(qkv.dtype)

    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
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
    """`sample` of what the benchmark asks for, a temperature and nothing else, with noise of PyTorch's generator."""
    rows, seq_lens = rows[: len(logits)], seq_lens[: len(logits)].long()
    row = rows.clamp(min=0).long()
    temperature = params.temperature[row, None]  # [entries, 1]
    scores = logits.float() / temperature.clamp(min=MIN_TEMPERATURE)
    noise = torch.empty_like(scores).exponential_().log_().neg_()  # Gumbel's
    token = torch.where(temperature < MIN_TEMPERATURE, scores, scores + noise).argmax(dim=-1).int()
    out.copy_(token.masked_fill(rows < 0, 0))
    source = _padding_repeats_first(rows)
    token_ids[row[source], seq_lens[source]] = token[source]


def _padding_repeats_first(index: torch.Tensor) -> torch.Tensor:
    """Of each entry itself, or of the first if it pads (is negative): which entry it stands for."""
    return torch.where(index >= 0, torch.arange(len(index), device=index.device), 0)
