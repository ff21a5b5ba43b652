"""vLLM's options, fields and arguments that nano-vLLM lacks: which values it accepts, and why it refuses the others.

A program written for vLLM passes many words whose values ask for nothing: `quantization=None`, `enable_lora=False`.
nano-vLLM accepts those. It refuses a value that asks for something it lacks, and says why. None and empty values ask
for nothing, whatever the word. For a word that vLLM lacks, too, the error names the nearest known one.

The tables cover vLLM 0.8 to 0.33. A word that becomes supported moves from its table to the class that it belongs to.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn


class Absent(NamedTuple):
    """A word that nano-vLLM lacks."""

    nothing: tuple[Any, ...]  # values that ask for nothing, besides None
    why: str  # it refuses the others


ANY = (...,)  # any value: the word says how to compute, not what; or it tunes what another word must ask for
NONE = ()
OFF = (False,)
ONE = (1,)

# vLLM's name of an option, and ours.
SAME_OPTIONS = {
    "block_size": "kvcache_block_size",
    "num_gpu_blocks_override": "num_kvcache_blocks",
    "kv_cache_memory_bytes": "kvcache_memory_bytes",
}

# Options of `LLM`, `AsyncLLM`, `EngineArgs` and `AsyncEngineArgs`.
_ENGINE_OPTIONS = {
    "prompts that exceed a step are always computed in chunks": {
        "enable_chunked_prefill": (True,),
    },
    "requests are served in the order in which they come": {
        "scheduling_policy": ("fcfs",),
        "scheduler_cls": ("vllm.core.scheduler.Scheduler", "vllm.v1.core.sched.scheduler.Scheduler"),
        "max_num_queued_reqs max_num_queued_tokens": NONE,
    },
    "it chooses another way to the same tokens": {
        """
        async_scheduling attention_backend attention_config compilation_config cuda_graph_sizes
        cudagraph_capture_sizes disable_async_output_proc disable_cascade_attn disable_custom_all_reduce
        disable_hybrid_kv_cache_manager disable_nccl_for_dp_synchronization disable_sliding_window
        enable_batch_sharded_sampling enable_cumem_allocator enable_flashinfer_autotune enable_nccl_comm_suspend
        enable_shm_tensor_arena enable_sleep_mode fail_on_environ_validation ignore_patterns ir_op_priority
        jit_monitor_mode jit_monitor_verbose kernel_config linear_backend long_prefill_token_threshold
        long_prefill_token_threshold_adaptive max_cudagraph_capture_size max_long_partial_prefills
        max_num_active_seqs max_num_partial_prefills max_num_scheduled_tokens max_parallel_loading_workers
        max_seq_len_to_capture model_loader_extra_config monokernel multi_step_stream_outputs
        num_lookahead_slots num_scheduler_steps numa_bind numa_bind_cpus numa_bind_nodes optimization_level
        performance_mode preemption_mode prefill_schedule_interval prefix_cache_retention_interval
        prefix_caching_hash_algo prefix_match_unit pt_load_map_location renderer_num_workers
        safetensors_load_strategy safetensors_prefetch_block_size safetensors_prefetch_num_threads
        scheduler_delay_factor scheduler_reserve_full_isl shutdown_timeout sleep_mode_backend
        sleep_mode_offload_cudagraph sparse_indexer_topk_backend swa_bounded_replay swap_space
        tokenizer_pool_extra_config tokenizer_pool_size tokenizer_pool_type use_tqdm_on_load
        use_v2_block_manager watchdog_config watermark
        """: ANY,
    },
    "weights are not quantized, and the cache has their dtype": {
        "allow_deprecated_quantization calculate_kv_scales": OFF,
        "kv_cache_dtype": ("auto",),
        "kv_cache_dtype_skip_layers": ANY,
        "override_attention_dtype quantization quantization_config": NONE,
    },
    "the model comes from one folder: its config, its safetensors files, its tokenizer for transformers": {
        """
        code_revision hf_config_path model_class_overrides model_weights rope_scaling rope_theta
        tokenizer_revision
        """: NONE,
        "config_format tokenizer_mode": ("auto", "hf"),
        "model_impl": ("auto", "vllm"),
    },
    "set HF_HOME or HF_TOKEN in the environment": {
        "download_dir": NONE,
        "hf_token": (True, False),
    },
    "the chat template is the tokenizer's, or the argument of chat()": {
        "chat_template": NONE,
    },
    "all models generate text; there are none for pooling": {
        "convert": ("auto", "none"),
        "override_pooler_config pooler_config": NONE,
        "runner task": ("auto", "generate"),
    },
    "there are no LoRA or prompt adapters": {
        "default_mm_loras long_lora_scaling_factors qlora_adapter_name_or_path": NONE,
        "enable_lora enable_lora_bias enable_prompt_adapter": OFF,
        """
        enable_mixed_moe_lora_format enable_moe_shared_loras enable_tower_connector_lora fully_sharded_loras
        lora_dtype lora_extra_vocab_size lora_target_modules max_cpu_loras max_lora_cls_labels max_lora_rank
        max_loras max_prompt_adapter_token max_prompt_adapters specialize_active_lora
        """: ANY,
    },
    "there is no speculative decoding, watermark or diffusion": {
        "diffusion_config spec_method spec_model spec_tokens speculative_config watermark_config": NONE,
    },
    "structured outputs have one backend, and each request says itself what it wants of them": {
        "guided_decoding_backend guided_decoding_disable_fallback": ANY,
        "guided_decoding_disable_additional_properties guided_decoding_disable_any_whitespace": OFF,
        "structured_outputs_config": NONE,
    },
    "there are no parsers": {
        "enable_reasoning": OFF,
        """
        logits_processor_pattern reasoning_config reasoning_parser reasoning_parser_plugin
        """: NONE,
    },
    "log-probabilities are the model's own, and draws are exact": {
        "logprobs_mode": ("raw_logprobs",),
        "use_fp64_gumbel": OFF,
    },
    "prompts are text or token ids": {
        """
        allowed_local_media_path allowed_media_domains disable_chunked_mm_input disable_mm_preprocessor_cache
        enable_multimodal_encoder_data_parallel interleave_mm_strings language_model_only limit_mm_per_prompt
        media_io_kwargs mm_device_do_normalize mm_encoder_attn_backend mm_encoder_attn_dtype
        mm_encoder_fp8_scale_save_margin mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb
        mm_processor_cache_gb mm_processor_cache_type mm_processor_device mm_shm_cache_max_object_size_mb
        mm_tensor_ipc skip_mm_profiling video_pruning_method
        """: ANY,
        "enable_mm_embeds enable_prompt_embeds mm_encoder_only tokens_only": OFF,
        """
        io_processor_plugin mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path mm_processor_kwargs
        video_pruning_rate
        """: NONE,
    },
    "all ranks are processes of this machine, and CUDA_VISIBLE_DEVICES chooses their devices": {
        """
        cp_kv_cache_interleave_size cpu_distributed_timeout_seconds data_parallel_address data_parallel_backend
        data_parallel_rpc_port dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
        distributed_timeout_seconds dp_sync_interval fault_tolerance_config master_addr master_port
        """: ANY,
        """
        data_parallel_external_lb data_parallel_hybrid_lb data_parallel_multi_port_external_lb
        enable_fault_tolerance enable_hc_sp ray_workers_use_nsight
        """: OFF,
        "data_parallel_rank data_parallel_start_rank node_rank": (0,),
        """
        _api_process_count data_parallel_size decode_context_parallel_size nnodes pipeline_parallel_size
        prefill_context_parallel_size
        """: ONE,
        "data_parallel_size_local": (0, 1),
        "device_ids worker_extension_cls": NONE,
        "distributed_executor_backend": ("mp", "uni"),
        "worker_cls": ("auto",),
        "_api_process_rank": (0, -1),
    },
    "experts stay on the rank that loads them, each once, and an all-reduce joins the ranks' sums": {
        """
        all2all_backend dbo_decode_token_threshold dbo_prefill_token_threshold elastic_ep_max_dp_size
        eplb_config eplb_log_balancedness eplb_step_interval eplb_window_size expert_placement_strategy moe_backend
        """: ANY,
        """
        enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb enable_return_routed_experts
        """: OFF,
        "num_redundant_experts ubatch_size": (0,),
    },
    "there are no models with a state besides the KV cache": {
        """
        enable_mamba_cache_stochastic_rounding enable_mamba_shared_prefix_checkpoint gdn_prefill_backend
        kda_decode_backend kda_prefill_backend mamba_backend mamba_block_size mamba_cache_dtype mamba_cache_mode
        mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm replayssm_buffer_len
        """: ANY,
        "engram_config": NONE,
        "kv_sharing_fast_prefill use_replayssm": OFF,
    },
    "weights and cache stay on the device, except during sleep()": {
        "cpu_offload_gb offload_group_size": (0,),
        """
        cpu_offload_params ec_manager_config kv_offloading_backend offload_backend offload_num_in_group
        offload_params offload_prefetch_step
        """: ANY,
        """
        ec_transfer_config kv_events_config kv_offloading_size kv_transfer_config sleep_preserve_parameter_names
        weight_transfer_config
        """: NONE,
    },
    "the engine logs and traces nothing; stats() has the counters": {
        """
        aggregate_engine_logging cudagraph_metrics enable_layerwise_nvtx_tracing enable_log_requests
        enable_logging_iteration_details enable_mfu_metrics enable_mm_processor_stats enable_trace_replay
        kv_cache_metrics return_sampling_mask
        """: OFF,
        """
        aux_output_config collect_detailed_traces log_config_file logging_config otlp_traces_endpoint
        show_hidden_metrics_for_version
        """: NONE,
        """
        custom_histogram_buckets disable_log_requests disable_log_stats kv_cache_metrics_sample log_level
        served_model_name
        """: ANY,
        "per_request_spec_decode_metrics": ("none",),
        "stream_interval": ONE,
    },
    "it is for devices or plugins that nano-vLLM lacks": {
        "additional_config override_neuron_config": NONE,
    },
}

_SAMPLING_FIELDS = {
    "there is no beam search, and the request returns all n completions that it draws": {
        "best_of length_penalty": ONE,
        "early_stopping use_beam_search": OFF,
    },
    "there are no logits processors of a request, watermarks or limits to thinking": {
        "logits_processors repetition_detection trace_decode_token_ids": NONE,
        "thinking_token_budget": (-1,),
        "watermarking": OFF,
    },
    "log-probabilities are those of the likeliest tokens, as dicts": {
        "flat_logprobs": OFF,
        "logprob_token_ids prompt_logprob_token_ids": NONE,
        "prompt_logprob_start": (0,),
    },
    "an output has all tokens so far when the reader takes it": {
        "stream_interval": ONE,
    },
    "the engine decides when to use the prefix cache": {
        "skip_reading_prefix_cache": OFF,
    },
    "an output does not say which experts its tokens took": {
        "routed_experts_prompt_start": ANY,
    },
    "it is for the engine's logits_processors, which read it": {
        "extra_args": ANY,
    },
    "it is internal to vLLM": {
        "output_text_buffer_length skip_clone": ANY,
    },
}

# Arguments of `generate`, `chat` and `add_request`.
_ARGUMENTS = {
    "there are no LoRA or prompt adapters": {
        "lora_request prompt_adapter_request": NONE,
    },
    "requests are served in the order in which they come": {
        "priority": (0,),
    },
    "SamplingParams has structured_outputs, and there are no parsers": {
        "guided_options_request reasoning_ended reasoning_parser_kwargs": NONE,
    },
    "tokenizers are called with their own defaults; SamplingParams has truncate_prompt_tokens": {
        "tokenization_kwargs": NONE,
    },
    "prompts are text or token ids, given as such": {
        "mm_processor_kwargs prompt_token_ids": NONE,
        "prompt_text": ANY,
    },
    "there is one engine, and it traces nothing": {
        "data_parallel_rank": (0,),
        "kv_hints session_id": ANY,
        "trace_headers": NONE,
    },
}

# Methods of vLLM's `LLM` and `AsyncLLM`: why they are missing, or what to call instead.
_METHODS = {
    "score": "it needs a model for pooling; LLM.log_likelihood(prompts), or "
    "SamplingParams(prompt_logprobs=0), tells how likely this model finds a text",
    "embed": "it needs a model for pooling",
    "encode": "it needs a model for pooling; encode_prompt(prompt) returns token ids",
    "classify": "it needs a model for pooling",
    "reward": "it needs a model for pooling",
    "beam_search": "SamplingParams(n=…) draws several completions",
}


class AbsentMethods:
    """vLLM's methods that nano-vLLM lacks: they raise NotImplementedError, which says what to call instead."""


