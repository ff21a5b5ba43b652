"""What a trainer needs of an engine between two rollouts: it loads new weights, and takes the device's memory.

`LLM` and `AsyncLLM` have methods with these names. The work is in `worker/sleep.py`. This module checks that the engine
is idle, and empties the prefix cache, whose keys and values come from the old weights.
"""

from collections.abc import Collection, Iterable, Iterator
from copy import copy
from typing import TYPE_CHECKING

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import RankError

if TYPE_CHECKING:
    import torch


def load_weights(engine: LLMEngine, named_tensors: Iterable[tuple[str, "torch.Tensor"]]) -> None:
    """Write new weights over the old ones, as after an optimizer step, and empty the prefix cache.

    Args:
        named_tensors: (name, tensor) pairs with the checkpoint's names and shapes, in float32, bfloat16, float16 or
            float64, on any device. They may be some of the weights; the others stay as they are, so that several calls
            can bring one model. With a tied head, `lm_head.weight` may come after the embedding or along with it.

    Raises:
        RuntimeError: requests are unfinished, or the engine sleeps.
        TypeError, ValueError: an entry is no such pair; or, naming the tensor, it is unexpected, comes twice, has the
            wrong shape or dtype, or is a tied head unlike the embedding. A list is checked before anything is written.
            From a generator, the tensors before the refused one are written (see the error's notes). Either way the
            engine serves on.
    """
    from nanovllm.distributed.tensor_parallel import PeerLostError
    from nanovllm.models.loader import build_outline, checked_tensors, tensor_dtypes
    from nanovllm.worker.sleep import load_weights

    runner, followers = engine.runner, engine.followers
    if not runner.has_weights:
        raise RuntimeError("load_weights() while the engine sleeps: call wake_up() first")
    _require_idle(engine, "load_weights()")
    outline = build_outline(runner.hf_config, type(runner.model), dtype=runner.dtype, device=runner.device)
    dtypes = tensor_dtypes(outline)
    tied_head = engine.tied_head
    if isinstance(named_tensors, Collection):
        watching = copy(tied_head)
        for _ in checked_tensors(outline, named_tensors, watching):
            pass  # check all tensors before writing the first
        engine.tied_head, tied_head = watching, None

    def shared() -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yields each tensor after sending it to the other ranks. They never receive a refused one."""
        for name, tensor in checked_tensors(outline, named_tensors, tied_head):
            yield name, followers.broadcast(name, tensor, runner.device, dtypes[name])

    refusal: Exception | None = None
    engine.begin_change()  # however this ends, the cache no longer fits the weights
    try:
        with followers.also_run("load_weights", wait=True):
            try:
                load_weights(runner, shared())
            except (PeerLostError, RankError):
                raise
            except Exception as error:  # of a tensor or of the caller's generator: all ranks have the ones before it
                refusal = error
            followers.send("no_more_tensors")
    finally:
        engine.reset_prefix_cache()
    if refusal is not None:
        raise refusal


def sleep(engine: LLMEngine, level: int) -> None:
    """Give the device's memory back: drop the cache, and move the weights to host memory (level 1) or drop them, too
    (level 2, after which the caller must load them anew). The engine generates nothing until `wake_up()`.

    Does nothing if the engine already sleeps at this level or a deeper one.

    Raises:
        ValueError: level is not 1 or 2; RuntimeError: requests are unfinished, or the host has no room.
    """
    from nanovllm.worker.sleep import require_level, sleep

    require_level(level)
    _require_idle(engine, "sleep()")
    engine.begin_change()
    try:
        with engine.followers.also_run("sleep", level, wait=True):
            sleep(engine.runner, level)
    except Exception:
        engine.is_changing = False  # nothing has changed
        raise
    if level == 2 and engine.tied_head is not None:
        engine.tied_head.forget()
    engine.reset_prefix_cache()


def wake_up(engine: LLMEngine, tags: list[str] | None = None) -> None:
    """Take the device's memory again. After `sleep(2)`, call `load_weights()` before anything else.

    Args:
        tags: ["weights"] takes the memory of the weights alone, so that new ones can be loaded while the trainer still
            needs the rest; ["kv_cache"] takes the rest later; None takes both.

    Raises:
        ValueError: there is no such tag; RuntimeError: the cache is to wake before the weights.
        torch.OutOfMemoryError: others hold the memory; the engine sleeps on, and the caller may try again.
    """
    from nanovllm.worker.sleep import require_tags, wake_up

    tags = require_tags(tags, engine.runner.has_weights)
    with engine.followers.also_run("wake_up", tags, wait=True):
        wake_up(engine.runner, tags)


def _require_idle(engine: LLMEngine, what: str) -> None:
    if engine.num_unfinished:
        raise RuntimeError(f"{what} while {engine.num_unfinished} requests are unfinished: finish or abort them")
