"""vLLM's worker: the object that `collective_rpc` calls, with the model that `apply_model` passes to a function."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nanovllm.engine import weights_and_sleep
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.models.sharded_state import save_shard
from nanovllm.models.weight_files import read_tensors


class Worker:
    """Rank 0's worker, the argument of a function that a program gives to `collective_rpc`.

    Its methods that change weights reach the followers too.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.rank = self.local_rank = 0
        self.device = engine.runner.device
        self.model_runner = SimpleNamespace(model=_Model(engine), device=engine.runner.device)
        self.worker = self  # vLLM wraps its worker, and the wrapper has this attribute
        self._engine = engine

    def get_model(self) -> Any:
        return self.model_runner.model

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """As `LLM.load_weights`."""
        self.model_runner.model.load_weights(weights)

    def reload_weights(self) -> None:
        """Read the weights from the model's folder again. They replace the present ones, "dummy" weights too."""

        weights_and_sleep.load_weights(self._engine, read_tensors(self._engine.model_path))

    def save_sharded_state(self, path: str | Path, pattern: str | None = None, max_size: int | None = None) -> None:
        """Make each rank write its weights into a folder, for `LLM(folder, load_format="sharded_state")`.

        The caller must add the model's other files to the folder. Raises RuntimeError while the engine sleeps.
        """
        folder, engine = Path(path).absolute(), self._engine
        if engine.runner.not_ready:
            raise RuntimeError(engine.runner.not_ready)
        folder.mkdir(parents=True, exist_ok=True)
        with engine.followers.also_run("save_shard", folder, pattern, max_size, wait=True):
            save_shard(engine.runner.model, 0, folder, pattern, max_size)

    def update_config(self, overrides: dict[str, Any]) -> None:
        """Accepts, and ignores, the load format that vLLM needs to know before it reloads over dummy weights.

        Raises:
            ValueError: `overrides` has anything else.
        """
        if overrides not in ({"load_config": {"load_format": name}} for name in ("auto", "hf", "safetensors")):
            raise ValueError(f"overrides={overrides!r} must be {{'load_config': {{'load_format': 'auto'}}}}")


class _Model:
    """The model's module, with vLLM's `load_weights`, which takes a checkpoint's names and shapes on every rank."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        weights_and_sleep.load_weights(self._engine, weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.runner.model, name)


# The methods that collective_rpc calls by name: each reaches all ranks by itself.
_BY_NAME = ("load_weights", "reload_weights", "save_sharded_state", "update_config")


def call_workers(
    engine: LLMEngine, method: str | Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None
) -> list[Any]:
    """Call a method of the worker, or `method(worker, *args, **kwargs)`. Returns a result for each rank.

    Raises:
        NotImplementedError: the worker has no such method, or `method` is a function and there are several ranks.
    """
    worker = Worker(engine)
    if isinstance(method, str):
        if method not in _BY_NAME:
            raise NotImplementedError(f"method={method!r} must be a function or one of {', '.join(_BY_NAME)}")
        result = getattr(worker, method)(*args, **(kwargs or {}))
        return [result] * engine.config.tensor_parallel_size
    _require_one_rank(engine, method)
    return [method(worker, *args, **(kwargs or {}))]


def apply_model(engine: LLMEngine, function: Callable[[Any], Any]) -> list[Any]:
    """`[function(model)]`. Raises NotImplementedError with several ranks."""
    _require_one_rank(engine, function)
    return [function(engine.runner.model)]


def _require_one_rank(engine: LLMEngine, function: Callable[..., Any]) -> None:
    if engine.config.tensor_parallel_size > 1:
        raise NotImplementedError(f"{function!r} would run on rank 0 alone: functions need tensor_parallel_size=1")
