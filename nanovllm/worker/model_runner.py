"""Runs the model on one device: takes a step's plan, launches it, and hands back a way to wait for its tokens.

`launch` returns while the device still works. A step finds its input in the device-resident rows, where the step
before it left its tokens, so the host is on the path of no token.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.attention.cpu_attention import CpuDecodePlan, plan_gather
from nanovllm.kernels.attention.cpu_rope_store import RopeStorePlan, plan_rope_store
from nanovllm.kernels.attention.decode_splits import DecodeSplits, split_contexts
from nanovllm.kernels.prepare_inputs import StepInputs, prepare_inputs
from nanovllm.kernels.sampling.sample import sample
from nanovllm.layers.attention import Attention, AttentionMetadata
from nanovllm.layers.rotary_embedding import build_cos_sin, rope_parameters
from nanovllm.models.loader import build_model
from nanovllm.step_plan import NewRow, StepPlan
from nanovllm.worker.cuda_graph import StepGraphs, StepShape, StepShapes
from nanovllm.worker.input_batch import InputBatch
from nanovllm.worker.logit_extras import LogitExtras, PendingLogprobs, ProcessLogits, add_largest_extras
from nanovllm.worker.memory import DeviceMemory, cache_bytes_left, cache_bytes_per_block, zeros_on_demand
from nanovllm.worker.resolve import resolve_device, resolve_dtype, resolve_max_model_len
from nanovllm.worker.step_handle import StepHandle

logger = logging.getLogger(__name__)

DEFAULT_CPU_CACHE_BYTES = 4 << 30
MAX_STEPS_IN_FLIGHT = 2  # one runs while the host reads the tokens of the one before


class ModelRunner:
    """One device's model, or one rank's part of it, with cache and rows.

    Attributes:
        num_blocks, block_size: of the paged cache. max_model_len: cut to what the cache holds.
        not_ready: why nothing can be launched, empty if it can; this and the next three are `worker/sleep.py`'s.
    """

    @torch.inference_mode()
    def __init__(
        self,
        config: Config,
        hf_config: Any,
        model_cls: type,
        path: Path,
        tp: TensorParallel = TensorParallel(),  # noqa: B008 -- frozen
    ) -> None:
        self.config = config
        self.tp = tp
        self.hf_config = hf_config
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, hf_config)
        self.is_cuda = self.device == "cuda"
        self.block_size = config.kvcache_block_size or (256 if self.is_cuda else 64)
        self.max_model_len = resolve_max_model_len(config, hf_config)
        self.num_rows = min(config.max_num_seqs, config.max_num_batched_tokens)
        if self.is_cuda:
            self.shapes = StepShapes.for_graphs(self.num_rows, config.max_num_batched_tokens)
        else:
            self.shapes = StepShapes(list(range(1, self.num_rows + 1)))
        before = DeviceMemory.now() if self.is_cuda else None
        self.model: Any = build_model(config, hf_config, model_cls, path, self.dtype, self.device, tp)
        self.attention_layers = [m for m in self.model.modules() if isinstance(m, Attention)]
        self._build_rope(hf_config)
        self.graphs: StepGraphs | None = None
        self.graph_type = StepGraphs if self.is_cuda and not config.enforce_eager else None
        self.recorded_hidden: dict[StepShape, torch.Tensor] = {}  # of each graph of decodes: a few MB in all
        self.process_logits: ProcessLogits | None = None
        self.num_blocks = self._fit_cache(before)
        self.not_ready = ""
        self.sleep_level = 0
        self.has_weights = True
        self.missing_weights: set[str] = set()
        self.start()

    @torch.inference_mode()
    def start(self) -> None:
        """Make the cache, the rows and the buffers, and capture the graphs."""
        self._allocate(self.num_blocks)
        if self.graph_type is not None:
            self.graphs = self.graph_type()
            self.graphs.capture(self._record, self.shapes.all())

    def set_logits_processors(self, process: ProcessLogits) -> None:
        """Let it change the logits of every step."""
        self.process_logits = self.extras.process = process

    def stop(self) -> None:
        """Drop what `start` made. Until it is called again nothing can be launched."""
        if self.is_cuda:
            torch.cuda.synchronize()
        self.graphs = self.kv_cache = self.batch = self.inputs = self.decode_plan = self.sampled = None
        self.extras = None
        self.recorded_hidden.clear()
        for attention in self.attention_layers:
            attention.k_cache = attention.v_cache = torch.empty(0)
        if self.is_cuda:
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step and return, unless MAX_STEPS_IN_FLIGHT are unfinished: then wait for the oldest first."""
        slot = self.num_launched % MAX_STEPS_IN_FLIGHT
        self.num_launched += 1
        if self.is_cuda:
            self.done[slot].synchronize()  # no wait, unless a failed step was dropped: its buffers may be in use yet
        else:
            self._clear_fresh_tails(plan)
        self.extras.add_rows(plan.new_rows)
        has_extras = self.extras.has_work(plan)
        padded = self.shapes.pad(plan, has_extras)
        shape = padded or StepShape.of(plan)
        self.batch.apply(plan, slot, shape)
        if padded and self.graphs:
            self.graphs.replay(shape)
            hidden, logits = self.recorded_hidden.get(shape), None
        else:
            hidden, logits = self._run(shape, None if padded else plan.num_samples)
        extras = self._run_extras(plan, hidden, logits) if has_extras else None
        return self._fetch(plan, shape, slot, extras)

    def check_device(self) -> None:
        """Wait for the device. Raises what it says if it has failed for good; on a CPU nothing does."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def _run_extras(self, plan: StepPlan, hidden: torch.Tensor, logits: torch.Tensor | None) -> PendingLogprobs:
        """What the step's rows ask beyond the plain part."""
        if logits is None and plan.num_samples:  # a graph does not keep its own, which would take GBs
            logits = self.model.compute_logits(hidden)  # of the same shape, hence the same numbers
        return self.extras.run(plan, hidden, logits, self.inputs.seq_lens, self.sampled)

    def _run(self, shape: StepShape, num_samples: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From the rows to the sampled tokens, written back into the rows. Queued on the device, not waited for.

        Args:
            num_samples: how many entries, the first ones, sample a token. None: all.

        Returns:
            hidden: `[num_tokens, hidden_size]`; logits: `[num_samples, vocab]`, None if there are none.
        """
        batch, inputs = self.batch, self.inputs
        num_seqs, num_tokens, num_decodes = shape.num_seqs, shape.num_tokens, shape.num_decodes
        num_samples = num_seqs if num_samples is None else num_samples
        rows, query_start = batch.live_rows[:num_seqs], batch.query_start[: num_seqs + 1]
        prepare_inputs(
            rows, query_start, batch.token_ids, batch.num_computed, batch.block_table, self.block_size, inputs
        )
        seq_lens = inputs.seq_lens[:num_seqs]
        if num_decodes:
            self.decode_plan = self._plan_decodes(num_decodes)
        has_chunks = num_decodes < num_seqs
        meta = AttentionMetadata(
            positions=inputs.positions[:num_tokens],
            slot_mapping=inputs.slot_mapping[:num_tokens],
            rows=rows,
            chunk_start=query_start[num_decodes:] - num_decodes if has_chunks else None,
            seq_lens=seq_lens,
            block_table=batch.block_table,
            num_decodes=num_decodes,
            decode_plan=self.decode_plan,
            rope_store_plan=self._plan_stores(num_decodes, num_tokens) if has_chunks and not self.is_cuda else None,
        )
        hidden = last = self.model(inputs.input_ids[:num_tokens], self.cos_sin, meta)
        if not num_samples:
            return hidden, None
        if num_tokens > num_samples:  # only a sequence's last token is asked for its logits
            last = hidden[query_start[1 : num_samples + 1].long() - 1]
        logits = self.model.compute_logits(last)
        sampled = self.sampled[:num_samples]
        sample(logits, rows[:num_samples], seq_lens[:num_samples], batch.params, batch.token_ids, sampled)
        return hidden, logits

    def _plan_decodes(self, num_decodes: int) -> DecodeSplits | CpuDecodePlan:
        layer, seq_lens = self.attention_layers[0], self.inputs.seq_lens[:num_decodes]
        if isinstance(self.decode_plan, DecodeSplits):
            return split_contexts(seq_lens, layer.num_kv_heads, self.decode_plan)
        where = (self.batch.live_rows[:num_decodes], self.batch.block_table, layer.k_cache)
        gather = plan_gather(seq_lens, *where, self.decode_plan and self.decode_plan.gather)
        return CpuDecodePlan(self._plan_stores(0, num_decodes), gather)

    def _plan_stores(self, first: int, last: int) -> RopeStorePlan:
        """On a CPU: of the step's tokens `first` to `last`."""
        positions, slots = self.inputs.positions[first:last], self.inputs.slot_mapping[first:last]
        return plan_rope_store(positions, slots, self.cos_sin, self.block_size)

    def _record(self, shape: StepShape) -> None:
        """For a graph. What may be asked for once more stays where each replay will write it."""
        hidden, _ = self._run(shape)
        if not shape.num_chunks:
            self.recorded_hidden[shape] = hidden

    def _clear_fresh_tails(self, plan: StepPlan) -> None:
        """Zero the blocks that will be read before they are full: what a sequence that overflowed to NaN has left
        there would spoil the next owner's attention, since the CPU multiplies the slots past the end by zero."""
        tails = [block for _, _, block in plan.new_blocks] + [new.block_table[-1] for new in plan.new_rows]
        for block in tails:
            self.kv_cache[:, :, block] = 0

    def _fetch(self, plan: StepPlan, shape: StepShape, slot: int, extras: PendingLogprobs | None) -> StepHandle:
        """Queue the copy of the step's tokens to the host, those of padding left out."""
        num_samples, num_decodes = plan.num_samples, plan.num_decodes
        sampled = self.sampled[:num_samples]
        if num_decodes < min(shape.num_decodes, num_samples):  # padding lies between decodes and chunks
            of_chunks = self.sampled[shape.num_decodes :][: num_samples - num_decodes]
            sampled = torch.cat([self.sampled[:num_decodes], of_chunks])
        if not self.is_cuda:
            return StepHandle(sampled.clone(), None, extras)
        host = self.sampled_on_host[slot][:num_samples]
        host.copy_(sampled, non_blocking=True)
        self.done[slot].record()
        return StepHandle(host, self.done[slot], extras)

    def _build_rope(self, hf_config: Any) -> None:
        table = build_cos_sin(self.attention_layers[0].head_dim, self.max_model_len, rope_parameters(hf_config))
        self.cos_sin = table.to(self.device)

    def _fit_cache(self, before: DeviceMemory | None) -> int:
        """How many blocks the cache gets, and with it how long a sequence may be."""
        config, layer = self.config, self.attention_layers[0]
        block_bytes = cache_bytes_per_block(
            len(self.attention_layers), layer.num_kv_heads, self.block_size, layer.head_dim, self.dtype
        )
        if config.num_kvcache_blocks is not None:
            num_blocks = config.num_kvcache_blocks
        elif config.kvcache_memory_bytes is not None or before is None:
            num_blocks = (config.kvcache_memory_bytes or DEFAULT_CPU_CACHE_BYTES) // block_bytes
        else:
            graph_bytes = self._run_largest_step()
            num_blocks = cache_bytes_left(before, config.gpu_memory_utilization, graph_bytes) // block_bytes
        num_blocks = self.tp.minimum(num_blocks, self.device)  # one plan serves all ranks
        if num_blocks < 1:
            raise ValueError(
                f"the KV cache has no room for one block of {block_bytes} bytes; raise gpu_memory_utilization="
                f"{config.gpu_memory_utilization} or kvcache_memory_bytes={config.kvcache_memory_bytes}"
            )
        capacity = num_blocks * self.block_size
        if capacity < self.max_model_len:
            if config.max_model_len is not None:
                raise ValueError(
                    f"max_model_len={config.max_model_len} exceeds the KV cache, which holds {capacity} tokens; "
                    "lower max_model_len or give the cache more memory"
                )
            logger.warning("max_model_len is cut from %d to the %d tokens of the cache", self.max_model_len, capacity)
            self.max_model_len = capacity
        logger.info(
            "KV cache: %d blocks of %d tokens, %.2f GB", num_blocks, self.block_size, num_blocks * block_bytes / 1e9
        )
        return num_blocks

    def _allocate(self, num_blocks: int) -> None:
        """Make the cache, the rows and the step's buffers."""
        layer = self.attention_layers[0]
        padded = [shape.num_tokens for shape in self.shapes.with_chunks()]
        max_tokens = max([self.config.max_num_batched_tokens, *padded])
        # [layers, K and V, blocks, kv_heads, block_size, head_dim]: one block of one head is contiguous.
        shape = (len(self.attention_layers), 2, num_blocks, layer.num_kv_heads, self.block_size, layer.head_dim)
        self.kv_cache = zeros_on_demand(shape, self.dtype, self.device)
        for attention, (k_cache, v_cache) in zip(self.attention_layers, self.kv_cache, strict=True):
            attention.k_cache, attention.v_cache = k_cache, v_cache
        max_blocks = -(-self.max_model_len // self.block_size)
        self.batch = InputBatch(self.num_rows, self.max_model_len, max_blocks, self.device, MAX_STEPS_IN_FLIGHT)
        self.inputs = StepInputs(
            input_ids=torch.zeros(max_tokens, dtype=torch.int32, device=self.device),
            positions=torch.zeros(max_tokens, dtype=torch.int32, device=self.device),
            slot_mapping=torch.zeros(max_tokens, dtype=torch.int64, device=self.device),
            seq_lens=torch.zeros(self.batch.num_entries, dtype=torch.int32, device=self.device),
        )
        heads = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
        self.decode_plan: DecodeSplits | CpuDecodePlan | None = (
            DecodeSplits.allocate(self.num_rows, *heads, self.device) if self.is_cuda else None
        )
        self.sampled = torch.zeros(self.batch.num_entries, dtype=torch.int32, device=self.device)
        vocab_size = self.hf_config.vocab_size
        self.extras = LogitExtras(self.batch, self.model.compute_logits, vocab_size, self.process_logits)
        self.num_launched = 0
        if self.is_cuda:
            self.done = [torch.cuda.Event() for _ in range(MAX_STEPS_IN_FLIGHT)]
            self.sampled_on_host = [
                torch.zeros(self.num_rows, dtype=torch.int32, pin_memory=True) for _ in range(MAX_STEPS_IN_FLIGHT)
            ]

    def _run_largest_step(self) -> int:
        """Run what needs the most memory: a full budget of prompts, as many sequences as may run, and a graph.

        Every block of every sequence is block 0 of a cache that has no other. Returns the bytes the graph kept.
        """
        self._allocate(1)
        plan = StepPlan(num_samples=self.num_rows)
        share, rest = divmod(self.config.max_num_batched_tokens, self.num_rows)
        for row in range(self.num_rows):
            length = min(share + (row < rest), self.max_model_len)
            plan.new_rows.append(NewRow(row, [0] * length, 0, [0], 1.0, 0, 1.0, 0.0, row, 0, []))
            plan.rows.append(row)
            plan.query_lens.append(length)
        add_largest_extras(plan)
        self.launch(plan).tokens()
        if self.config.enforce_eager:
            return 0
        self.batch.forget()
        free, _ = torch.cuda.mem_get_info()
        graphs = StepGraphs()
        shapes = [StepShape(self.shapes.decodes[-1]), *self.shapes.with_chunks()[-1:]]
        graphs.capture(self._run, shapes)
        return free - torch.cuda.mem_get_info()[0]