def _absent(name: str, instead: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__}.{name}() is not here: {instead}")

    return refuse


for _name, _instead in _METHODS.items():
    setattr(AbsentMethods, _name, _absent(_name, _instead))


def _by_word(reasons: dict[str, dict[str, tuple[Any, ...]]]) -> dict[str, Absent]:
    """A table {word: Absent}, made from {why: {words: values}}."""
    return {
        word: Absent(nothing, why)
        for why, words in reasons.items()
        for several, nothing in words.items()
        for word in several.split()
    }


ENGINE_OPTIONS, SAMPLING_FIELDS, ARGUMENTS = map(_by_word, (_ENGINE_OPTIONS, _SAMPLING_FIELDS, _ARGUMENTS))


def check(owner: str, table: dict[str, Absent], given: dict[str, Any], known: list[str]) -> None:
    """Accept words of vLLM whose values ask for nothing.

    Args:
        owner: the class or method that got the words, for the error.
        table: one of the tables above.
        known: the words that the owner itself has.

    Raises:
        TypeError: neither the owner nor vLLM has such a word. ValueError: a value asks for what nano-vLLM lacks.
    """
    for name, value in given.items():
        if name not in table:
            near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name, table, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise TypeError(f"{owner} got an unexpected {name!r}{hint}")
        nothing, why = table[name]
        if not asks_for_nothing(value, nothing):
            allowed = " or ".join(map(repr, (None, *nothing)))
            raise ValueError(f"{name}={value!r:.80} must be {allowed}: {why}")


def check_arguments(method: Callable[..., Any], given: dict[str, Any]) -> None:
    """`check` for the `**vllm_arguments` of a method."""
    if given:
        known = [name for name in inspect.signature(method).parameters if name not in ("self", "vllm_arguments")]
        check(method.__qualname__, ARGUMENTS, given, known)


def asks_for_nothing(value: Any, nothing: tuple[Any, ...]) -> bool:
    """Whether a value is None, empty, one of `nothing` (True is not 1), or a list of such values."""
    if value is None or nothing is ANY:
        return True
    if isinstance(value, str | int | float):
        return value == "" or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in nothing)
    if isinstance(value, list | tuple):  # one for each prompt
        return all(asks_for_nothing(v, nothing) for v in value)
    return isinstance(value, dict | set | frozenset) and not value
