"""The probes: the one file in which tests look behind what the engine makes public, or change something there.

A test that needs to see a private part of an engine asks a function of this file, named for what the test wants to
know. So a private attribute can be renamed or replaced with one change here, and a test reads without knowing it.
`tests/test_house.py` checks that no other file of the tests names a private part.
"""

import pickle
import random
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # compile_kernels.py must import Triton as a compiler before anything of the engine comes
    import pytest
    import torch

    from nanovllm import LLM, AsyncLLM
    from nanovllm.async_stream import Stream
    from nanovllm.engine.block_manager import BlockManager
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.engine.request import Request
    from nanovllm.engine.scheduler import Scheduler
    from nanovllm.engine.sequence import Sequence
    from nanovllm.engine.text_engine import TextEngine
    from nanovllm.output_stream import OutputStream
    from nanovllm.step_plan import StepPlan
    from nanovllm.vllm.logits_processors import Processors
    from nanovllm.worker.cuda_graph import StepShape
    from nanovllm.worker.input_batch import InputBatch
    from nanovllm.worker.logit_extras import LogitExtras
    from nanovllm.worker.model_runner import ModelRunner


# ---- both fronts -----------------------------------------------------------------------------------------------------


def text_engine_of(llm: "LLM | AsyncLLM") -> "TextEngine":
    """The part that makes requests of prompts and outputs of tokens."""
    return llm._text_engine


def engine_of(llm: "LLM | AsyncLLM") -> "LLMEngine":
    """The engine behind a front; `AsyncLLM` has no public name for it."""
    return llm._text_engine.engine


def what_is_held(llm: "LLM | AsyncLLM") -> dict[str, Any]:
    """What a front and its engine still remember of requests, by name. An idle engine promises that this is empty."""
    text_engine, stats = llm._text_engine, llm.stats()
    held = {
        "part of the cache": stats.cache_usage,
        "running sequences": stats.num_running,
        "waiting sequences": stats.num_waiting,
        "requests": text_engine._requests,
        "owners of sequences": text_engine._owner,
        "streams": llm._streams,
    }
    if hasattr(llm, "_thread"):
        held |= {"listeners": llm._thread._listeners, "commands": llm._thread._commands}
    else:
        held |= {"requests of the call under way": llm._started, "the caller": llm._one_caller._inside}
    return {name: value for name, value in held.items() if value}


def assert_nothing_is_held(llm: "LLM | AsyncLLM") -> None:
    """An idle engine holds no block, no sequence, no request, no stream and no caller."""
    held = what_is_held(llm)
    assert not held, held


def requests_held(llm: "LLM | AsyncLLM") -> "set[Request]":
    """The requests whose tokens the front still follows: each must have somebody who waits for it."""
    return set(llm._text_engine._requests.values())


def streams_open(llm: "LLM | AsyncLLM") -> list[Any]:
    """The streams that a front still remembers: one that has ended, or was left, must not be among them."""
    return list(llm._streams)


# ---- LLM -------------------------------------------------------------------------------------------------------------


def readers_of(llm: "LLM") -> "dict[OutputStream | None, list[Request]]":
    """The requests of each open stream. A stream that was dropped reads None, and must soon be gone."""
    return {reference(): requests for reference, requests in llm._streams.items()}


def llm_over(engine: "LLMEngine") -> "LLM":
    """An `LLM` as its constructor leaves it, without tokenizer, over an engine that has no device to give back."""
    from nanovllm.engine.one_caller import OneCaller
    from nanovllm.engine.text_engine import TextEngine
    from nanovllm.llm import LLM

    text_engine = TextEngine.__new__(TextEngine)
    text_engine.engine = engine
    text_engine._tokenizer = text_engine._decoder = None
    text_engine._requests, text_engine._owner = {}, {}
    llm = LLM.__new__(LLM)
    llm._one_caller, llm._started, llm._streams = OneCaller(), {}, {}
    llm._text_engine = text_engine
    llm.close = lambda: None
    return llm


