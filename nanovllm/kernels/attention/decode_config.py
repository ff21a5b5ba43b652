"""Launch parameters of the decode kernel, by head dimension, element size and shared memory."""

from dataclasses import dataclass
from functools import lru_cache

from nanovllm.kernels.attention.decode_splits import SPLIT_MULTIPLE
from nanovllm.kernels.attention.paged_kv import next_power_of_2

# Measured on an H100 and an H200: docs/lab-notebook.md; benchmarks/paged_attention.py measures alternatives.
TILE_BYTES = 16 * 1024  # of K a loop iteration: 64 tokens of 128 bf16
MAX_STAGES = 3  # of the load pipeline
# Programs on a multiprocessor if no sequence were cut: only the device knows the number of splits.
MANY = 4  # with so many, others work while one waits, and 2 stages suffice
FEW = 2  # up to so many wait at the same time, and may prefetch; later ones would ask for each line twice in a row
MIN_TILE = 16  # tokens: the least length that a dot sums over
NUM_WARPS = 2


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Launch parameters: tokens a loop iteration, warps a program, depth of the load pipeline."""

    tile: int
    num_warps: int
    num_stages: int


@lru_cache
def decode_config(head_dim: int, itemsize: int, shared_memory: int, is_many: bool = False) -> DecodeConfig:
    """The launch parameters for a head dimension, an element size and a program's shared memory (both in bytes).

    `is_many`: each multiprocessor has MANY programs or more.
    """
    token_bytes = next_power_of_2(head_dim) * itemsize
    tile = max(MIN_TILE, min(SPLIT_MULTIPLE, TILE_BYTES // token_bytes))
    # n stages need n-1 buffers of K and V; the query and layout conversions get 12 KiB.
    fitting = 1 + (shared_memory - 12 * 1024) // (2 * tile * token_bytes)
    num_warps = NUM_WARPS if itemsize <= 2 else 2 * NUM_WARPS  # float32 dots keep their operands in registers
    num_stages = max(1, min(2 if is_many else MAX_STAGES, fitting))
    return DecodeConfig(tile=tile, num_warps=num_warps, num_stages=num_stages)
