"""Edits of the logits before the draw: allowed tokens, bad words, held-back stop ids, biases, penalties.

An edit is a list of token ids and what to do to their logits, so the code reads and writes only those logits; penalties
look only at the tokens of their sequence. The lists of a batch are joined, whatever their lengths, so any number of
rows takes a handful of launches. Few requests ask for edits, so one version in plain PyTorch serves GPU and CPU; it
never waits for the device. `edited_logits` in `reference.py` is the dense formula that the tests hold it to.

Results are exact and repeatable: tokens are counted in integers, and where two threads write to one logit, they write
the same value.

Penalties as in CTRL (Keskar et al., 2019, arXiv:1909.05858: repetition) and OpenAI's API (frequency and presence).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(slots=True)
class RowEdits:
    """One row's edits. Tensors are on the device.

    Attributes:
        prompt_len: tokens of the prompt; those after it are the output.
        repetition, frequency, presence: penalties; 1, 0 and 0 for none.
        allowed: `[any]` int64, the only tokens that may be drawn. None: all.
        bias_ids, bias: `[any]` int64 and float32: add each bias to its token's logit. None: no biases.
        bad_words: `[words, longest]` int32, shorter words after -1s; a word's last token may not follow the others.
        held_back: `[any]` int64, tokens that may not be drawn while the sequence is shorter than `min_len`. None: none.
    """

    prompt_len: int
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    allowed: torch.Tensor | None = None
    bias_ids: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    bad_words: torch.Tensor | None = None
    held_back: torch.Tensor | None = None
    min_len: int = 0

    @property
    def has_penalties(self) -> bool:
        return (self.repetition, self.frequency, self.presence) != (1.0, 0.0, 0.0)


def edit_logits(
    logits: torch.Tensor, edits: list[RowEdits], token_ids: torch.Tensor, seq_lens: torch.Tensor, max_len: int
) -> None:
    """Edit each entry's logits in place, in this order: allowed tokens, bad words, held-back ids, biases, penalties.

    Args:
        logits: `[entries, vocab]` float32, contiguous.
        edits: one for each entry.
        token_ids: `[entries, any]` int32, prompts and outputs.
        seq_lens: `[entries]` int32, how many tokens each has, at least 1.
        max_len: at least the longest of `seq_lens`, which only the device knows.
    """
    device = logits.device
    if any(edit.allowed is not None for edit in edits):
        _keep_allowed(logits, [edit.allowed for edit in edits])
    has_bad_words = any(edit.bad_words is not None for edit in edits)
    has_penalties = any(edit.has_penalties for edit in edits)
    if has_bad_words or has_penalties:
        prompt_lens = send([edit.prompt_len for edit in edits], torch.int32, device)
    if has_bad_words:
        _ban_words(logits, [edit.bad_words for edit in edits], token_ids, prompt_lens, seq_lens)
    if any(edit.held_back is not None for edit in edits):
        is_short = seq_lens < send([edit.min_len for edit in edits], torch.int32, device)
        _hold_back(logits, [edit.held_back for edit in edits], is_short)
    if any(edit.bias is not None for edit in edits):
        entry, ids = _join([edit.bias_ids for edit in edits])
        bias = torch.cat([edit.bias for edit in edits if edit.bias is not None])
        logits.view(-1).index_add_(0, entry * logits.shape[1] + ids, bias)
    if has_penalties:
        factors = send([(edit.repetition, edit.frequency, edit.presence) for edit in edits], torch.float32, device)
        _penalize(logits, factors, token_ids[:, :max_len], prompt_lens, seq_lens)


def send(values: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy host values to a tensor on the device, without waiting for it."""
    is_cpu = device.type == "cpu"
    return torch.tensor(values, dtype=dtype, pin_memory=not is_cpu).to(device, non_blocking=True)


def _join(lists: list[torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each element of all lists, the index of its list, `[sum]` int64; and all lists in one."""
    present = [x for x in lists if x is not None]
    counts = [0 if x is None else len(x) for x in lists]
    owner = torch.repeat_interleave(send(counts, torch.int64, present[0].device), output_size=sum(counts))
    return owner, torch.cat(present)


def _keep_allowed(logits: torch.Tensor, allowed: list[torch.Tensor | None]) -> None:
    entry, ids = _join(allowed)
    flat = entry * logits.shape[1] + ids
    kept = logits.view(-1)[flat]
    is_limited = send([x is not None for x in allowed], torch.bool, logits.device)
    logits.masked_fill_(is_limited.unsqueeze(1), -math.inf)
    logits.view(-1)[flat] = kept


def _ban_words(
    logits: torch.Tensor,
    bad_words: list[torch.Tensor | None],
    token_ids: torch.Tensor,
    prompt_lens: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    longest = max(words.shape[1] for words in bad_words if words is not None)
    entry, words = _join([None if w is None else F.pad(w, (longest - w.shape[1], 0), value=-1) for w in bad_words])
    position = seq_lens[entry].unsqueeze(1) + torch.arange(1 - longest, 0, device=logits.device)
    is_output = position >= prompt_lens[entry].unsqueeze(1)
    tail = token_ids[entry.unsqueeze(1), position.clamp(min=0)]
    start, last = words[:, :-1], words[:, -1]
    is_banned = ((start < 0) | (is_output & (start == tail))).all(1)
    # Add: two words may end with the same token, and only one of them be banned here.
    logits.view(-1).index_add_(0, entry * logits.shape[1] + last, torch.where(is_banned, -math.inf, 0.0))


def _hold_back(logits: torch.Tensor, held_back: list[torch.Tensor | None], is_short: torch.Tensor) -> None:
    entry, ids = _join(held_back)
    logits.view(-1).index_add_(0, entry * logits.shape[1] + ids, torch.where(is_short[entry], -math.inf, 0.0))


def _penalize(
    logits: torch.Tensor,
    factors: torch.Tensor,
    token_ids: torch.Tensor,
    prompt_lens: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Apply `factors [entries, 3]`: repetition, frequency, presence."""
    repetition, frequency, presence = factors.unsqueeze(2).unbind(1)
    position = torch.arange(token_ids.shape[1], device=logits.device)
    is_known = position < seq_lens.unsqueeze(1)
    is_output = is_known & (position >= prompt_lens.unsqueeze(1))
    # Past its end a row holds anything. There the sequence's first token stands in: it gets its own edit once more.
    ids = torch.where(is_known, token_ids, token_ids[:, :1]).long()
    histogram = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    count = histogram.scatter_add_(1, ids, is_output.int()).gather(1, ids)
    x = logits.gather(1, ids)
    x = torch.where(x > 0, x / repetition, x * repetition) - frequency * count - presence * (count > 0)
    logits.scatter_(1, ids, x)
