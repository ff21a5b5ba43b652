"""vLLM's further methods of LLM and AsyncLLM, as base classes of ours, so that llm.py and async_llm.py stay short."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from nanovllm.vllm_defaults import AbsentMethods

if TYPE_CHECKING:
    import nanovllm.engine.llm_engine as ours
    from nanovllm.async_stream import Stream
    from nanovllm.vllm.arguments import EngineArgs
    from nanovllm.vllm.engines import LLMEngine, ModelConfig, VllmConfig
    from nanovllm.vllm.metrics import Metric
    from nanovllm.vllm.profile import Profile


class LLMMethods(AbsentMethods):
    """The further methods of `LLM`."""

    _profile: Profile | None = None

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> Self:
        """Make an engine with these options."""
        return cls(**engine_args.given())

    @property
    def llm_engine(self) -> LLMEngine:
        """The same engine with vLLM's `add_request`, `step`, `model_config`, …."""
        from nanovllm.vllm.engines import LLMEngine

        return LLMEngine(self)

    def get_metrics(self) -> list[Metric]:
        """The counters of `stats()` under vLLM's names."""
        return self.llm_engine.get_metrics()

    def get_world_size(self, include_dp: bool = True) -> int:
        return self.engine.config.tensor_parallel_size

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of the worker by its name, such as "reload_weights", or `method(worker)`: see `vllm/worker.py`.

        Args:
            timeout: ignored; the option tensor_parallel_timeout says how long a rank may take.

        Raises:
            NotImplementedError: the worker has no such method, or `method` is a function and there are several ranks.
        """
        from nanovllm.vllm.worker import call_workers

        with self._one_caller:
            return call_workers(self._enter().engine, method, args, kwargs)

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """`[func(model)]`. Raises NotImplementedError with several ranks."""
        from nanovllm.vllm.worker import apply_model

        with self._one_caller:
            return apply_model(self._enter().engine, func)

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Trace with PyTorch's profiler until `stop_profile()`. Raises ValueError without `profiler_config`."""
        from nanovllm.vllm.profile import start_profile

        self._profile = start_profile(self._profile, self.engine, profile_prefix)

    def stop_profile(self) -> None:
        """Write the trace into the profiler's folder."""
        from nanovllm.vllm.profile import stop_profile

        self._profile = stop_profile(self._profile)

    def shutdown(self) -> None:
        """`close()`."""
        self.close()


class AsyncLLMMethods(AbsentMethods):
    """The further methods of `AsyncLLM`."""

    _profile: Profile | None = None

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        start_engine_loop: bool = True,
        usage_context: Any = None,
        stat_loggers: list[Any] | None = None,
    ) -> Self:
        """Make an engine with these options. Raises NotImplementedError for `stat_loggers`: use `stats()`."""
        if stat_loggers:
            raise NotImplementedError("stat_loggers must be empty: nothing is logged; stats() has the counters")
        return cls(**engine_args.given())

    @property
    def vllm_config(self) -> VllmConfig:
        from nanovllm.vllm.engines import vllm_config

        return vllm_config(self._text_engine.engine)

    @property
    def model_config(self) -> ModelConfig:
        return self.vllm_config.model_config

    async def get_vllm_config(self) -> VllmConfig:
        return self.vllm_config

    async def get_model_config(self) -> ModelConfig:
        return self.model_config

    async def is_tracing_enabled(self) -> bool:
        return False

    async def do_log_stats(self) -> None:
        """Does nothing: the engine logs no statistics. `stats()` has the counters."""

    async def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """As `LLM.collective_rpc`; the engine's thread makes the call between two steps."""
        from nanovllm.vllm.worker import call_workers

        return await self._between_steps(call_workers, method, args, kwargs)

    async def pause_generation(
        self, *, mode: str = "abort", wait_for_inflight_requests: bool | None = None, clear_cache: bool = True
    ) -> None:
        """Stop the engine's steps until `resume_generation()`. New requests are accepted, and wait.

        Args:
            mode: what the engine does with its present requests: "abort" ends them early, "wait" lets them finish
                before the pause, "keep" holds them until the engine resumes.
            wait_for_inflight_requests: vLLM's older name of mode="wait".
            clear_cache: clear the prefix cache; the engine then recomputes the requests that it keeps, which new
                weights may require.

        Raises:
            ValueError: `mode` is none of these.
        """
        mode = "wait" if wait_for_inflight_requests else mode
        if mode not in ("abort", "wait", "keep"):
            raise ValueError(f"mode={mode!r} must be 'abort', 'wait' or 'keep'")
        present = dict(self._streams)
        if mode == "abort":
            await self.abort(present)
        while mode == "wait" and await self._are_under_way(present):
            await asyncio.sleep(0.005)

        def pause(engine: ours.LLMEngine) -> None:
            self._thread.pacing.is_paused = True
            if clear_cache:
                engine.reset_prefix_cache(reset_running_requests=True)

        await self._between_steps(pause)

    async def _are_under_way(self, streams: dict[str, Stream]) -> bool:
        """Whether a request still waits to enter the engine or runs in it. Output that its reader has yet to read is no
        reason to wait.
        """
        left = [request_id for request_id, stream in streams.items() if self._streams.get(request_id) is stream]
        if not all(streams[request_id].has_entered.done() for request_id in left):
            return True
        return await self._between_steps(lambda engine: bool(self._text_engine.find(left)))

    async def resume_generation(self) -> None:
        """Let the engine's steps go on after `pause_generation()`."""

        def resume(engine: ours.LLMEngine) -> None:
            self._thread.pacing.is_paused = False

        await self._between_steps(resume)

    async def is_paused(self) -> bool:
        return self._thread.pacing.is_paused

    async def start_profile(self, profile_prefix: str | None = None) -> None:
        """As `LLM.start_profile`; the profiler traces the engine's thread."""
        from nanovllm.vllm.profile import start_profile

        self._profile = await self._between_steps(lambda engine: start_profile(self._profile, engine, profile_prefix))

    async def stop_profile(self) -> None:
        """Write the trace into the profiler's folder."""
        from nanovllm.vllm.profile import stop_profile

        self._profile = await self._between_steps(lambda engine: stop_profile(self._profile))

    def shutdown(self, timeout: float | None = None) -> None:
        """`close()`, which aborts all requests.

        Args:
            timeout: ignored; the call waits for no request.
        """
        self.close()
