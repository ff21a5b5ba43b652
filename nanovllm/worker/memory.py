"""How many blocks the KV cache gets: on a GPU measured by running, not estimated.

    cache = memory this engine may use - weights - peak of the largest step - what graphs and libraries keep

Blocks = cache bytes / bytes of one block.
"""

import logging
import math
import mmap
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nanovllm.cache_groups import CacheGroups, Windows, group_layers, most_blocks_in_all
from nanovllm.config import Config
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.attention.contract import AttentionSpec, KVCache
from nanovllm.layers.attention import Attention
from nanovllm.step_plan import NewRow, StepPlan
from nanovllm.worker.logit_extras import add_largest_extras

logger = logging.getLogger(__name__)

HEADROOM = 0.98  # of what is free: the allocator cannot place every last byte
DEFAULT_CPU_CACHE_BYTES = 4 << 30


@dataclass(slots=True)
class DeviceMemory:
    """The device's memory in bytes at one moment, taken before an engine loads anything."""

    free: int
    total: int
    allocated: int  # by this process through PyTorch: other engines'
    reserved: int

    @classmethod
    def now(cls) -> "DeviceMemory":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        free, total = torch.cuda.mem_get_info()
        return cls(free, total, torch.cuda.memory_allocated(), torch.cuda.memory_reserved())


def num_cache_blocks(
    config: Config,
    block_bytes: int,
    num_groups: int,
    before: DeviceMemory | None,
    run_largest_step: Callable[[], int],
    tp: TensorParallel,
    device: str,
) -> int:
    """How many blocks of `block_bytes` the cache gets: what the options say, or what the device has left.

    Args:
        before: the device's memory before the weights; None on a CPU.
        run_largest_step: runs what needs the most memory, and returns the bytes that captured graphs keep.

    Raises ValueError if there is no room for a block for each group of layers.
    """
    if config.num_kvcache_blocks is not None:
        num_blocks = config.num_kvcache_blocks
    elif config.kvcache_memory_bytes is not None or before is None:
        num_blocks = (config.kvcache_memory_bytes or DEFAULT_CPU_CACHE_BYTES) // block_bytes
    else:
        graph_bytes = run_largest_step()
        num_blocks = cache_bytes_left(before, config.gpu_memory_utilization, graph_bytes) // block_bytes
    num_blocks = tp.minimum(num_blocks, device)  # one plan serves all ranks
    if num_blocks < num_groups:
        what = "one block" if num_groups == 1 else f"{num_groups} blocks, one for each group of layers,"
        limit = f"gpu_memory_utilization={config.gpu_memory_utilization} or kvcache_memory_bytes="
        limit += str(config.kvcache_memory_bytes)
        if config.num_kvcache_blocks is not None:
            limit = f"num_kvcache_blocks={config.num_kvcache_blocks}"
        raise ValueError(f"the KV cache has no room for {what} of {block_bytes} bytes; raise {limit}")
    return num_blocks


def group_specs(specs: list[AttentionSpec], max_model_len: int) -> CacheGroups:
    """Group a model's attention layers by their windows. A window that no sequence outgrows becomes none.

    Raises ValueError if the layers differ in what decides a block's size.
    """
    shapes = sorted({(spec.num_kv_heads, spec.head_dim) for spec in specs})
    if len(shapes) > 1:
        raise ValueError(f"attention layers of (kv heads, head_dim) {shapes} share one KV cache: they must be equal")
    for spec in specs:
        if spec.window is not None and spec.window >= max_model_len:
            spec.window = None
    return group_layers([spec.window for spec in specs])


def fit_max_model_len(config: Config, max_model_len: int, num_blocks: int, block_size: int, windows: Windows) -> int:
    """`max_model_len`, cut to what the cache holds. Raises ValueError if the caller asked for more than that."""
    needs = partial(
        most_blocks_in_all, windows=windows, largest_chunk=config.max_num_batched_tokens, block_size=block_size
    )
    if needs(max_model_len) <= num_blocks:
        return max_model_len
    longest = bisect_right(range(max_model_len), num_blocks, key=needs) - 1
    if config.max_model_len is not None:
        chunk = f", lower max_num_batched_tokens={config.max_num_batched_tokens}" if any(windows) else ""
        raise ValueError(
            f"max_model_len={config.max_model_len} exceeds the KV cache, which holds {longest} tokens; "
            f"lower max_model_len{chunk} or give the cache more memory"
        )
    logger.warning("max_model_len is cut from %d to the %d tokens of the cache", max_model_len, longest)
    return longest


def cache_bytes_left(before: DeviceMemory, utilization: float, graph_bytes: int) -> int:
    """Bytes for the cache, after the weights are loaded and the largest step has run.

    Args:
        before: taken before the weights.
        utilization: the share of the whole device that this engine may fill. What others hold stays theirs.
        graph_bytes: what the captured graphs will keep.
    """
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before.allocated
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    by_libraries = (before.free - free) - (torch.cuda.memory_reserved() - before.reserved)
    budget = min(before.total * utilization, before.free * HEADROOM)
    return int(budget) - peak - max(by_libraries, 0) - graph_bytes


def kv_cache_shape(num_layers: int, spec: AttentionSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
    """`[layers, K and V, num_blocks, kv_heads, block_size, head_dim]`: one block of one head is contiguous.

    `num_layers`: of a group. Layer i of every group keeps its keys and values in slice i, in blocks of its own.
    """
    return (num_layers, 2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim)


def assign_cache(layers: list[Attention], groups: CacheGroups, kv_cache: torch.Tensor) -> None:
    """Give each layer its group, and its slice of `kv_cache` (`kv_cache_shape`)."""
    for group, indices in enumerate(groups.layers):
        for index, caches in zip(indices, kv_cache, strict=False):  # the last group of a kind may have fewer layers
            layers[index].group, layers[index].cache = group, KVCache(*caches)


def largest_step(config: Config, num_rows: int, max_model_len: int, num_groups: int) -> StepPlan:
    """A step that needs the most memory: a full budget of prompts, as many sequences as may run, and every extra.

    Every block of every sequence is block 0.
    """
    plan = StepPlan(num_samples=num_rows)
    share, rest = divmod(config.max_num_batched_tokens, num_rows)
    for row in range(num_rows):
        length = min(share + (row < rest), max_model_len)
        plan.new_rows.append(NewRow(row, [0] * length, 0, [[0]] * num_groups, 1.0, 0, 1.0, 0.0, row, 0, []))
        plan.rows.append(row)
        plan.query_lens.append(length)
    add_largest_extras(plan)
    return plan


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros. On a CPU a page of them costs neither memory nor time before it is first written."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
