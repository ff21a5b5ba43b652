"""Runs the model on one device: takes a step's plan, launches it, and returns a handle that waits for its tokens.

`launch` returns while the device still works. A step finds its input in the rows on the device, where the step before
it left its tokens: so no token waits for the host.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.prepare_inputs import StepInputs, prepare_inputs
from nanovllm.kernels.sampling.sample import sample
from nanovllm.layers.attention import Attention
from nanovllm.layers.pointwise import compile_chains
from nanovllm.layers.rotary_embedding import build_rope_tables
from nanovllm.models.loader import build_model
from nanovllm.step_plan import StepPlan
from nanovllm.structured_outputs import TokenMasks
from nanovllm.worker import memory
from nanovllm.worker.cpu_step import clear_fresh_tails
from nanovllm.worker.cuda_graph import StepGraphs, StepShape, StepShapes
from nanovllm.worker.graph_memory import unowned
from nanovllm.worker.input_batch import InputBatch
from nanovllm.worker.logit_extras import LogitExtras, ProcessLogits
from nanovllm.worker.resolve import resolve_device, resolve_dtype, resolve_max_model_len
from nanovllm.worker.step_attention import StepAttention
from nanovllm.worker.step_handle import LaunchedStep, StepHandle

logger = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 2  # one runs while the host reads the tokens of the one before


class ModelRunner:
    """One device's model, or one rank's share of it, with the cache and the rows.

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
        self.config, self.hf_config, self.tp = config, hf_config, tp
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
        before = memory.DeviceMemory.now() if self.is_cuda else None
        self.model: Any = build_model(config, hf_config, model_cls, path, self.dtype, self.device, tp)
        if config.compile or config.compile is None and self.is_cuda and not config.enforce_eager:
            compile_chains(self.model)
        self.attention_layers = [m for m in self.model.modules() if isinstance(m, Attention)]
        self.cache_groups = memory.group_specs([layer.spec for layer in self.attention_layers], self.max_model_len)
        build_rope_tables((layer.spec.rope for layer in self.attention_layers), self.max_model_len, self.device)
        self.graphs: StepGraphs | None = None
        self.graph_type = StepGraphs if self.is_cuda and not config.enforce_eager else None
        self.recorded: dict[StepShape, tuple[torch.Tensor, torch.Tensor]] = {}  # what extras read after a graph
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

    def stop(self) -> None:
        """Drop what `start` made. Until it is called again nothing can be launched."""
        if self.is_cuda:
            torch.cuda.synchronize()
        self.graphs = self.kv_cache = self.batch = self.inputs = self.sampled = self.attention = self.extras = None
        self.recorded.clear()
        for layer in self.attention_layers:
            layer.cache = None
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
            clear_fresh_tails(self.kv_cache, plan)
        self.extras.add_rows(plan.new_rows)
        has_extras = self.extras.has_work(plan)
        padded = self.shapes.pad(plan, has_extras)
        shape = padded or StepShape.of(plan)
        self.batch.apply(plan, slot, shape)
        if padded and self.graphs:
            self.graphs.replay(shape)
            hidden, logits = self.recorded.get(shape, (None, None))
        else:
            hidden, logits = self._run(shape, None if padded else plan.num_samples)
        step = LaunchedStep(plan, shape, slot, hidden, logits)
        if has_extras and self.extras.awaits_masks(plan):
            return self._fetch(step, awaits_masks=step)
        return self.draw(step) if has_extras else self._fetch(step)

    @torch.inference_mode()
    def draw(self, step: LaunchedStep, masks: TokenMasks | None = None) -> StepHandle:
        """Queue what the rows of the step launched last ask for beyond a draw from the model's logits."""
        extras = self.extras.run(step.plan, step.hidden, step.logits, self.inputs.seq_lens, self.sampled, masks)
        return self._fetch(step, extras=extras)

    def check_device(self) -> None:
        """Wait for the device. Raises its error if it has failed for good; a CPU does not fail."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def _run(self, shape: StepShape, num_samples: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From the rows to the sampled tokens, written back into the rows. Queued on the device, not waited for.

        Args:
            num_samples: how many entries, the first ones, sample a token. None: all.

        Returns:
            hidden: `[num_tokens, hidden_size]`; logits: `[num_samples, vocab]`, None if there are none.
        """
        batch, inputs = self.batch, self.inputs
        num_seqs, num_tokens = shape.num_seqs, shape.num_tokens
        num_samples = num_seqs if num_samples is None else num_samples
        rows, query_start = batch.live_rows[:num_seqs], batch.query_start[: num_seqs + 1]
        prepare_inputs(
            rows, query_start, batch.token_ids, batch.num_computed, batch.block_tables, self.block_size, inputs
        )
        meta = self.attention.metadata(batch, inputs, shape)
        hidden = last = self.model(inputs.input_ids[:num_tokens], meta)
        if not num_samples:
            return hidden, None
        if num_tokens > num_samples:  # logits are computed for a sequence's last token alone
            last = hidden[query_start[1 : num_samples + 1].long() - 1]
        logits = self.model.compute_logits(last)
        sampled, seq_lens = self.sampled[:num_samples], inputs.seq_lens[:num_samples]
        sample(logits, rows[:num_samples], seq_lens, batch.params, batch.token_ids, sampled)
        return hidden, logits

    def _record(self, shape: StepShape) -> None:
        """For a graph. What extras may ask for stays where each replay will write it."""
        hidden, logits = self._run(shape)
        if not shape.num_chunks:  # the hidden states are a few MB in all, but logits would be GBs
            self.recorded[shape] = hidden, unowned(logits)

    def _fetch(self, step: LaunchedStep, **in_handle: Any) -> StepHandle:
        """Queue the copy of the step's tokens to the host, without those of padding entries."""
        num_samples, num_decodes, shape, slot = step.plan.num_samples, step.plan.num_decodes, step.shape, step.slot
        sampled = self.sampled[:num_samples]
        if num_decodes < min(shape.num_decodes, num_samples):  # padding lies between decodes and chunks
            of_chunks = self.sampled[shape.num_decodes :][: num_samples - num_decodes]
            sampled = torch.cat([self.sampled[:num_decodes], of_chunks])
        if not self.is_cuda:
            return StepHandle(sampled.clone(), None, **in_handle)
        host = self.sampled_on_host[slot][:num_samples]
        host.copy_(sampled, non_blocking=True)
        self.done[slot].record()
        return StepHandle(host, self.done[slot], **in_handle)

    def _fit_cache(self, before: memory.DeviceMemory | None) -> int:
        """Decide how many blocks the cache gets, and with it how long a sequence may be."""
        config, size, groups = self.config, self.block_size, self.cache_groups
        shape = memory.kv_cache_shape(groups.num_layers, self.attention_layers[0].spec, 1, size)
        block_bytes = math.prod(shape) * self.dtype.itemsize
        measure = (before, self._run_largest_step, self.tp, self.device)
        num_blocks = memory.num_cache_blocks(config, block_bytes, len(groups.windows), *measure)
        self.max_model_len = memory.fit_max_model_len(config, self.max_model_len, num_blocks, size, groups.windows)
        total = (groups.num_layers, num_blocks * block_bytes / 1e9)
        logger.info("KV cache: %d blocks of %d tokens in %d layers, %.2f GB", num_blocks, size, *total)
        return num_blocks

    def _allocate(self, num_blocks: int) -> None:
        """Make the cache, the rows and the step's buffers."""
        groups, spec = self.cache_groups, self.attention_layers[0].spec
        shape = memory.kv_cache_shape(groups.num_layers, spec, num_blocks, self.block_size)
        self.kv_cache = memory.zeros_on_demand(shape, self.dtype, self.device)
        memory.assign_cache(self.attention_layers, groups, self.kv_cache)
        sizes = (self.num_rows, self.max_model_len, -(-self.max_model_len // self.block_size))
        self.batch = InputBatch(*sizes, self.device, MAX_STEPS_IN_FLIGHT, len(groups.windows))
        padded = [shape.num_tokens for shape in self.shapes.with_chunks()]
        max_tokens = max([self.config.max_num_batched_tokens, *padded])
        self.inputs = StepInputs.allocate(max_tokens, self.batch.num_entries, len(groups.windows), self.device)
        self.sampled = torch.zeros(self.batch.num_entries, dtype=torch.int32, device=self.device)
        self.extras = LogitExtras(self.batch, self.model.compute_logits, self.hf_config.vocab_size, self.process_logits)
        self.num_launched = 0
        self.attention = StepAttention(spec, self.attention_layers[0].cache, groups.windows, self.num_rows)
        if self.is_cuda:
            self.done = [torch.cuda.Event() for _ in range(MAX_STEPS_IN_FLIGHT)]
            self.sampled_on_host = [
                torch.zeros(self.num_rows, dtype=torch.int32, pin_memory=True) for _ in range(MAX_STEPS_IN_FLIGHT)
            ]

    def _run_largest_step(self) -> int:
        """Run the step that needs the most memory, over a cache of one block. Returns the bytes the graphs kept."""
        self._allocate(1)
        sizes = (self.num_rows, self.max_model_len, len(self.cache_groups.windows))
        self.launch(memory.largest_step(self.config, *sizes)).tokens()
        if self.config.enforce_eager:
            return 0
        self.batch.forget()
        free, _ = torch.cuda.mem_get_info()
        graphs = StepGraphs()
        graphs.capture(self._run, [StepShape(self.shapes.decodes[-1]), *self.shapes.with_chunks()[-1:]])
        return free - torch.cuda.mem_get_info()[0]
