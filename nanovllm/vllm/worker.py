"""What vLLM's `collective_rpc` and `apply_model` reach: a rank's worker and its model."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nanovllm.engine import weights_and_sleep
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.models.sharded_state import save_shard
from nanovllm.models.weight_files import read_tensors


class Worker:
    """Rank 0's, handed to functions as vLLM hands theirs. What changes weights reaches the other ranks too."""

    def __init__(self, engine: LLMEngine) -> None:
        self.rank = self.local_rank = 0
        self.device = engine.runner.device
        self.model_runner = SimpleNamespace(model=_Model(engine), device=engine.runner.device)
        self.worker = self  # as vLLM's wrapper of a worker has it
        self._engine = engine

    def get_model(self) -> Any:
        return self.model_runner.model

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """As `LLM.load_weights`."""
        self.model_runner.model.load_weights(weights)

    def reload_weights(self) -> None:
        """Read the weights of the model's folder again, over what is there, "dummy" weights included."""

        weights_and_sleep.load_weights(self._engine, read_tensors(self._engine.model_path))

    def save_sharded_state(self, path: str | Path, pattern: str | None = None, max_size: int | None = None) -> None:
        """Have each rank write its weights into a folder, for `LLM(folder, load_format="sharded_state")`.

        The folder also needs the model's other files. Raises RuntimeError while the engine sleeps.
        """
        folder, engine = Path(path).absolute(), self._engine
        if engine.runner.not_ready:
            raise RuntimeError(engine.runner.not_ready)
        folder.mkdir(parents=True, exist_ok=True)
        with engine.followers.also_run("save_shard", folder, pattern, max_size, wait=True):
            save_shard(engine.runner.model, 0, folder, pattern, max_size)

    def update_config(self, overrides: dict[str, Any]) -> None:
        """Taken is what vLLM needs before `reload_weights` of an engine that began with dummy weights.

        Raises:
            ValueError: something else is to be changed.
        """
        if overrides not in ({"load_config": {"load_format": name}} for name in ("auto", "hf", "safetensors")):
            raise ValueError(f"overrides={overrides!r} must be {{'load_config': {{'load_format': 'auto'}}}}")


class _Model:
    """The module, with vLLM's `load_weights`, which takes a checkpoint's names and shapes on every rank."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        weights_and_sleep.load_weights(self._engine, weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.runner.model, name)


# What a name may be that collective_rpc is given: these reach all ranks by themselves.
_BY_NAME = ("load_weights", "reload_weights", "save_sharded_state", "update_config")


def call_workers(
    engine: LLMEngine, method: str | Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None
) -> list[Any]:
    """Call a method of the worker, or `method(worker, *args, **kwargs)`. Returns a result for each rank.

    Raises:
        NotImplementedError: the worker has no such method, or a function is to run on several ranks.
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
