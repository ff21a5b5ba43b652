"""A program's own logits processors, by vLLM's protocol: classes of `LLM(logits_processors=[…])`.

An engine that has some lets them change the float32 logits of every row that samples, before the edits that requests
ask for and before the temperature; log-probabilities stay the model's. Updates tell them which place of the batch each
sequence has, and they need the last tokens: so an engine with processors does not plan ahead, and has one rank.
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any, TypeVar

import torch

from nanovllm.engine import sequence
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.sampling_params import SamplingParams

T = TypeVar("T")
# Of one request: (output ids, logits) or (prompt ids, output ids, logits) to logits, `[vocab]`.
RequestLogitsProcessor = Callable[..., torch.Tensor]


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()  # from the first index to the second
    SWAP = auto()  # both ways


@dataclass(frozen=True)
class BatchUpdate:
    """How the batch has changed since the last step: first removals, then additions, then moves."""

    batch_size: int
    removed: Sequence[int]
    added: Sequence[tuple[int, SamplingParams, list[int] | None, list[int]]]  # index, params, prompt and output ids
    moved: Sequence[tuple[int, int, MoveDirectionality]]


class LogitsProcessor(ABC):
    """What changes the logits of a batch."""

    @classmethod  # noqa: B027 -- most have nothing to refuse
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError for a request that it cannot serve."""

    @abstractmethod
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None: ...

    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`[batch, vocab]` to the same, changed in place or not."""

    @abstractmethod
    def is_argmax_invariant(self) -> bool:
        """Whether it never changes which token is the likeliest. vLLM asks; here it makes no difference."""

    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each `apply`. The lists of output ids that it was given grow by themselves."""


class AdapterLogitsProcessor(LogitsProcessor):
    """A processor that is one for each request: `new_req_logits_processor` makes it."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.req_info: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    @abstractmethod
    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        """The request's, or None if it has none."""

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.req_info, batch_update, self._bind)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, process in self.req_info.items():
            logits[index] = process(logits[index])
        return logits

    def _bind(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        process = self.new_req_logits_processor(params)
        if process is None:
            return None
        takes_prompt = len(inspect.signature(process).parameters) == 3
        return partial(process, prompt_ids, output_ids) if takes_prompt else partial(process, output_ids)


def process_dict_updates(
    req_entries: dict[int, T],
    batch_update: BatchUpdate | None,
    new_state: Callable[[SamplingParams, list[int] | None, list[int]], T | None],
) -> bool:
    """Keep a dict by batch index up to date. Returns whether it has changed."""
    if batch_update is None:
        return False
    before = dict(req_entries)
    for index in batch_update.removed:
        req_entries.pop(index, None)
    for index, *what in batch_update.added:
        state = new_state(*what)
        req_entries.pop(index, None)
        if state is not None:
            req_entries[index] = state
    for a, b, direction in batch_update.moved:
        entries = req_entries.pop(a, None), req_entries.pop(b, None)
        for index, entry in zip((b, a), entries, strict=True):
            if entry is not None and (index == b or direction is MoveDirectionality.SWAP):
                req_entries[index] = entry
    return req_entries != before


class Processors:
    """An engine's processors, and the batch as they know it: the sequences in consecutive places."""

    def __init__(self, engine: LLMEngine, classes: list[str | type[LogitsProcessor]]) -> None:
        """Raises TypeError: a class is not a LogitsProcessor."""
        from nanovllm.vllm.engines import vllm_config

        self._classes = [_resolve(cls) for cls in classes]
        device = torch.device(engine.runner.device)
        self._processors = [cls(vllm_config(engine), device, engine.runner.is_cuda) for cls in self._classes]
        self._engine = engine
        self._batch: list[sequence.Sequence] = []
        self._outputs: dict[sequence.Sequence, list[int]] = {}

    def validate(self, params: SamplingParams) -> None:
        for cls in self._classes:
            cls.validate_params(params)

    def __call__(self, rows: list[int], logits: torch.Tensor) -> torch.Tensor:
        """The rows' logits `[rows, vocab]` float32, which may be written to, as they are to be."""
        by_row = {seq.row: seq for seq in self._engine.scheduler.running}
        seqs = [by_row[row] for row in rows]
        update = self._update(seqs)
        for seq, output_ids in self._outputs.items():
            output_ids += seq.token_ids[seq.num_prompt_tokens + len(output_ids) :]
        index = {seq: i for i, seq in enumerate(seqs)}
        order = torch.tensor([index[seq] for seq in self._batch], dtype=torch.int64, device=logits.device)
        logits = logits[order]
        for processor in self._processors:
            processor.update_state(update)
            logits = processor.apply(logits)
        return logits[order.argsort()]

    def _update(self, seqs: list[sequence.Sequence]) -> BatchUpdate | None:
        """Update the batch to these sequences: new ones take freed places, and the last ones fill what gaps remain."""
        batch, present, known = self._batch, set(seqs), set(self._batch)
        free = [i for i, seq in enumerate(batch) if seq not in present]
        for i in free:
            del self._outputs[batch[i]]
        added, moved = [], []
        for seq in seqs:
            if seq in known:
                continue
            index = free.pop(0) if free else len(batch)
            batch[index : index + 1] = [seq]
            prompt_ids, self._outputs[seq] = seq.token_ids[: seq.num_prompt_tokens], []
            added.append((index, seq.params, prompt_ids, self._outputs[seq]))
        removed = list(free)
        while free:
            last = len(batch) - 1
            seq = batch.pop()
            if free[-1] == last:
                free.pop()
            else:
                index = free.pop(0)
                batch[index] = seq
                moved.append((last, index, MoveDirectionality.UNIDIRECTIONAL))
        if not (removed or added or moved):
            return None
        return BatchUpdate(len(batch), removed, added, moved)


def install(engine: LLMEngine) -> None:
    """Have the engine run its processors in every step. Raises as `Processors`."""
    engine.logits_processors = Processors(engine, engine.config.logits_processors)
    engine.runner.set_logits_processors(engine.logits_processors)
    engine.max_behind = 0


def _resolve(cls: str | type[LogitsProcessor]) -> type[LogitsProcessor]:
    if isinstance(cls, str):
        module, _, name = cls.partition(":")
        cls = getattr(importlib.import_module(module), name)
    if not (isinstance(cls, type) and issubclass(cls, LogitsProcessor)):
        raise TypeError(f"logits_processors has {cls!r:.80}: it must have LogitsProcessor classes, or 'module:Class'")
    return cls
