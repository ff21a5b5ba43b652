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

# How a sequence's block table for one group of layers has changed: (name, group, entries kept, entries at its beginning
# that were given back, blocks behind those kept). A block that was given back is -1.
TableChange = tuple[str, int, int, int, list[int]]


# A sequence's part of a step: (name, kind, position of its first token, number of its tokens). Plain like the above,
# since there are hundreds in a step: named tuples take five times as long to make and to pickle.
BatchEntry = tuple[str, Literal["prefill", "decode"], int, int]


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
        tables: how block tables of running sequences have changed since the last trace. Those of sequences that do not
            run any more are gone.
        digests: of blocks that others can find by another digest than at the last trace; None: not any more. A block
            is used if a table has it; otherwise it is cached if it has a digest, and free if not.
        is_full: the first trace: it has all tables and digests.
        pieces: the text that each sequence got since the last trace. Of one without a detokenizer (its reader takes
            only the whole) it is the text of its newest token. Empty if no texts are wanted.
    """

    num_steps: int
    num_skipped: int
    time_s: float
    step_s: float
    batch: list[BatchEntry]
    running: list[str]
    waiting: list[str]
    tables: list[TableChange]
    digests: dict[int, bytes | None]
    is_full: bool
    events: list[Event]
    arrivals: list[Arrival]
    pieces: dict[str, list[str]] = field(default_factory=dict)
    stats: StepStats = field(default_factory=StepStats)


Observer = Callable[[StepTrace], None]


class EngineShape(NamedTuple):
    """The sizes of an engine that a reader of its traces needs. Blocks of all groups of layers come from one pool.

    `windows`: of each group, how many tokens a query sees; None: all.
    """

    device: str
    num_blocks: int
    block_size: int
    windows: tuple[int | None, ...]
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
        runner.cache_groups.windows,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        engine.max_model_len,
        config.tensor_parallel_size,
        model.hidden_size,
        model.num_hidden_layers,
        model.num_attention_heads,
        model.num_key_value_heads,
    )
