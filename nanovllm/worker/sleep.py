"""Lends the device's memory to another program, as to a trainer between rollouts, and takes it back; new weights.

The levels are those of vLLM's sleep mode. Both drop the cache, the rows and the graphs. Level 1 keeps the weights in
host memory: on CUDA page-locked, so that they travel at the bus's rate and stay resident for the next time. Level 2
keeps nothing, for weights that will be replaced anyway. On a CPU level 1 leaves the weights where they are.

A captured graph holds addresses, and freed memory loses them. vLLM keeps them: it replaces PyTorch's allocator and maps
other pages under the same addresses. Here `wake_up` captures the graphs again, which takes as long as at the engine's
start. While the engine is awake, `load_weights` writes in place and the graphs stay valid.
"""

import ctypes
from collections.abc import Collection

import torch
from torch import nn

from nanovllm.models import loader
from nanovllm.worker.model_runner import ModelRunner

TAGS = ("weights", "kv_cache")  # what `wake_up` can take back separately


@torch.inference_mode()
def sleep(runner: ModelRunner, level: int) -> None:
    """Give memory back, with no step in flight. Goes from level 1 to 2; does nothing if already asleep as deep.

    Raises:
        ValueError: level is not 1 or 2.
        RuntimeError: the host has no room, and the engine is as before.
    """
    require_level(level)
    if level <= runner.sleep_level and not runner.has_weights:
        return
    before, runner.not_ready = runner.not_ready, "sleep() was interrupted: call it again, then wake_up()"
    try:
        _put_away(runner, level)
    except Exception:
        runner.not_ready = before
        raise
    runner.sleep_level = level
    _say_why_not_ready(runner)


def require_level(level: int) -> None:
    """Raises ValueError if `level` is not 1 or 2."""
    if level not in (1, 2):
        raise ValueError(f"level={level!r} must be 1 (weights to host memory) or 2 (weights dropped)")


def require_tags(tags: list[str] | None, has_weights: bool) -> list[str]:
    """The tags as a list, all for None. Raises ValueError for an unknown tag, RuntimeError for a wrong order."""
    tags = list(TAGS) if tags is None else tags
    if not isinstance(tags, list | tuple) or not set(tags) <= set(TAGS):
        raise ValueError(f"tags={tags!r} must be None or a list of 'weights' and 'kv_cache'")
    if "kv_cache" in tags and "weights" not in tags and not has_weights:
        raise RuntimeError("tags=['kv_cache'] before the weights: call wake_up(tags=['weights']) first")
    return list(tags)


@torch.inference_mode()
def wake_up(runner: ModelRunner, tags: Collection[str] = TAGS) -> None:
    """Take back what `sleep` gave. After level 2 the weights are missing until `load_weights` brings them.

    Args:
        tags: "weights" alone lets new ones be loaded while another program still uses the cache's memory; "kv_cache"
            takes the rest, and the engine is awake.

    Raises:
        torch.OutOfMemoryError: other programs hold the device's memory. The engine stays asleep, with the weights that
            it had before, and can be woken again.
    """
    if not runner.sleep_level:
        return
    had_weights = runner.has_weights
    try:
        if "weights" in tags and not runner.has_weights:
            if runner.sleep_level == 2:
                runner.model.to_empty(device=runner.device)
            elif runner.is_cuda:
                _move_weights(runner.model, runner.device)
            runner.has_weights = True
        if "kv_cache" in tags:
            runner.start()
            runner.sleep_level = 0
    except BaseException:
        if had_weights:  # new ones may have been loaded since
            runner.stop()
        else:
            _put_away(runner, runner.sleep_level)
        raise
    finally:
        _say_why_not_ready(runner)


def load_weights(runner: ModelRunner, named_tensors: loader.NamedTensors) -> None:
    """`loader.update_weights` for a runner that has its weights' memory. When it returns, the tensors may be freed.

    After level 2 it also keeps count of the missing tensors; when the last has come, the weights are laid out.
    """
    outline = loader.build_outline(runner.hf_config, type(runner.model), dtype=runner.dtype, device=runner.device)
    loaded: set[str] = set()
    try:
        loader.update_weights(runner.model, outline, named_tensors, loaded)
    finally:
        if runner.is_cuda:
            torch.cuda.synchronize()
        if runner.missing_weights:
            runner.missing_weights -= loaded
            _say_why_not_ready(runner)
            if not runner.missing_weights:
                loader.lay_out_weights(runner.model)


def _say_why_not_ready(runner: ModelRunner) -> None:
    missing, runner.not_ready = runner.missing_weights, ""
    if runner.sleep_level and not runner.has_weights:
        runner.not_ready = "the engine sleeps: call wake_up() first"
    elif runner.sleep_level:
        runner.not_ready = "the engine has its weights, but no cache: call wake_up(tags=['kv_cache']) first"
    elif missing:
        runner.not_ready = (
            f"sleep(level=2) has dropped the weights, and {len(missing)} tensors, {min(missing)!r} for one, have not "
            "come back: call load_weights() first"
        )


def _put_away(runner: ModelRunner, level: int) -> None:
    # The weights first: moving them may fail, and then nothing has changed.
    if level == 2:
        loader.drop_weights(runner.model)
        runner.missing_weights = set(loader.tensor_places(runner.model))
    elif runner.is_cuda:
        _move_weights(runner.model, "cpu")
    runner.has_weights = False
    runner.stop()
    if not runner.is_cuda:
        _trim_heap()


def _move_weights(model: nn.Module, device: str) -> None:
    """Move all weights to "cuda", or page-locked to "cpu". If memory runs out, none has moved."""
    params = [param for param in model.parameters() if param.device.type != device]
    pin = device == "cpu"
    moved = [torch.empty(param.shape, dtype=param.dtype, device=device, pin_memory=pin) for param in params]
    for param, target in zip(params, moved, strict=True):
        target.copy_(param, non_blocking=True)
    torch.cuda.synchronize()
    for param, target in zip(params, moved, strict=True):
        param.data = target


def _trim_heap() -> None:
    """Make the C library return freed memory to the system: glibc kept 1.0 of 1.2 GB of weights for later use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)
