"""What a trainer asks of an engine between two rollouts: new weights, and the device's memory for a while.

For arguments and errors see the methods of `LLM` with these names. The work is in `worker/sleep.py`; here an engine is
held to be idle, and its prefix cache, which is of the old weights or gone, is forgotten.
"""

from collections.abc import Collection, Iterable, Iterator
from copy import copy
from typing import TYPE_CHECKING

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import RankError

if TYPE_CHECKING:
    import torch


def load_weights(engine: LLMEngine, named_tensors: Iterable[tuple[str, "torch.Tensor"]]) -> None:
    from nanovllm.distributed.tensor_parallel import PeerLostError
    from nanovllm.models.loader import build_outline, checked_tensors
    from nanovllm.worker.sleep import load_weights

    runner, followers = engine.runner, engine.followers
    if not runner.has_weights:
        raise RuntimeError("load_weights() while the engine sleeps: call wake_up() first")
    _require_idle(engine, "load_weights()")
    outline = build_outline(runner.hf_config, type(runner.model))
    tied_head = engine.tied_head
    if isinstance(named_tensors, Collection):
        watching = copy(tied_head)
        for _ in checked_tensors(outline, named_tensors, watching):
            pass  # all, before anything is written
        engine.tied_head, tied_head = watching, None

    def shared() -> Iterator[tuple[str, "torch.Tensor"]]:
        """Each tensor, once the other ranks have it too. None of them hears of one that is refused."""
        for name, tensor in checked_tensors(outline, named_tensors, tied_head):
            yield name, followers.broadcast(name, tensor, runner.device, runner.dtype)

    refusal: Exception | None = None
    engine.begin_change()  # however this ends, what is cached is of other weights
    try:
        with followers.also_run("load_weights", wait=True):
            try:
                load_weights(runner, shared())
            except (PeerLostError, RankError):
                raise
            except Exception as error:  # a tensor's, or its maker's: all ranks are as far as the one before it
                refusal = error
            followers.send("no_more_tensors")
    finally:
        engine.reset_prefix_cache()
    if refusal is not None:
        raise refusal


def sleep(engine: LLMEngine, level: int) -> None:
    from nanovllm.worker.sleep import require_level, sleep

    require_level(level)
    _require_idle(engine, "sleep()")
    engine.begin_change()
    try:
        with engine.followers.also_run("sleep", level, wait=True):
            sleep(engine.runner, level)
    except Exception:
        engine.is_changing = False  # all is as before
        raise
    if level == 2 and engine.tied_head is not None:
        engine.tied_head.forget()
    engine.reset_prefix_cache()


def wake_up(engine: LLMEngine, tags: list[str] | None = None) -> None:
    from nanovllm.worker.sleep import require_tags, wake_up

    tags = require_tags(tags, engine.runner.has_weights)
    with engine.followers.also_run("wake_up", tags, wait=True):
        wake_up(engine.runner, tags)


def _require_idle(engine: LLMEngine, what: str) -> None:
    if engine.num_unfinished:
        raise RuntimeError(f"{what} while {engine.num_unfinished} requests are unfinished: finish or abort them")
