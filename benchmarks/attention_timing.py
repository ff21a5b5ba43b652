"""Times paged attention's kernels without an engine, on one layer's KV cache whose blocks are dealt out at random.

Every launch reads other blocks than the launches before it, so no block comes out of the hardware's caches. On CUDA a
graph replays the launches of decode attention, as in the engine. On a CPU the same functions time what the engine runs
there.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch

from benchmarks.ceilings import run_seconds
from benchmarks.workloads import Workload
from nanovllm.kernels.attention.contract import AttentionSpec, ChunkBatch, DecodeBatch, KVCache
from nanovllm.kernels.attention.cpu_rope_store import TokenPlaces
from nanovllm.kernels.attention.decode_splits import DecodeSplits, split_contexts
from nanovllm.kernels.attention.kv_gather import gather_blocks
from nanovllm.kernels.attention.paged_decode import paged_decode
from nanovllm.kernels.attention.paged_decode_kernel import DecodeConfig, paged_decode_triton
from nanovllm.kernels.attention.paged_prefill import paged_prefill
from nanovllm.kernels.attention.paged_prefill_kernel import PrefillConfig, paged_prefill_triton

FRESH_BYTES = 400_000_000  # what launches read before a block comes again: far more than an L2 cache has
MIN_LAUNCHES, MAX_LAUNCHES = 4, {"cuda": 128, "cpu": 4}
REPEATS = {"cuda": 9, "cpu": 3}


@dataclass(slots=True, frozen=True)
class AttentionShape:
    """The heads of one layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


def decode_lengths(workload: Workload, step: int) -> list[int]:
    """Context lengths of the requests that still run `step` steps after all of them began to decode."""
    lengths = zip(workload.input_lens, workload.max_tokens, strict=True)
    return [prompt + step for prompt, most in lengths if most > step]


def median_seconds(run: Callable[[], object], device: str) -> float:
    """The median time of several runs, by the device's clock."""
    return statistics.median(run_seconds(run, device, REPEATS[device]))


