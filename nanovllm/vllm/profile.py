"""`start_profile` and `stop_profile`: PyTorch's profiler traces the engine's thread, on rank 0 alone."""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.engine.llm_engine import LLMEngine


class Profile(NamedTuple):
    """A trace under way."""

    profiler: Any  # a torch.profiler.profile
    file: Path


def start_profile(running: Profile | None, engine: LLMEngine, prefix: str | None) -> Profile:
    """Start a trace.

    Raises:
        RuntimeError: a trace is already under way.
        ValueError: `profiler_config` names no folder for the trace, or has options that nano-vLLM lacks.
    """
    import torch

    if running is not None:
        raise RuntimeError("start_profile() while a profile is being taken: call stop_profile() first")
    folder = _folder(engine.config.profiler_config or {})
    activities = [torch.profiler.ProfilerActivity.CPU]
    if engine.runner.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    profiler.start()
    name = f"{prefix + '_' if prefix else ''}rank0.{time.time_ns()}.pt.trace.json"
    return Profile(profiler, Path(folder).expanduser() / name)


def stop_profile(running: Profile | None) -> None:
    """Write the trace into its file. Raises RuntimeError if none is under way."""
    if running is None:
        raise RuntimeError("stop_profile() without start_profile()")
    running.profiler.stop()
    running.file.parent.mkdir(parents=True, exist_ok=True)
    running.profiler.export_chrome_trace(str(running.file))


def _folder(config: dict[str, Any]) -> str:
    wanted = {name: value for name, value in config.items() if value not in (None, 0, "")}
    folder = wanted.pop("torch_profiler_dir", None) or os.environ.get("VLLM_TORCH_PROFILER_DIR")
    if wanted.pop("profiler", "torch") != "torch" or wanted or not folder:
        raise ValueError(
            f"profiler_config={config!r} must be {{'profiler': 'torch', 'torch_profiler_dir': '…'}} for start_profile()"
        )
    return folder
