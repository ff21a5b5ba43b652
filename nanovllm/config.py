"""Every option of an engine, checked before anything is loaded."""

import os
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

from nanovllm.vllm_defaults import ENGINE_OPTIONS, SAME_OPTIONS, check

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cuda", "cpu"]
LoadFormat = Literal["auto", "safetensors", "dummy", "sharded_state"]
OTHER_NAMES = {"half": "float16", "float": "float32"}  # vLLM's further names of dtypes


@dataclass(slots=True, kw_only=True)
class Config:
    """The options of `LLM`. None stands for an option's default.

    `LLM` also accepts vLLM's other names for them, and vLLM's further options if their values ask for nothing: see
    `vllm_defaults`.

    Args:
        model: a local directory in the Hugging Face layout, a GGUF file, or a hub id; a string or a path.
        tokenizer: directory, GGUF file or hub id of the tokenizer; default: the model's.
        skip_tokenizer_init: load no tokenizer; prompts are token ids, and outputs have no text.
        trust_remote_code: let `transformers` run code that comes with the model's tokenizer.
        revision: branch, tag or commit on the hub.
        dtype: of weights, activations and cache: a name or PyTorch's object. "half" is float16, "float" is float32,
            "auto" is the checkpoint's.
        device: "auto" is CUDA if there is a GPU, otherwise the CPU.
        max_model_len: prompt and output tokens of a request; default or -1: the model's, cut to what the cache holds.
        max_num_seqs: sequences that run at once; the others wait.
        max_num_batched_tokens: tokens in one step; the scheduler cuts longer prompts into chunks.
        gpu_memory_utilization: the share of the device's memory that this engine may use.
        kvcache_block_size: tokens in a block, a multiple of 16; default 256 on CUDA, 64 on the CPU.
        num_kvcache_blocks: blocks in the cache, each for a group of layers; default or -1: as many as fit.
        kvcache_memory_bytes: bytes for the cache instead of a profiling run; default 4 GiB on the CPU.
        enable_prefix_caching: let requests with equal prefixes share blocks.
        enforce_eager: no CUDA graphs. The tokens are the same.
        compile: let `torch.compile` fuse the elementwise operations for which there is no kernel of ours
            (`layers/pointwise.py`; few families have any). Default: on CUDA, unless enforce_eager.
        tensor_parallel_size: processes that share each layer's work; on CUDA each has its own device.
        tensor_parallel_timeout: seconds that one of them waits for another in a step before it raises an error.
        enable_expert_parallel: these processes share the experts of a layer, whole ones, instead of the features of
            each expert. Needs a model with experts.
        load_format: "auto" and "safetensors" read the folder's files; "dummy" makes random weights of the config's
            shapes, for benchmarks; "sharded_state" reads the files that each rank wrote: `models/sharded_state.py`.
        generation_config: the source of EOS ids and of the parameters of requests without any. "auto": the model's
            generation_config.json; "vllm": only the EOS ids of that file; otherwise a directory with such a file.
        override_generation_config: {key: value} pairs that replace sampling values of that file: {"temperature": 0.5}.
        seed: makes requests without their own seed repeatable.
        hf_overrides: {key: value} pairs that replace values of the model's config.json: {"rope_parameters": {…}}.
        profiler_config: {"profiler": "torch", "torch_profiler_dir": folder}; `stop_profile()` writes the trace there.
        logits_processors: classes that change logits by vLLM's protocol, or their names "module:Class": see
            `nanovllm.vllm.logits_processors`.
        max_logprobs: how many likeliest tokens a request may ask log-probabilities of at a position; -1: any number.

    Raises:
        TypeError, ValueError: naming the option, its value and what is allowed.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384
    gpu_memory_utilization: float = 0.9
    kvcache_block_size: int | None = None
    num_kvcache_blocks: int | None = None
    kvcache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    compile: bool | None = None
    tensor_parallel_size: int = 1
    tensor_parallel_timeout: float = 30.0
    enable_expert_parallel: bool = False
    load_format: LoadFormat = "auto"
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] | None = None
    seed: int | None = None
    hf_overrides: dict[str, Any] | None = None
    profiler_config: dict[str, Any] | None = None
    logits_processors: list[Any] | None = None
    max_logprobs: int = -1

    @classmethod
    def from_options(cls, model: str, options: dict[str, Any]) -> "Config":
        """Like the constructor, but also accepts vLLM's other names, and its further options that ask for nothing.

        Raises:
            TypeError: neither nano-vLLM nor vLLM has such an option; the error names the nearest one.
            ValueError: an option asks for something that nano-vLLM lacks, or two names of one option have different
                values.
        """
        known = [f.name for f in fields(cls)]
        own: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for name, value in options.items():
            own_name = SAME_OPTIONS.get(name, name)
            if own_name not in known:
                others[name] = value
            elif value is not None and own.setdefault(own_name, value) != value:
                both = " and ".join(f"{n}={v!r}" for n, v in options.items() if SAME_OPTIONS.get(n, n) == own_name)
                raise ValueError(f"{both} are one option, which must have one value")
        check("LLM", ENGINE_OPTIONS, others, [*known, *SAME_OPTIONS])
        return cls(model=model, **own)

    @property
    def has_checkpoint(self) -> bool:
        """Whether the weights come from a checkpoint with its own tensor names."""
        return self.load_format in ("auto", "safetensors")

    def __post_init__(self) -> None:
        self._normalize()
        if not isinstance(self.model, str) or not self.model:
            raise TypeError(f"model={self.model!r} must be a string or a path: a directory or a hub id")
        for option in fields(self):
            value = getattr(self, option.name)
            if get_origin(option.type) is Literal and value not in get_args(option.type):
                raise ValueError(f"{option.name}={value!r} must be one of {', '.join(get_args(option.type))}")
            if option.type is bool and not isinstance(value, bool):
                raise TypeError(f"{option.name}={value!r} must be True or False")
            if option.type == bool | None and not isinstance(value, bool | None):
                raise TypeError(f"{option.name}={value!r} must be True, False or None")
            if option.type == str | None and not isinstance(value, str | None):
                raise TypeError(f"{option.name}={value!r} must be a string or None")
            if option.type == dict[str, Any] | None and not isinstance(value, dict | None):
                raise TypeError(f"{option.name}={value!r:.80} must be a dict or None")
        if not isinstance(self.logits_processors, list | None):
            raise TypeError(f"logits_processors={self.logits_processors!r:.80} must be a list of classes or None")
        if self.logits_processors and self.tensor_parallel_size != 1:
            raise ValueError("logits_processors run in one process: they need tensor_parallel_size=1")
        if not isinstance(self.generation_config, str):
            raise TypeError(f"generation_config={self.generation_config!r} must be 'auto', 'vllm' or a directory")
        for name in ("max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size"):
            self._require_positive_int(name)
        for name in ("max_model_len", "kvcache_block_size", "num_kvcache_blocks", "kvcache_memory_bytes"):
            if getattr(self, name) is not None:
                self._require_positive_int(name)
        if self.kvcache_block_size is not None and self.kvcache_block_size % 16:
            raise ValueError(f"kvcache_block_size={self.kvcache_block_size} must be a multiple of 16")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 < share <= 1.0:
            raise ValueError(f"gpu_memory_utilization={share!r} must be a number in (0, 1]")
        timeout = self.tensor_parallel_timeout
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0.0 < timeout <= 86400.0:
            raise ValueError(f"tensor_parallel_timeout={timeout!r} must be a number of seconds in (0, 86400]")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"seed={self.seed!r} must be None or an integer")
        if type(self.max_logprobs) is not int:
            raise TypeError(f"max_logprobs={self.max_logprobs!r} must be an integer")
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs={self.max_logprobs} must be at least 0, or -1 for any number")

    def _normalize(self) -> None:
        """Bring each value that has several forms into one of them."""
        for option in fields(self):
            value = getattr(self, option.name)
            if value is None and option.name != "model":
                value = option.default
            elif type(value).__module__ == "torch":  # a dtype or a device, recognized without loading PyTorch
                value = str(value).removeprefix("torch.")
            elif isinstance(value, os.PathLike):
                value = os.fspath(value)
            setattr(self, option.name, value)
        if isinstance(self.dtype, str):
            self.dtype = OTHER_NAMES.get(self.dtype, self.dtype)
        for name in ("max_model_len", "num_kvcache_blocks"):
            if getattr(self, name) == -1 and type(getattr(self, name)) is int:
                setattr(self, name, None)

    def _require_positive_int(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be an integer")
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