def text_engine_reference(llm: "LLM | AsyncLLM") -> "weakref.ref[TextEngine]":
    """A weak reference, which tells whether closing or dropping a front has freed what it had."""
    return weakref.ref(llm._text_engine)


# ---- AsyncLLM --------------------------------------------------------------------------------------------------------


def callers_with_turn(llm: "AsyncLLM") -> int:
    """How many requests hold one of the `max_waiting` turns."""
    return len(llm._semaphore._inside)


def callers_waiting(llm: "AsyncLLM") -> int:
    """How many requests wait for one of the `max_waiting` turns."""
    return len(llm._semaphore._outside)


def the_open_stream(llm: "AsyncLLM") -> "Stream":
    """What the engine's thread writes one request's progress to. Raises ValueError unless there is exactly one."""
    (stream,) = llm._streams.values()
    return stream


def outputs_not_taken(stream: "Stream") -> int:
    """How much waits for a slow reader: the latest output and nothing more, or it would cost memory."""
    return len(stream._latest)


def requests_in_thread(llm: "AsyncLLM") -> int:
    """How many requests the engine's thread works for."""
    return len(llm._thread._listeners)


def thread_of(llm: "AsyncLLM") -> threading.Thread:
    """The thread in which the engine runs. It ends when the front is closed."""
    return llm._thread._thread


def wakeup_of_thread(llm: "AsyncLLM") -> threading.Condition:
    """What the engine's thread sleeps on while it has nothing to do."""
    return llm._thread._wakeup


def submit_to_thread(llm: "AsyncLLM", request: "Request", listener: Callable[[Any], None]) -> None:
    """Give the engine's thread a request with a listener of the test's own."""
    llm._thread.submit(request, listener)


def replace_step_of_thread(llm: "AsyncLLM", step: Callable[[], None]) -> None:
    """Let the engine's thread call this instead of its own step."""
    llm._thread._step = step


def stages_of_a_step(llm: "AsyncLLM") -> list[tuple[Any, str]]:
    """(owner, method) of what a step does: launch it, read its tokens, follow them into outputs. Each may fail."""
    text_engine = llm._text_engine
    return [(text_engine.engine.runner, "launch"), (text_engine.engine, "_read_tokens"), (text_engine, "_detokenize")]


# ---- engine ----------------------------------------------------------------------------------------------------------


def begin_books(engine: "LLMEngine") -> None:
    """Give an engine that was made without its constructor what the constructor begins with: nothing in any book."""
    from nanovllm.engine.health import EngineHealth

    engine.advanced = []
    engine._in_flight, engine._unfinished = deque(), {}
    engine.fresh_ids, engine.fresh_seeds = count(), random.Random(0)
    engine.health = EngineHealth(engine.followers)
    engine._make_scheduler()


def steps_in_flight(engine: "LLMEngine") -> int:
    """How many steps have been launched whose tokens have not been read: at most `max_behind` between two steps."""
    return len(engine._in_flight)


def unfinished_sequences(engine: "LLMEngine") -> "dict[str, Sequence]":
    """The sequences that the engine still owes tokens, by request id: none may be lost, and none kept at its end."""
    return dict(engine._unfinished)


def free_rows(scheduler: "Scheduler") -> list[int]:
    """The device's rows that no running sequence has."""
    return list(scheduler._free_rows)


def free_blocks(manager: "BlockManager") -> list[int]:
    """The blocks that nobody owns, the next to be taken first."""
    return list(manager._free)


def replace_free_list(manager: "BlockManager", free: OrderedDict[int, None]) -> None:
    """Let the manager keep its free blocks in this."""
    manager._free = free


def owners_of_blocks(manager: "BlockManager") -> list[int]:
    """How many owners the manager counts for each block."""
    return manager._ref_count


