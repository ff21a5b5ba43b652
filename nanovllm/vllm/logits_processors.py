"""A program's own logits processors, by vLLM's protocol: classes that it passes as `LLM(logits_processors=[…])`.

In every step the processors change the float32 logits of every row that samples, before the engine applies the edits
that requests ask for and the temperature; log-probabilities stay the model's. Batch updates tell the processors each
sequence's index in the batch. Processors read the tokens of the last step, so an engine that has processors plans a
step only after it has read the step before; and it has one rank.
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
# For one request: (output ids, logits) or (prompt ids, output ids, logits) -> logits, `[vocab]`.
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
    """Changes the logits of a batch; a program derives its processors from this class."""

    @classmethod  # noqa: B027 -- most have nothing to refuse
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError for parameters that the processor cannot serve."""

    @abstractmethod
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None: ...

    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change the logits `[batch, vocab]`, in place or not. Returns them, `[batch, vocab]`."""

    @abstractmethod
    def is_argmax_invariant(self) -> bool:
        """Whether the processor never changes which token is the likeliest. Only vLLM uses the answer."""

    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """The engine calls it before each `apply`. It appends new tokens to the lists of output ids that it passed."""


class AdapterLogitsProcessor(LogitsProcessor):
    """A processor that runs a separate function for each request; `new_req_logits_processor` makes the function."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.req_info: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    @abstractmethod
    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        """The function for a request with these parameters, or None if the request needs none."""

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
    """Update a dict whose keys are batch indices. Returns whether it has changed."""
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
    """An engine's processors, and the batch as they see it: sequences at consecutive indices."""

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
        """Run the processors on the rows' float32 logits `[rows, vocab]`, which they may overwrite."""
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
        """Make these sequences the batch: new ones take freed indices, then the last ones move into the gaps left."""
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
    """Make the engine run its processors in every step. Raises as `Processors`."""
    engine.logits_processors = Processors(engine, engine.config.logits_processors)
    engine.runner.process_logits = engine.runner.extras.process = engine.logits_processors
    engine.max_behind = 0


def _resolve(cls: str | type[LogitsProcessor]) -> type[LogitsProcessor]:
    if isinstance(cls, str):
        module, _, name = cls.partition(":")
        cls = getattr(importlib.import_module(module), name)
    if not (isinstance(cls, type) and issubclass(cls, LogitsProcessor)):
        raise TypeError(f"logits_processors has {cls!r:.80}: it must have LogitsProcessor classes, or 'module:Class'")
    return cls
