"""What only a step on a CPU needs: it does once what layers would repeat, and keeps memory past sequences finite."""

import torch

from nanovllm.kernels.attention.contract import ChunkBatch, DecodeBatch, KVCache
from nanovllm.kernels.attention.cpu_rope_store import TokenPlaces
from nanovllm.kernels.attention.kv_gather import KvGather, gather_blocks
from nanovllm.kernels.prepare_inputs import StepInputs
from nanovllm.step_plan import StepPlan


class CpuStep:
    """Adds to a step's records what the CPU's attention needs: the places of tokens, and the blocks to gather."""

    def __init__(self, cache: KVCache) -> None:
        """`cache` is that of any layer: all have one shape."""
        self._cache = cache
        self._gather: KvGather | None = None  # the last step's, for its workspace

    def prepare(self, inputs: StepInputs, decodes: DecodeBatch | None, chunks: ChunkBatch | None) -> None:
        """Complete the records of the step whose tokens `inputs` lists, decodes first."""
        block_size = self._cache.k.shape[2]
        if decodes is not None:
            n = len(decodes.rows)
            decodes.places = TokenPlaces.of(inputs.positions[:n], inputs.slot_mapping[:n], block_size)
            self._gather = gather_blocks(
                decodes.seq_lens, decodes.rows, decodes.block_table, self._cache.k, self._gather
            )
            decodes.gather = self._gather
        if chunks is not None:
            chunks.places = TokenPlaces.of(chunks.positions, chunks.slot_mapping, block_size)


def clear_fresh_tails(kv_cache: torch.Tensor, plan: StepPlan) -> None:
    """Zero the blocks that the step reads before they are full.

    A sequence that overflowed to NaN may have left NaN there, and it would spoil the next owner's attention: the CPU
    multiplies the slots past a sequence's end by zero, and zero times NaN is NaN.

    Args:
        kv_cache: `[layers, K and V, num_blocks, …]`.
    """
    for block in [block for _, _, block in plan.new_blocks] + [new.block_table[-1] for new in plan.new_rows]:
        kv_cache[:, :, block] = 0
