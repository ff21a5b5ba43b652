"""What few requests ask: edited logits and log-probabilities. Done after a step's plain part, for those rows alone.

The plain part samples every row as if nothing had been asked, from a CUDA graph if it can. Here the rows that edit
their logits draw again, from edited copies, over the first draw; so a batch without such rows pays nothing, and in any
other each pays for itself. Work goes in pieces of rows, so that memory is bounded whatever is asked.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch

from nanovllm.kernels.sampling.logit_edits import RowEdits, edit_logits, send
from nanovllm.kernels.sampling.logprobs import token_logprobs, unpack
from nanovllm.kernels.sampling.sample import sample
from nanovllm.outputs import TokenLogprobs
from nanovllm.sampling_params import NAN_LOGITS
from nanovllm.step_plan import LogitEdits, NewRow, PromptSpan, StepPlan
from nanovllm.worker.input_batch import InputBatch

PIECE_BYTES = 64 << 20  # of float32 logits
MAX_PIECE_ROWS = 256
MAX_BIAS = 1e30  # no logit counts beside it, and what is done to it afterwards does not exceed float32
SORTED_COST = 8  # memory for one of the likeliest tokens (its logit and int64 index, twice), in float32 numbers


# (rows, their logits in float32) to logits: the user's, see `vllm/logits_processors.py`; few engines have any.
ProcessLogits = Callable[[list[int], torch.Tensor], torch.Tensor]
NO_EDITS = RowEdits(prompt_len=0)


@dataclass(slots=True)
class PendingLogprobs:
    """A step's log-probabilities: copies to the host that have ended when the step has."""

    num_samples: int
    num_spans: int
    # Whether a piece is of spans; the sample or span that each of its entries belongs to; the entries
    pieces: list[tuple[bool, list[int], torch.Tensor]] = field(default_factory=list)

    def samples(self) -> list[TokenLogprobs | None]:
        """Of each sample, None where not asked."""
        found = {index: values for index, values in self._values(of_spans=False)}
        return [found.get(i) for i in range(self.num_samples)]

    def spans(self) -> list[list[TokenLogprobs]]:
        """Of each prompt span, its tokens'."""
        spans: list[list[TokenLogprobs]] = [[] for _ in range(self.num_spans)]
        for index, values in self._values(of_spans=True):
            spans[index].append(values)
        return spans

    def _values(self, of_spans: bool) -> Iterator[tuple[int, TokenLogprobs]]:
        for are_spans, owners, packed in self.pieces:
            if are_spans is of_spans:
                for owner, values in zip(owners, unpack(packed), strict=True):
                    yield owner, TokenLogprobs(*values)


