"""What only a step on a CPU needs: it does once what layers would repeat, and keeps memory past sequences finite."""

from dataclasses import replace

import torch

from nanovllm.cache_groups import Windows
from nanovllm.kernels.attention.contract import ChunkBatch, DecodeBatch, KVCache
from nanovllm.kernels.attention.cpu_rope_store import TokenPlaces
from nanovllm.kernels.attention.kv_gather import KvGather, gather_blocks
from nanovllm.kernels.prepare_inputs import StepInputs
from nanovllm.step_plan import StepPlan


class CpuStep:
    """Adds to a step's records what the CPU's attention needs: the places of tokens, and the blocks to gather."""

    def __init__(self, cache: KVCache, windows: Windows) -> None:
        """`cache` is that of any layer: all have one shape. `windows`: of each group."""
        self._cache, self._windows = cache, windows
        self._gather: KvGather | None = None  # the last step's, for its workspace

    def prepare(self, inputs: StepInputs, decodes: list[DecodeBatch], chunks: list[ChunkBatch]) -> None:
        """Complete each group's records of the step whose tokens `inputs` lists, decodes first."""
        if decodes:
            n = len(decodes[0].rows)
            places = self._places(inputs.positions[:n], list(inputs.slot_mapping[:, :n]))
            for batch, of_group, window in zip(decodes, places, self._windows, strict=True):
                batch.places = of_group
                args = (batch.seq_lens, batch.rows, batch.block_table, self._cache.k, self._gather)
                self._gather = batch.gather = gather_blocks(*args, window=window)
        if chunks:
            places = self._places(chunks[0].positions, [batch.slot_mapping for batch in chunks])
            for batch, of_group in zip(chunks, places, strict=True):
                batch.places = of_group

    def _places(self, positions: torch.Tensor, slot_mappings: list[torch.Tensor]) -> list[TokenPlaces]:
        """For each group. The groups share the rotations, which are worked out once."""
        size = self._cache.k.shape[2]
        first = TokenPlaces.of(positions, slot_mappings[0], size)
        return [first, *(replace(first, block=slots // size, offset=slots % size) for slots in slot_mappings[1:])]


def clear_fresh_tails(kv_cache: torch.Tensor, plan: StepPlan) -> None:
    """Zero the blocks that the step reads before they are full.

    A sequence that overflowed to NaN may have left NaN there, and it would spoil the next owner's attention: the CPU
    multiplies the slots past a sequence's end by zero, and zero times NaN is NaN.

    Args:
        kv_cache: `[layers, K and V, num_blocks, …]`.
    """
    # A chunk fills all blocks that it takes but the last.
    last_taken = {(row, group): block for row, group, _, block in plan.new_blocks}
    for block in [*last_taken.values(), *(table[-1] for new in plan.new_rows for table in new.block_tables)]:
        kv_cache[:, :, block] = 0
