"""What one step of an engine did, as plain data: `engine.observer` gets a `StepTrace` after each step.

    llm.engine.observer = lambda trace: print(trace.batch, [event.what for event in trace.events])

Nothing is made while `engine.observer` is None. Sequences have short names here, "A", "B", …, "Z", "A1", …, in the
order in which traces first saw them; with n > 1 each completion has a name of its own. `engine/step_tracer.py` makes
traces, and `nanovllm.trace` writes them to files.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from nanovllm.engine.stats import StepStats


class BlockState(NamedTuple):
    """What one block of the cache holds after a step.

    Attributes:
        state: "used"; "cached": nobody has it, but its content can be revived; "free".
        owners: who has it in a block table; more than one share a prefix.
        first_token: the position of its first token in its sequence, in tokens; -1 if that is not known.
        digest: the first 8 hex digits of the digest under which others find it; "" if none do.
    """

    block: int
    state: Literal["used", "cached", "free"]
    owners: tuple[str, ...]
    first_token: int
    digest: str


class BatchEntry(NamedTuple):
    """A sequence's part of a step: `num_tokens` tokens, the first of them at position `first`."""

    name: str
    kind: Literal["prefill", "decode"]
    first: int
    num_tokens: int


class Event(NamedTuple):
    """Something that happened to a sequence or a block.

    Attributes:
        what: "arrive", "admit", "hit", "chunk", "preempt", "evict", "finish" or "abort".
        by: the function that did it, as `trace/functions.py` finds its source.
        data: of a hit {tokens, blocks}, of an admission or preemption {blocks}, of an eviction {block}, of a chunk
            {from, to, of} in tokens, of an end {reason}.
    """

    what: str
    name: str | None
    by: str
    data: dict[str, Any]


class Arrival(NamedTuple):
    """A sequence that traces have not seen before. `prompt`: at most MOST_CHARS of its text."""

    name: str
    num_prompt_tokens: int
    prompt: str
    max_tokens: int


@dataclass(slots=True)
class StepTrace:
    """One step, and the engine's books after it.

    Attributes:
        num_steps: that the engine has launched so far.
        num_skipped: steps since the last trace that nobody traced; their events are lost.
        time_s: when the step ended, by `time.monotonic()`.
        step_s: how long it took; 0 if no step ran, and something has changed between two.
        batch: what it launched, decodes first.
        running: in order of arrival. waiting: the first MOST_WAITING of the queue.
        blocks: those that differ from the last trace; with `is_full` all that are not free.
        pieces: the text that each sequence got since the last trace. Of one without a detokenizer (its reader takes
            only the whole) it is the text of its newest token.
    """

    num_steps: int
    num_skipped: int
    time_s: float
    step_s: float
    batch: list[BatchEntry]
    running: list[str]
    waiting: list[str]
    blocks: list[BlockState]
    is_full: bool
    events: list[Event]
    arrivals: list[Arrival]
    pieces: dict[str, list[str]] = field(default_factory=dict)
    stats: StepStats = field(default_factory=StepStats)


Observer = Callable[[StepTrace], None]


class EngineShape(NamedTuple):
    """The sizes of an engine that a reader of its traces needs. Blocks of all groups of layers come from one pool."""

    device: str
    num_blocks: int
    block_size: int
    num_groups: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    tensor_parallel_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int


def shape_of(engine: Any) -> EngineShape:
    """The shape of an `LLMEngine`."""
    config, runner = engine.config, engine.runner
    model = runner.hf_config
    return EngineShape(
        runner.device,
        runner.num_blocks,
        runner.block_size,
        len(runner.cache_groups.windows),
        config.max_num_seqs,
        config.max_num_batched_tokens,
        engine.max_model_len,
        config.tensor_parallel_size,
        model.hidden_size,
        model.num_hidden_layers,
        model.num_attention_heads,
        model.num_key_value_heads,
    )