class LogitExtras:
    """The edits of the rows that have any, and the work after a step's plain part."""

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
        self._lengths: dict[int, int] = {}  # of the rows in _edits: tokens before the one to be sampled
        self.process = process

    def take(self, new_rows: list[NewRow]) -> None:
        """Remember the edits of rows that begin, and forget those of the rows' last owners."""
        for new in new_rows:
            self._edits.pop(new.row, None)
            if new.edits is not None:
                self._edits[new.row] = row_edits(new.edits, self._batch.state.device)
                self._lengths[new.row] = len(new.token_ids)

    def are_asked(self, plan: StepPlan) -> bool:
        """Whether anything is to be done in this step."""
        edits = self._edits
        is_edited = bool(edits) and any(row in edits for row in plan.rows[: plan.num_samples])
        is_edited |= self.process is not None and plan.num_samples > 0
        return is_edited or bool(plan.logprobs or plan.prompt_logprobs)

    def run(
        self,
        plan: StepPlan,
        hidden: torch.Tensor,
        logits: torch.Tensor | None,
        seq_lens: torch.Tensor,
        sampled: torch.Tensor,
    ) -> PendingLogprobs:
        """Queue it all: draw again where logits are edited, then work out and copy the log-probabilities.

        Args:
            hidden: `[tokens, hidden_size]`, of all tokens of the step.
            logits: `[>= num_samples, vocab]`, left as they are; None if there are no samples.
            seq_lens: `[>= num_samples]` int32.
            sampled: `[num_samples]` int32, overwritten, as is the rows' last token, where a row is drawn again.
        """
        out = PendingLogprobs(plan.num_samples, len(plan.prompt_logprobs))
        if logits is not None:
            self._draw_again(plan, logits, seq_lens, sampled)
            self._sample_logprobs(plan, logits, sampled, out)
        self._prompt_logprobs(plan, hidden, out)
        return out

    def _draw_again(self, plan: StepPlan, logits: torch.Tensor, seq_lens: torch.Tensor, sampled: torch.Tensor) -> None:
        batch = self._batch
        sampling = plan.rows[: plan.num_samples]
        asking = [i for i, row in enumerate(sampling) if row in self._edits]
        if self.process is not None:
            logits = self.process(sampling, logits[: len(sampling)].to(torch.float32, copy=True))
            asking = list(range(len(sampling)))
        for piece in _pieces(asking, self._vocab_size):
            edits = [self._edits.get(plan.rows[i], NO_EDITS) for i in piece]
            max_len = max(self._lengths.get(plan.rows[i], 1) for i in piece)
            entries = send(piece, torch.int64, logits.device)
            x, rows, lens = logits[entries].float(), batch.live_rows[entries], seq_lens[entries]
            edit_logits(x, edits, batch.token_ids[rows.long(), :max_len], lens, max_len)
            drawn = torch.empty_like(rows)
            sample(x, rows, lens, batch.params, batch.token_ids, drawn)
            # The edits may have hidden a NaN.
            sampled[entries] = torch.where(sampled[entries] == NAN_LOGITS, NAN_LOGITS, drawn)
        for row in sampling:
            if row in self._edits:
                self._lengths[row] += 1

    def _sample_logprobs(
        self, plan: StepPlan, logits: torch.Tensor, sampled: torch.Tensor, out: PendingLogprobs
    ) -> None:
        for num_top, asking in _by_num_top(plan.logprobs, self._vocab_size):
            for piece in _pieces(asking, self._vocab_size + SORTED_COST * num_top):
                entries = send(piece, torch.int64, logits.device)
                packed = token_logprobs(logits[entries], sampled[entries].clamp(min=0), num_top)
                out.pieces.append((False, piece, _to_host(packed)))

    def _prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor, out: PendingLogprobs) -> None:
        """The logits of prompt tokens exist only here, a piece at a time."""
        first_token = [0, *accumulate(plan.query_lens)]
        wanted = [((i, span), span.num_top) for i, span in enumerate(plan.prompt_logprobs)]
        for num_top, spans in _by_num_top(wanted, self._vocab_size):
            tokens = [(i, span, offset) for i, span in spans for offset in range(span.num_tokens)]
            for piece in _pieces(tokens, self._vocab_size + SORTED_COST * num_top):
                places = [
                    (first_token[span.index] + offset, plan.rows[span.index], span.start + offset + 1)
                    for _, span, offset in piece
                ]
                token, row, position = send(places, torch.int64, hidden.device).unbind(1)
                logits = self._compute_logits(hidden[token])
                packed = token_logprobs(logits, self._batch.token_ids[row, position], num_top)
                out.pieces.append((True, [i for i, _, _ in piece], _to_host(packed)))


def _by_num_top(asking: list[tuple], vocab_size: int) -> list[tuple[int, list]]:
    """(who, num_top) pairs, those with equal num_top together."""
    asking = [(who, vocab_size if n < 0 else min(n, vocab_size)) for who, n in asking]
    asking.sort(key=lambda pair: pair[1])
    return [(n, [who for who, _ in pairs]) for n, pairs in groupby(asking, key=lambda pair: pair[1])]


def _pieces(items: list, numbers_each: int) -> list[list]:
    size = max(1, min(MAX_PIECE_ROWS, PIECE_BYTES // (4 * numbers_each)))
    return [items[i : i + size] for i in range(0, len(items), size)]


def _to_host(x: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def row_edits(edits: LogitEdits, device: torch.device) -> RowEdits:
    """The edits of a plan, on the device."""
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


def ask_for_the_most(plan: StepPlan) -> None:
    """Let a plan of new prompts ask for all that takes memory here, as much as there is in a piece."""
    num_tokens = 0
    for i, (new, length) in enumerate(zip(plan.new_rows, plan.query_lens, strict=True)):
        if i < MAX_PIECE_ROWS:
            new.edits = LogitEdits(prompt_len=0, repetition_penalty=1.1, allowed_token_ids=[0], logit_bias={0: 1.0})
            plan.logprobs.append((i, 20))
        if num_tokens < MAX_PIECE_ROWS:
            plan.prompt_logprobs.append(PromptSpan(i, 0, length, 20))
            num_tokens += length
