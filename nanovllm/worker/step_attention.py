"""Makes a step's `AttentionMetadata`: where its tokens are in each group of layers, and how its decodes are cut.

Groups differ in their block tables, and so in their slots. On a GPU groups with one window share the splits of a
decode step, which depend on lengths alone; on a CPU each gathers blocks of its own.
"""

from nanovllm.cache_groups import Windows
from nanovllm.kernels.attention.contract import AttentionSpec, ChunkBatch, DecodeBatch, KVCache
from nanovllm.kernels.attention.decode_splits import DecodeSplits, split_contexts
from nanovllm.kernels.prepare_inputs import StepInputs
from nanovllm.layers.attention import AttentionMetadata
from nanovllm.worker.cpu_step import CpuStep
from nanovllm.worker.cuda_graph import StepShape
from nanovllm.worker.input_batch import InputBatch


class StepAttention:
    """What all layers of a step share, and the buffers for it, allocated once."""

    def __init__(self, spec: AttentionSpec, cache: KVCache, windows: Windows, num_rows: int) -> None:
        """`spec` and `cache` are those of any layer: all have one shape. `windows`: of each group."""
        self.windows, self.num_kv_heads, device = windows, spec.num_kv_heads, cache.k.device
        self.splits: dict[int | None, DecodeSplits] = {}  # by window
        self.cpu_step = None if device.type == "cuda" else CpuStep(cache, windows)
        if device.type == "cuda":
            heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
            self.splits = {window: DecodeSplits.allocate(num_rows, *heads, device) for window in dict.fromkeys(windows)}

    def metadata(self, batch: InputBatch, inputs: StepInputs, shape: StepShape) -> AttentionMetadata:
        """Of the step that `inputs` lists: decodes first, chunks after. Reads shapes alone, and no value."""
        n = shape.num_decodes
        rows, seq_lens = batch.live_rows[: shape.num_seqs], inputs.seq_lens[: shape.num_seqs]
        decodes, chunks = [], []
        if n:
            for window, splits in self.splits.items():
                split_contexts(seq_lens[:n], self.num_kv_heads, splits, window=window)
            for window, table in zip(self.windows, batch.block_tables, strict=True):
                decodes.append(DecodeBatch(rows[:n], seq_lens[:n], table, self.splits.get(window)))
        if shape.num_chunks:
            tokens = slice(n, shape.num_tokens)
            positions, query_start = inputs.positions[tokens], batch.query_start[n : shape.num_seqs + 1] - n
            for slots, table in zip(inputs.slot_mapping[:, tokens], batch.block_tables, strict=True):
                chunks.append(ChunkBatch(positions, slots, rows[n:], query_start, seq_lens[n:], table))
        if self.cpu_step is not None:
            self.cpu_step.prepare(inputs, decodes, chunks)
        return AttentionMetadata(n, decodes, chunks, inputs.positions[: shape.num_tokens])