def blocks_of_digests(manager: "BlockManager") -> dict[tuple[bytes, int], int]:
    """The prefix map: in which block the manager promises the tokens of a digest for a group of layers."""
    return {(digest, g): block for g, of_group in enumerate(manager._block_with) for digest, block in of_group.items()}


def digests_of_blocks(manager: "BlockManager") -> list[tuple[bytes, int] | None]:
    """For each block (digest, group) of what it holds, None where it holds nothing that could be found."""
    keys = zip(manager._digest_of, manager._group_of, strict=True)
    return [None if digest is None else (digest, group) for digest, group in keys]


def notes_its_changes(manager: "BlockManager") -> bool:
    """Whether the manager's digests note which of them change, for whoever traces its engine."""
    return type(manager._digest_of) is not list


# ---- worker ----------------------------------------------------------------------------------------------------------


def run_largest_step(runner: "ModelRunner") -> None:
    """Run the step in which the runner measures how much memory the largest step takes."""
    runner._run_largest_step()


def fetched_tokens(runner: "ModelRunner", plan: "StepPlan", shape: "StepShape") -> list[int]:
    """The tokens that the host reads of a step of this shape, once the device has sampled."""
    from nanovllm.worker.step_handle import LaunchedStep

    return runner._fetch(LaunchedStep(plan, shape, 0, runner.sampled, None)).tokens()


def wrap_sending(batch: "InputBatch", wrapper: Callable[..., None]) -> None:
    """Let the batch call `wrapper(send, *arguments)` whenever it would `send(*arguments)` to the device."""
    batch._send_batch = partial(wrapper, batch._send_batch)


def watch_logits_of_prompts(extras: "LogitExtras", monkeypatch: "pytest.MonkeyPatch") -> list[int]:
    """The returned list gets the number of rows of logits each time that the extras compute some."""
    sizes: list[int] = []
    compute = extras._compute_logits
    monkeypatch.setattr(extras, "_compute_logits", lambda x: sizes.append(len(x)) or compute(x))
    return sizes


def fail_grammars_after(num_tokens: int, reason: str, monkeypatch: "pytest.MonkeyPatch") -> None:
    """Let every matcher fail for this reason when it has taken so many tokens, as at a limit of the library."""
    from nanovllm.text.grammar import Matcher

    complete = Matcher._complete
    monkeypatch.setattr(
        Matcher, "_complete", lambda self, row: row.fill(0) if self.num_tokens >= num_tokens else complete(self, row)
    )
    monkeypatch.setattr(Matcher, "error", property(lambda self: reason if self.num_tokens >= num_tokens else ""))


# ---- distributed -----------------------------------------------------------------------------------------------------


def pids_of_ranks(llm: "LLM | AsyncLLM") -> list[int]:
    """The processes of the ranks from 1 on, by the engine's own books."""
    return llm._text_engine.engine.followers.processes.pids


def order_rank(llm: "LLM", rank: int, command: str, *args: Any) -> None:
    """Send one rank alone a command of which nobody else knows."""
    llm.engine.followers.processes.links[rank - 1].send_bytes(pickle.dumps((command, args, False)))


@contextmanager
def ending_ranks_raises(llm: "LLM", interrupt: Callable[[Any], None]) -> Iterator[None]:
    """Within it, what ends all ranks after a failure is itself interrupted."""
    processes = llm.engine.followers.processes
    processes.fail = interrupt
    yield
    del processes.fail


def forbid_starting_ranks(monkeypatch: "pytest.MonkeyPatch") -> None:
    """Whoever starts a rank's process fails with a TypeError."""
    monkeypatch.setattr("nanovllm.distributed.rank_processes._start_rank", None)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def tiling_of_product(rows: int, n: int, k: int, gated: bool, in_slices: bool) -> Any:
    """The tiles that the skinny product of these sizes takes; None: the library computes it."""
    from nanovllm.kernels.linear import skinny_tilings

    return skinny_tilings.choose_tiling(rows, n, k, gated, in_slices)


