"""Further methods of vLLM's LLM and AsyncLLM, as base classes of ours, so that llm.py and async_llm.py stay short."""

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
    """Of `LLM`."""

    _profile: Profile | None = None

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> Self:
        """An engine of these options."""
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
        """Call "reload_weights", "load_weights" or "update_config", or a function of a worker: `vllm/worker.py`.

        Args:
            timeout: taken and passed over: what a rank may take is tensor_parallel_timeout.

        Raises:
            NotImplementedError: there is no such method, or a function is to run on several ranks.
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
    """Of `AsyncLLM`."""

    _profile: Profile | None = None

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        start_engine_loop: bool = True,
        usage_context: Any = None,
        stat_loggers: list[Any] | None = None,
    ) -> Self:
        """An engine of these options. Raises NotImplementedError for `stat_loggers`: `stats()` has the counters."""
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
        """Nothing is logged; `stats()` has the counters."""

    async def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """As `LLM.collective_rpc`, between two steps."""
        from nanovllm.vllm.worker import call_workers

        return await self._between_steps(call_workers, method, args, kwargs)

    async def pause_generation(
        self, *, mode: str = "abort", wait_for_inflight_requests: bool | None = None, clear_cache: bool = True
    ) -> None:
        """Do no more steps until `resume_generation()`. Requests that come are taken, and wait.

        Args:
            mode: what becomes of the requests that are there: "abort" ends them, "wait" lets them end first, "keep"
                holds them where they are.
            wait_for_inflight_requests: vLLM's older word for mode="wait".
            clear_cache: forget cached prefixes; requests that are kept are computed anew, as new weights may need.

        Raises:
            ValueError: there is no such mode.
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
            self._thread.is_paused = True
            if clear_cache:
                engine.reset_prefix_cache(reset_running_requests=True)

        await self._between_steps(pause)

    async def _are_under_way(self, streams: dict[str, Stream]) -> bool:
        """Whether a request waits for its turn, or the engine has it, and not whether its reader has read it all."""
        left = [request_id for request_id, stream in streams.items() if self._streams.get(request_id) is stream]
        if not all(streams[request_id].has_entered.done() for request_id in left):
            return True
        return await self._between_steps(lambda engine: bool(self._text_engine.find(left)))

    async def resume_generation(self) -> None:
        """Go on after `pause_generation()`."""

        def resume(engine: ours.LLMEngine) -> None:
            self._thread.is_paused = False

        await self._between_steps(resume)

    async def is_paused(self) -> bool:
        return self._thread.is_paused

    async def start_profile(self, profile_prefix: str | None = None) -> None:
        """As `LLM.start_profile`, of the engine's thread."""
        from nanovllm.vllm.profile import start_profile

        self._profile = await self._between_steps(lambda engine: start_profile(self._profile, engine, profile_prefix))

    async def stop_profile(self) -> None:
        """Write the trace into the profiler's folder."""
        from nanovllm.vllm.profile import stop_profile

        self._profile = await self._between_steps(lambda engine: stop_profile(self._profile))

    def shutdown(self, timeout: float | None = None) -> None:
        """`close()`: all requests are aborted.

        Args:
            timeout: taken and passed over: nothing is waited for.
        """
        self.close()