def in_one_go(launches: list[Callable[[], object]], device: str) -> Callable[[], object]:
    """All the launches as one call: on CUDA the replay of a graph, after one launch has compiled the kernel."""

    def run() -> None:
        for launch in launches:
            launch()

    if device == "cpu":
        return run
    launches[0]()  # Triton compiles the kernel here, outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Pool:
    """A layer's cache of `num_tokens` tokens, and block tables into it."""

    def __init__(self, shape: AttentionShape, num_tokens: int, device: str) -> None:
        self.shape, self.num_tokens, self.device = shape, num_tokens, device
        self._storage = torch.empty(2, num_tokens, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype, device=device)
        self._storage.normal_()
        self._tables: dict[tuple, list[torch.Tensor]] = {}

    @staticmethod
    def num_launches(shape: AttentionShape, lengths: list[int], device: str) -> int:
        """How many launches over contexts of these lengths one timing takes together."""
        fresh = FRESH_BYTES // (sum(lengths) * shape.token_bytes)
        return max(MIN_LAUNCHES, min(MAX_LAUNCHES[device], fresh))

    @staticmethod
    def tokens_for(shape: AttentionShape, lengths: list[int], block_size: int, device: str) -> int:
        """The number of tokens that a pool needs to time contexts of these lengths."""
        in_blocks = sum(-(-length // block_size) * block_size for length in lengths)
        return Pool.num_launches(shape, lengths, device) * in_blocks

    def caches(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each `[num_blocks, kv_heads, block_size, head_dim]`."""
        num_blocks = self.num_tokens // block_size
        size = (2, num_blocks, self.shape.num_kv_heads, block_size, self.shape.head_dim)
        used = 2 * num_blocks * block_size * self.shape.num_kv_heads * self.shape.head_dim
        return self._storage.flatten()[:used].view(size).unbind(0)

    def tables(self, lengths: list[int], block_size: int, count: int) -> list[torch.Tensor]:
        """`count` block tables `[seqs, max_blocks]` that share no block."""
        key = (tuple(lengths), block_size, count)
        if key not in self._tables:
            needed = [-(-length // block_size) for length in lengths]
            ids = torch.randperm(self.num_tokens // block_size, generator=torch.Generator().manual_seed(0)).int()
            tables = torch.zeros(count, len(lengths), max(needed), dtype=torch.int32)
            used = 0
            for table in tables:
                for row, blocks in enumerate(needed):
                    table[row, :blocks] = ids[used : used + blocks]
                    used += blocks
            self._tables[key] = list(tables.to(self.device))
        return self._tables[key]


def time_decode(
    pool: Pool, lengths: list[int], block_size: int, config: DecodeConfig | None = None, **cut: int
) -> float:
    """Seconds that a layer's decode attention takes, with norms, RoPE and the store of the newest tokens.

    On CUDA, `config` and `cut` (arguments of `DecodeSplits.allocate`) replace the engine's own parameters.
    """
    shape, device = pool.shape, pool.device
    tables = pool.tables(lengths, block_size, pool.num_launches(shape, lengths, device))
    k_cache, v_cache = pool.caches(block_size)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    rows = torch.arange(len(lengths), dtype=torch.int32, device=device)
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    qkv = torch.randn(len(lengths), width, dtype=shape.dtype, device=device)
    weight = torch.ones(shape.head_dim, dtype=shape.dtype, device=device)
    cos_sin = torch.rand(max(lengths), shape.head_dim, device=device)
    out = torch.empty(len(lengths), shape.num_heads, shape.head_dim, dtype=shape.dtype, device=device)
    if device == "cpu":
        norm, rope = SimpleNamespace(weight=weight, eps=1e-6), SimpleNamespace(cos_sin=cos_sin)
        spec = AttentionSpec(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.scale, rope, norm, norm)
        positions, newest = seq_lens - 1, (seq_lens - 1) // block_size
        launches = []
        for table in tables:
            slots = table[rows, newest].long() * block_size + positions % block_size
            gather = gather_blocks(seq_lens, rows, table, k_cache)
            places = TokenPlaces.of(positions, slots, block_size)
            places.rotation(spec.rope)  # computed here, outside the timing: all layers share it
            decodes = DecodeBatch(rows, seq_lens, table, gather=gather, places=places)
            launches.append(partial(paged_decode, qkv, spec, KVCache(k_cache, v_cache), decodes, out))
    else:
        own = (qkv, weight, weight, 1e-6, cos_sin, k_cache, v_cache)
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        splits = DecodeSplits.allocate(len(lengths), *heads, device, **cut)
        split_contexts(seq_lens, shape.num_kv_heads, splits)
        launches = [
            partial(paged_decode_triton, *own, table, rows, seq_lens, splits, shape.scale, out, config)
            for table in tables
        ]
    return median_seconds(in_one_go(launches, device), device) / len(tables)


def time_prefill(
    pool: Pool,
    num_seqs: int,
    length: int,
    block_size: int,
    config: PrefillConfig | None = None,
    num_heads: int | None = None,
) -> float:
    """Seconds that one launch of prefill attention takes over `num_seqs` whole prompts.

    On CUDA, `config` replaces the engine's own parameters. `num_heads` replaces the number in the pool's shape.
    """
    shape, device = pool.shape, pool.device
    q = torch.randn(num_seqs * length, num_heads or shape.num_heads, shape.head_dim, dtype=shape.dtype, device=device)
    table = pool.tables([length] * num_seqs, block_size, 1)[0]
    rows = torch.arange(num_seqs, dtype=torch.int32, device=device)
    query_start = torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * length
    seq_lens = torch.full((num_seqs,), length, dtype=torch.int32, device=device)
    spec = AttentionSpec(q.shape[1], shape.num_kv_heads, shape.head_dim, shape.scale)
    cache, out = KVCache(*pool.caches(block_size)), torch.empty_like(q)
    if config is None:
        none = torch.empty(0)  # paged_prefill reads no positions and slots
        chunks = ChunkBatch(none, none, rows, query_start, seq_lens, table)
        return median_seconds(partial(paged_prefill, q, spec, cache, chunks, out), device)
    where = (table, rows, query_start, seq_lens, shape.scale, out)
    return median_seconds(partial(paged_prefill_triton, q, *cache, *where, config=config), device)


def prefill_flops(num_heads: int, head_dim: int, num_seqs: int, length: int) -> float:
    """FLOPs of causal attention over whole prompts: 4 * head_dim for each head and pair of query and visible key."""
    return 4 * num_heads * head_dim * num_seqs * length * (length + 1) / 2
