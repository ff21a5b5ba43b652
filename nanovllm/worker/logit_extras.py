"""Edited logits and log-probabilities: the extras that few requests ask for, computed after the step's plain part.

The plain part samples every row as if no request had asked for extras, from a CUDA graph if it can. Then the rows with
edits draw again, from edited copies of their logits, and overwrite their first draw. So a step without such rows pays
nothing, and in any other step only those rows pay. The work goes in batches of rows, so that memory stays bounded.
Rows that have a grammar and no other edits need no copy (`masked_draws.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch

from nanovllm.kernels.sampling.logit_edits import RowEdits, edit_logits, send
from nanovllm.kernels.sampling.logprobs import token_logprobs, unpack
from nanovllm.kernels.sampling.sample import sample
from nanovllm.kernels.sampling.tensors import TokenBits
from nanovllm.kernels.sampling.token_masks import mask_tokens
from nanovllm.outputs import TokenLogprobs
from nanovllm.sampling_params import NAN_LOGITS
from nanovllm.step_plan import LogitEdits, NewRow, PromptSpan, StepPlan
from nanovllm.structured_outputs import TokenMasks
from nanovllm.worker.input_batch import InputBatch
from nanovllm.worker.masked_draws import MaskedDraws

ROW_BATCH_BYTES = 64 << 20  # of float32 logits
MAX_BATCH_ROWS = 256
MAX_BIAS = 1e30  # dwarfs any logit, and leaves room in float32 for the edits that follow
SORTED_COST = 8  # float32 numbers of memory for one of the likeliest tokens: its logit and int64 index, twice

# The user's function from (rows, their float32 logits) to logits (`vllm/logits_processors.py`); few engines have one.
ProcessLogits = Callable[[list[int], torch.Tensor], torch.Tensor]
NO_EDITS = RowEdits(prompt_len=0)


@dataclass(slots=True)
class PendingLogprobs:
    """A step's log-probabilities, on their way to the host. They are complete once the step has ended.

    A row batch is (owners, packed): `packed` has an entry for each owner, which is the index of a sample or of a span.
    """

    num_samples: int
    num_spans: int
    sample_batches: list[tuple[list[int], torch.Tensor]] = field(default_factory=list)
    span_batches: list[tuple[list[int], torch.Tensor]] = field(default_factory=list)

    def sample_logprobs(self) -> list[TokenLogprobs | None]:
        """One item per sample; None where the plan does not ask for it."""
        found = dict(_unpack(self.sample_batches))
        return [found.get(i) for i in range(self.num_samples)]

    def prompt_logprobs(self) -> list[list[TokenLogprobs]]:
        """One list per prompt span, with an item for each of its tokens."""
        spans: list[list[TokenLogprobs]] = [[] for _ in range(self.num_spans)]
        for index, values in _unpack(self.span_batches):
            spans[index].append(values)
        return spans


def _unpack(batches: list[tuple[list[int], torch.Tensor]]) -> Iterator[tuple[int, TokenLogprobs]]:
    for owners, packed in batches:
        for owner, values in zip(owners, unpack(packed), strict=True):
            yield owner, TokenLogprobs(*values)


class LogitExtras:
    """Keeps the edits of the rows that have any, and computes the extras after a step's plain part."""

    def __init__(
        self,
        batch: InputBatch,
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
        vocab_size: int,
        process: ProcessLogits | None = None,
    ) -> None:
        self._batch = batch
        self._compute_logits = compute_logits
        self._vocab_size = vocab_size
        self._edits: dict[int, RowEdits] = {}
        self._lengths: dict[int, int] = {}  # of the rows in _edits: how many tokens precede the next sample
        self._with_grammar: set[int] = set()  # rows; those that edit by nothing else are not in _edits
        self.masked_draws = MaskedDraws(batch)
        self.process = process

    def add_rows(self, new_rows: list[NewRow]) -> None:
        """Keep the edits of requests that get a row in this step, and drop those of the row's last request."""
        for new in new_rows:
            self._edits.pop(new.row, None)
            self._with_grammar.discard(new.row)
            if new.edits is not None:
                if new.edits.has_grammar:
                    self._with_grammar.add(new.row)
                    if new.edits == LogitEdits(new.edits.prompt_len, min_len=new.edits.min_len, has_grammar=True):
                        continue
                self._edits[new.row] = row_edits(new.edits, self._batch.state.device)
                self._lengths[new.row] = len(new.token_ids)

    def has_work(self, plan: StepPlan) -> bool:
        """Whether the plan asks for extras."""
        edits = self._edits
        is_edited = bool(edits) and any(row in edits for row in plan.rows[: plan.num_samples])
        is_edited |= bool(self._with_grammar) and self.awaits_masks(plan)
        is_edited |= self.process is not None and plan.num_samples > 0
        return is_edited or bool(plan.logprobs or plan.prompt_logprobs)

    def awaits_masks(self, plan: StepPlan) -> bool:
        """Whether a row draws under a mask, which the host makes when it has read the step before."""
        return not self._with_grammar.isdisjoint(plan.rows[: plan.num_samples])

    def run(
        self,
        plan: StepPlan,
        hidden: torch.Tensor,
        logits: torch.Tensor | None,
        seq_lens: torch.Tensor,
        sampled: torch.Tensor,
        masks: TokenMasks | None = None,
    ) -> PendingLogprobs:
        """Queue all extras: draw again in rows with edits, then compute log-probabilities and copy them to the host.

        Args:
            hidden: `[tokens, hidden_size]`, of all tokens of the step.
            logits: `[>= num_samples, vocab]`, not changed; None if the step has no samples.
            seq_lens: `[>= num_samples]` int32.
            sampled: `[num_samples]` int32. A row that draws again overwrites its item, and its last token in the batch.
            masks: of the rows with grammars. None: no row has one.
        """
        out = PendingLogprobs(plan.num_samples, len(plan.prompt_logprobs))
        if logits is not None:
            self._draw_again(plan, logits, seq_lens, sampled, masks)
            self._sample_logprobs(plan, logits, sampled, out)
        self._prompt_logprobs(plan, hidden, out)
        return out

    def _draw_again(
        self,
        plan: StepPlan,
        logits: torch.Tensor,
        seq_lens: torch.Tensor,
        sampled: torch.Tensor,
        masks: TokenMasks | None,
    ) -> None:
        sampling = plan.rows[: plan.num_samples]
        edited = [i for i, row in enumerate(sampling) if row in self._edits] if self._edits else []
        if self.process is not None:
            logits = self.process(sampling, logits[: len(sampling)].to(torch.float32, copy=True))
            edited = list(range(len(sampling)))
        bits, mask_of = None, {}
        if masks is not None and masks.samples:
            bits = self.masked_draws.send(masks.bits)
            self.masked_draws.draw(masks.samples, set(edited), bits, logits, seq_lens, sampled)
            mask_of = {sample: mask for mask, sample in enumerate(masks.samples)} if edited else {}
        for row_batch in _row_batches(edited, self._vocab_size):
            self._draw_edited(row_batch, plan, mask_of, bits, logits, seq_lens, sampled)
        for row in sampling:
            if row in self._edits:
                self._lengths[row] += 1

    def _draw_edited(
        self,
        row_batch: list[int],
        plan: StepPlan,
        mask_of: dict[int, int],
        bits: torch.Tensor | None,
        logits: torch.Tensor,
        seq_lens: torch.Tensor,
        sampled: torch.Tensor,
    ) -> None:
        """Draw a batch of samples from copies of their logits. `mask_of` has the place in `bits` of a sample's mask."""
        batch = self._batch
        edits = [self._edits.get(plan.rows[i], NO_EDITS) for i in row_batch]
        max_len = max(self._lengths.get(plan.rows[i], 1) for i in row_batch)
        entries = send(row_batch, torch.int64, logits.device)
        x, rows, lens = logits[entries].float(), batch.live_rows[entries], seq_lens[entries]
        masked = [(place, mask_of[i]) for place, i in enumerate(row_batch) if i in mask_of]
        if masked:
            places, which = send(list(zip(*masked, strict=True)), torch.int64, logits.device)
            mask_tokens(x, TokenBits(places, bits[which]))
        edit_logits(x, edits, batch.token_ids[rows.long(), :max_len], lens, max_len)
        drawn = torch.empty_like(rows)
        sample(x, rows, lens, batch.params, batch.token_ids, drawn)
        # The plain draw has reported NaN logits, which the edits may have hidden.
        sampled[entries] = torch.where(sampled[entries] == NAN_LOGITS, NAN_LOGITS, drawn)

    def _sample_logprobs(
        self, plan: StepPlan, logits: torch.Tensor, sampled: torch.Tensor, out: PendingLogprobs
    ) -> None:
        for num_top, samples in _by_num_top(plan.logprobs, self._vocab_size):
            for row_batch in _row_batches(samples, self._vocab_size + SORTED_COST * num_top):
                entries = send(row_batch, torch.int64, logits.device)
                packed = token_logprobs(logits[entries], sampled[entries].clamp(min=0), num_top)
                out.sample_batches.append((row_batch, _to_host(packed)))

    def _prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor, out: PendingLogprobs) -> None:
        """Only here are logits of prompt tokens computed, one batch of rows at a time."""
        first_token = [0, *accumulate(plan.query_lens)]
        wanted = [((i, span), span.num_top) for i, span in enumerate(plan.prompt_logprobs)]
        for num_top, spans in _by_num_top(wanted, self._vocab_size):
            tokens = [(i, span, offset) for i, span in spans for offset in range(span.num_tokens)]
            for row_batch in _row_batches(tokens, self._vocab_size + SORTED_COST * num_top):
                places = [
                    (first_token[span.index] + offset, plan.rows[span.index], span.start + offset + 1)
                    for _, span, offset in row_batch
                ]
                token, row, position = send(places, torch.int64, hidden.device).unbind(1)
                logits = self._compute_logits(hidden[token])
                packed = token_logprobs(logits, self._batch.token_ids[row, position], num_top)
                out.span_batches.append(([i for i, _, _ in row_batch], _to_host(packed)))


