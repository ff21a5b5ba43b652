"""What a trainer asks of an engine between two rollouts: new weights, and the device's memory for a while.

For arguments and errors see the methods of `LLM` with these names. The work is in `worker/sleep.py`; here an engine is
held to be idle, and its prefix cache, which is of the old weights or gone, is forgotten.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from nanovllm.engine.llm_engine import LLMEngine

if TYPE_CHECKING:
    import torch


def load_weights(engine: LLMEngine, named_tensors: Iterable[tuple[str, "torch.Tensor"]]) -> None:
    from nanovllm.worker.sleep import load_weights

    if engine.runner.sleep_level:
        raise RuntimeError("load_weights() while the engine sleeps: call wake_up() first")
    if engine.followers.size > 1:
        raise NotImplementedError(f"load_weights() is not there yet for tensor_parallel_size={engine.followers.size}")
    _require_idle(engine, "load_weights()")
    try:
        load_weights(engine.runner, named_tensors)
    finally:
        engine.block_manager.forget_content()


def sleep(engine: LLMEngine, level: int) -> None:
    from nanovllm.worker.sleep import require_level, sleep

    require_level(level)
    if engine.followers.size > 1 and level == 2:
        raise NotImplementedError("sleep(level=2) needs load_weights(), which is not there yet with several ranks")
    _require_idle(engine, "sleep()")
    with engine.followers.doing("sleep", level, wait=True):
        sleep(engine.runner, level)
    engine.block_manager.forget_content()


def wake_up(engine: LLMEngine) -> None:
    from nanovllm.worker.sleep import wake_up

    with engine.followers.doing("wake_up", wait=True):
        wake_up(engine.runner)


def _require_idle(engine: LLMEngine, what: str) -> None:
    if engine.num_unfinished:
        raise RuntimeError(f"{what} while {engine.num_unfinished} requests are unfinished: finish or abort them")