def slices_of_product(
    monkeypatch: "pytest.MonkeyPatch", programs: int, k: int, longest: int, multiprocessors: int
) -> int:
    """How many slices a product of so many tiles is cut into on a device with so many multiprocessors."""
    from nanovllm.kernels.linear import skinny_tilings

    monkeypatch.setattr(skinny_tilings, "multiprocessors", lambda device: multiprocessors)
    return skinny_tilings.num_slices.__wrapped__(programs, k, longest, "cpu")


def kernel_takes(
    x: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor | None", gate: str | None, in_slices: bool
) -> bool:
    """Whether the skinny kernel can take this product; if not, it must be left to the library."""
    from nanovllm.kernels.linear import skinny_linear

    return skinny_linear._can_take(x, weight, bias, gate, in_slices)


def tiles_cut_to_fit(tiling: Any, columns: int, element_size: int, shared_bytes: int) -> tuple[int, int]:
    """(tile's columns, depth of the pipeline) of a tiling, cut until a program's shared memory holds it."""
    from nanovllm.kernels.linear import skinny_tilings

    return skinny_tilings.fit(tiling, columns, element_size, shared_bytes)


def replace_skinny_launch(monkeypatch: "pytest.MonkeyPatch", launch: Callable[..., Any]) -> None:
    """Let `skinny_linear` call this instead of launching its kernel."""
    from nanovllm.kernels.linear import skinny_linear

    monkeypatch.setattr(skinny_linear, "_launch", launch)


def tiles_of_cache(cache: "torch.Tensor", tile: int) -> Any:
    """What the copy engine is told of a cache's tiles; None if it cannot take them."""
    from nanovllm.kernels.attention import paged_decode_kernel

    return paged_decode_kernel._tiles(cache, tile)


def launch_kernels_early() -> None:
    """From here on kernels are launched with Hopper's options for an early launch, whatever the device."""
    from nanovllm.kernels import early_launch

    early_launch._options = lambda device: {"EARLY": True, "launch_pdl": True}


# ---- outputs, and vLLM's names ---------------------------------------------------------------------------------------


def count_copies_of_prompts(monkeypatch: "pytest.MonkeyPatch") -> list[int]:
    """The returned list gets an entry each time that an output copies its prompt's ids."""
    from nanovllm.outputs import RequestOutput

    copied: list[int] = []
    descriptor = RequestOutput.__dict__["prompt_token_ids"]
    monkeypatch.setattr(descriptor, "_copy", lambda ids: copied.append(1) or list(ids))
    return copied


def tables_of_what_is_absent() -> list[dict[str, Any]]:
    """The tables of vLLM's words that ask for what this engine has not: options, sampling fields, arguments."""
    from nanovllm import vllm_defaults

    return [vllm_defaults._ENGINE_OPTIONS, vllm_defaults._SAMPLING_FIELDS, vllm_defaults._ARGUMENTS]


def names_of_vllms_paths() -> dict[str, Any]:
    """The names that programs may import from each of vLLM's module paths, but for the package itself."""
    import nanovllm.vllm

    return {path: nanovllm.vllm._NAMES_OF[path] for path in nanovllm.vllm._PATHS if path}


def processors_over(engine: Any) -> "Processors":
    """vLLM's logits processors over an engine, with no processor to call."""
    from nanovllm.vllm.logits_processors import Processors

    processors = Processors.__new__(Processors)
    processors._engine, processors._processors, processors._batch, processors._outputs = engine, [], [], {}
    return processors


def update_of_batch(processors: "Processors", sequences: list[Any]) -> Any:
    """What processors are told when the batch becomes these sequences."""
    return processors._update(sequences)


def batch_of(processors: "Processors") -> list[Any]:
    """The sequences in the order in which processors know them."""
    return processors._batch