def _by_num_top(pairs: list[tuple], vocab_size: int) -> list[tuple[int, list]]:
    """Group (item, num_top) pairs by num_top; a negative one means the whole vocabulary."""
    pairs = [(item, vocab_size if n < 0 else min(n, vocab_size)) for item, n in pairs]
    pairs.sort(key=lambda pair: pair[1])
    return [(n, [item for item, _ in group]) for n, group in groupby(pairs, key=lambda pair: pair[1])]


def _row_batches(items: list, numbers_per_row: int) -> list[list]:
    """Cut `items`, one per row of logits, into batches that fit ROW_BATCH_BYTES."""
    size = max(1, min(MAX_BATCH_ROWS, ROW_BATCH_BYTES // (4 * numbers_per_row)))
    return [items[i : i + size] for i in range(0, len(items), size)]


def _to_host(x: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def row_edits(edits: LogitEdits, device: torch.device) -> RowEdits:
    """Copy a request's edits to the device."""
    row = RowEdits(edits.prompt_len, edits.repetition_penalty, edits.frequency_penalty, edits.presence_penalty)
    if edits.allowed_token_ids is not None:
        row.allowed = send(list(edits.allowed_token_ids), torch.int64, device)
    if edits.logit_bias:
        row.bias_ids = send(list(edits.logit_bias), torch.int64, device)
        biases = [min(MAX_BIAS, max(-MAX_BIAS, bias)) for bias in edits.logit_bias.values()]
        row.bias = send(biases, torch.float32, device)
    if edits.held_back:
        row.held_back, row.min_len = send(list(edits.held_back), torch.int64, device), edits.min_len
    if edits.bad_words:
        longest = max(map(len, edits.bad_words))
        padded = [[-1] * (longest - len(word)) + list(word) for word in edits.bad_words]
        row.bad_words = send(padded, torch.int32, device)
    return row


def add_largest_extras(plan: StepPlan) -> None:
    """Let a plan of new prompts ask for the extras that need the most memory: a full row batch of each kind."""
    num_tokens = 0
    for i, (new, length) in enumerate(zip(plan.new_rows, plan.query_lens, strict=True)):
        if i < MAX_BATCH_ROWS:
            new.edits = LogitEdits(prompt_len=0, repetition_penalty=1.1, allowed_token_ids=[0], logit_bias={0: 1.0})
            plan.logprobs.append((i, 20))
        if num_tokens < MAX_BATCH_ROWS:
            plan.prompt_logprobs.append(PromptSpan(i, 0, length, 20))
            num_tokens += length
