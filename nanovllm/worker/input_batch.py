"""The device keeps a row of state for each running sequence, and the host sends only what changes in a step.

All rows are views of one flat int32 tensor. Every change (a new request's tokens and parameters, one more block of a
running one) is therefore a pair (index, value), and a step writes all its changes with one scatter.
"""

import numpy as np
import torch

from nanovllm.kernels.sampling.tensors import SamplingTensors
from nanovllm.sampling_params import MAX_STOP_IDS
from nanovllm.step_plan import NewRow, StepPlan
from nanovllm.worker.cuda_graph import MAX_CHUNKS, StepShape

# Columns of a row's scalars. A float is stored as its 32 bits.
TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED_LO, SEED_HI, MIN_LEN, STOP_IDS = range(8)
NUM_SCALARS = STOP_IDS + MAX_STOP_IDS
MAX_STATE = 2**31 - 1  # numbers in the flat tensor: the host sends int32 indices


class InputBatch:
    """The rows on the device, this step's batch of them, and the staging buffers from which the host writes both.

    Attributes (int32, on the device):
        token_ids: `[rows, max_model_len + 1]`, the prompt, then the sampled tokens, which the device itself writes.
        block_tables: `[groups, rows, max_blocks]`. num_computed: `[rows]`, tokens whose keys and values are cached.
        params: the rows' sampling parameters, as the sampler reads them.
        live_rows: `[entries]`, the row of each entry of this step's batch; -1 is a padding entry.
        query_start: `[entries + 1]`, where each entry's tokens start among the step's tokens.
    """

    def __init__(
        self, num_rows: int, max_model_len: int, max_blocks: int, device: str, num_slots: int, num_groups: int = 1
    ) -> None:
        self.device = device
        self.width = max_model_len + 1  # the device may sample one surplus token past the last
        self.num_rows, self.max_blocks = num_rows, max_blocks
        sizes = [num_rows * self.width, num_groups * num_rows * max_blocks, num_rows, num_rows * NUM_SCALARS]
        if sum(sizes) > MAX_STATE:
            raise ValueError(
                f"max_num_seqs={num_rows} rows for max_model_len={max_model_len} tokens each are {sum(sizes)} numbers: "
                f"at most {MAX_STATE} can be indexed; lower one of the two"
            )
        self.state = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        token_ids, block_tables, self.num_computed, scalars = self.state.split(sizes)
        self.offsets = np.cumsum([0, *sizes])
        self.token_ids = token_ids.view(num_rows, self.width)
        self.block_tables = block_tables.view(num_groups, num_rows, max_blocks)
        scalars = scalars.view(num_rows, NUM_SCALARS)
        floats = scalars.view(torch.float32)
        self.params = SamplingTensors(
            temperature=floats[:, TEMPERATURE],
            top_k=scalars[:, TOP_K],
            top_p=floats[:, TOP_P],
            min_p=floats[:, MIN_P],
            seed_lo=scalars[:, SEED_LO],
            seed_hi=scalars[:, SEED_HI],
            min_len=scalars[:, MIN_LEN],
            stop_ids=scalars[:, STOP_IDS:],
        )
        self.num_entries = num_rows + MAX_CHUNKS
        self.live = torch.zeros(2 * self.num_entries + 1, dtype=torch.int32, device=device)
        self.live_rows, self.query_start = self.live[: self.num_entries], self.live[self.num_entries :]
        self.forget()
        # Pinned, one per slot: the host rewrites a slot's only after the step that last used it, and its copies, ended.
        self._live_staging = [_pinned(2 * self.num_entries + 1, device) for _ in range(num_slots)]
        self._delta_staging = [_pinned(1 << 12, device) for _ in range(num_slots)]

    def forget(self) -> None:
        """Make every entry of the batch a padding entry without tokens."""
        self._sent_batch: tuple[list[int], list[int], StepShape] | None = None
        self.live_rows.fill_(-1)
        self.query_start.fill_(0)

    def apply(self, plan: StepPlan, slot: int, shape: StepShape) -> None:
        """Send the plan's changes, and its batch padded to `shape`. Does not wait for the device."""
        batch = (plan.rows, plan.query_lens, shape)
        if batch != self._sent_batch:  # else unchanged since the last step: the device's copy is valid
            self._sent_batch = None  # if sending fails, the device's copy is unknown
            self._send_batch(plan, slot, shape)
            self._sent_batch = batch
        self._send_changes(plan, slot)

    def _send_batch(self, plan: StepPlan, slot: int, shape: StepShape) -> None:
        """Entries: decodes, padding of one token each, chunks, padding; the last one takes the tokens to spare."""
        live = self._live_staging[slot].numpy()
        rows, lens = live[: shape.num_seqs], np.zeros(shape.num_seqs, dtype=np.int32)
        num_decodes, num_chunks = plan.num_decodes, len(plan.rows) - plan.num_decodes
        chunks = slice(shape.num_decodes, shape.num_decodes + num_chunks)
        rows.fill(-1)
        rows[:num_decodes], rows[chunks] = plan.rows[:num_decodes], plan.rows[num_decodes:]
        lens[: shape.num_decodes], lens[chunks] = 1, plan.query_lens[num_decodes:]
        lens[-1] += shape.num_tokens - lens.sum()
        live[self.num_entries] = 0
        np.cumsum(lens, out=live[self.num_entries + 1 : self.num_entries + 1 + shape.num_seqs])
        self.live.copy_(self._live_staging[slot], non_blocking=True)

    def _send_changes(self, plan: StepPlan, slot: int) -> None:
        indices, values = [], []
        if plan.new_blocks:
            row, group, column, block = np.array(plan.new_blocks, dtype=np.int32).T
            indices.append(self.offsets[1] + (group * self.num_rows + row) * self.max_blocks + column)
            values.append(block)
        for new in plan.new_rows:
            for start, content in self._contents(new):
                indices.append(np.arange(start, start + len(content), dtype=np.int32))
                values.append(content)
        if not indices:
            return
        n = sum(map(len, indices))
        if self._delta_staging[slot].numel() < 2 * n:
            self._delta_staging[slot] = _pinned(4 * n, self.device)
        staging = self._delta_staging[slot]
        np.concatenate(indices, out=staging.numpy()[:n], casting="unsafe")
        np.concatenate(values, out=staging.numpy()[n : 2 * n], casting="unsafe")
        changes = staging[: 2 * n].to(self.device, non_blocking=True)
        self.state.index_put_((changes[:n].long(),), changes[n:])

    def _contents(self, new: NewRow) -> list[tuple[int, np.ndarray]]:
        """Everything the device must know of a new row, as runs of state: (first flat index, int32 values)."""
        scalars = np.full(NUM_SCALARS, -1, dtype=np.int32)
        floats = scalars.view(np.float32)
        floats[TEMPERATURE], floats[TOP_P], floats[MIN_P] = new.temperature, new.top_p, new.min_p
        scalars[TOP_K], scalars[MIN_LEN] = new.top_k, new.min_len
        scalars.view(np.uint32)[[SEED_LO, SEED_HI]] = new.seed & 0xFFFFFFFF, (new.seed >> 32) & 0xFFFFFFFF
        scalars[STOP_IDS : STOP_IDS + len(new.stop_ids)] = new.stop_ids
        tokens, blocks, computed, params = self.offsets[:4]
        tables = [np.array(table, dtype=np.int32).clip(min=0) for table in new.block_tables]
        starts = [blocks + (group * self.num_rows + new.row) * self.max_blocks for group in range(len(tables))]
        return [
            (tokens + new.row * self.width, np.array(new.token_ids, dtype=np.int32)),
            *zip(starts, tables, strict=True),
            (computed + new.row, np.array([new.num_computed_tokens], dtype=np.int32)),
            (params + new.row * NUM_SCALARS, scalars),
        ]


def _pinned(size: int, device: str) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32, pin_memory=device != "cpu")
