"""vLLM's `LLMEngine`, whose caller runs the steps, and an engine's options in the form of vLLM's config objects."""

import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Self

import nanovllm.engine.llm_engine as ours
from nanovllm.async_llm import AsyncLLM
from nanovllm.engine.prompts import Prompt, as_request_ids, copy_params
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.vllm.arguments import EngineArgs
from nanovllm.vllm.metrics import Metric, metrics_of
from nanovllm.vllm_defaults import ARGUMENTS, check

AsyncLLMEngine = AsyncLLM


class LLMEngine:
    """An engine whose caller adds requests and runs the steps. It is a handle of an `LLM`, which has all the state."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        usage_context: Any = None,
        stat_loggers: list[Any] | None = None,
        enable_multiprocessing: bool = False,
    ) -> Self:
        """Make an engine with these options. It closes when the program drops its last reference.

        Raises:
            NotImplementedError: `stat_loggers` is not empty; otherwise as `LLM`.
        """
        if stat_loggers:
            raise NotImplementedError("stat_loggers must be empty: nothing is logged; get_metrics() has the counters")
        return cls(LLM.from_engine_args(engine_args))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: dict[str, str] | None = None,
        priority: int = 0,
    ) -> str:
        """Queue a request, which the next steps will run. Returns its id.

        Args:
            params: the engine copies them at this call; later changes have no effect.
            arrival_time: when the request arrived, in `time.time()` seconds; the time of this call if not given.

        Raises:
            TypeError, ValueError: the prompt or the parameters are invalid, or a request with that id is unfinished.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"request_id={request_id!r:.80} must be a string")
        own = copy_params(params, "params")
        further = {"lora_request": lora_request, "tokenization_kwargs": tokenization_kwargs}
        further |= {"trace_headers": trace_headers, "priority": priority}
        check("add_request", ARGUMENTS, further, [])
        with self.llm._one_caller:
            text_engine = self.llm._enter()
            request = text_engine.make_request(prompt, own, request_id=request_id, is_streaming=True)
            if arrival_time is not None:
                request.metrics.arrival_time += arrival_time - time.time()
            text_engine.add(request)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Run a step. Returns an output for each request that got tokens; for a FINAL_ONLY request, only when it ends.

        Requests of the LLM's streams get tokens too, but the streams return their outputs.
        """
        outputs = []
        with self.llm._one_caller:
            requests = self.llm._enter().step()
            of_streams = {request for each in self.llm._streams.values() for request in each}
            for request in requests:
                if request.has_output and request not in of_streams:
                    request.has_news = False
                    outputs.append(request.output(request.progress()))
        return outputs

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests early; `step` returns no more outputs for them. Unknown ids are ignored."""
        self.llm.abort(as_request_ids(request_ids))

    def has_unfinished_requests(self) -> bool:
        return self.get_num_unfinished_requests() > 0

    def get_num_unfinished_requests(self) -> int:
        """The number of unfinished sequences: a request with n completions counts n times."""
        return self.llm.engine.num_unfinished

    def get_metrics(self) -> list[Metric]:
        return metrics_of(self.llm.stats(), self.model_config.model)

    def get_tokenizer(self) -> Any:
        return self.llm.get_tokenizer()

    @property
    def tokenizer(self) -> Any:
        return self.llm.get_tokenizer()

    @property
    def vllm_config(self) -> "VllmConfig":
        return vllm_config(self.llm.engine)

    @property
    def model_config(self) -> "ModelConfig":
        return self.vllm_config.model_config

    def get_model_config(self) -> "ModelConfig":
        return self.model_config

    @property
    def model_executor(self) -> SimpleNamespace:
        """Has `driver_worker.model_runner.model`, through which trainers load weights."""
        from nanovllm.vllm.worker import Worker

        return SimpleNamespace(driver_worker=Worker(self.llm.engine), collective_rpc=self.collective_rpc)

    @property
    def engine_core(self) -> Any:
        """Has `save_sharded_state(path, pattern, max_size)`."""
        return self.model_executor.driver_worker

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        return self.llm.reset_prefix_cache(reset_running_requests, reset_connector)

    def sleep(self, level: int = 1) -> None:
        self.llm.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.llm.wake_up(tags)

    def is_sleeping(self) -> bool:
        return self.llm.is_sleeping

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        return self.llm.collective_rpc(method, timeout, args, kwargs)

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        return self.llm.apply_model(func)

    def start_profile(self, profile_prefix: str | None = None) -> None:
        self.llm.start_profile(profile_prefix)

    def stop_profile(self) -> None:
        self.llm.stop_profile()

    def do_log_stats(self) -> None:
        """Does nothing: the engine logs no statistics. `get_metrics()` has the counters."""


class ModelConfig(SimpleNamespace):
    """The model's options as the engine resolved them. To read only: writing to it does not change the engine."""

    def get_vocab_size(self) -> int:
        return self.hf_config.vocab_size

    def get_hidden_size(self) -> int:
        return self.hf_config.hidden_size

    def get_head_size(self) -> int:
        return self.hf_config.head_dim


class VllmConfig(SimpleNamespace):
    """The engine's options as it resolved them, under vLLM's names. To read only, like `ModelConfig`."""


def vllm_config(engine: ours.LLMEngine) -> VllmConfig:
    """An engine's resolved options as vLLM's config object."""
    config, runner = engine.config, engine.runner
    model_config = ModelConfig(
        model=config.model,
        tokenizer=config.tokenizer or config.model,
        tokenizer_mode="auto",
        served_model_name=config.model,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        dtype=runner.dtype,
        seed=config.seed,
        max_model_len=engine.max_model_len,
        enforce_eager=config.enforce_eager,
        skip_tokenizer_init=config.skip_tokenizer_init,
        hf_config=runner.hf_config,
        hf_text_config=runner.hf_config,
        runner_type="generate",
        quantization=None,
        is_multimodal_model=False,
        is_encoder_decoder=False,
    )
    return VllmConfig(
        model_config=model_config,
        cache_config=SimpleNamespace(
            block_size=runner.block_size,
            num_gpu_blocks=engine.block_manager.num_blocks,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enable_prefix_caching=config.enable_prefix_caching,
            cache_dtype="auto",
        ),
        scheduler_config=SimpleNamespace(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=engine.max_model_len,
            enable_chunked_prefill=True,
            policy="fcfs",
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            world_size=config.tensor_parallel_size,
        ),
        load_config=SimpleNamespace(load_format=config.load_format),
        device_config=SimpleNamespace(device=runner.device, device_type=runner.device),
        lora_config=None,
        speculative_config=None,
        quant_config=None,
    )
