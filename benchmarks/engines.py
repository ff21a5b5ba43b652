"""Makes nano-vLLM, vLLM and transformers run equal requests with equal options, behind one interface.

Every engine gets token ids, ignores EOS, samples from the whole vocabulary at the workload's temperature, and starts a
run with an empty prefix cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.workloads import Workload

ENGINES = ("nanovllm", "vllm", "transformers")


@dataclass(slots=True, kw_only=True)
class EngineOptions:
    """Options under vLLM's names. None means the engine's own default."""

    model_dir: Path
    load_format: str  # "auto" | "dummy": random weights
    device: str  # "cuda" | "cpu"
    dtype: str
    max_model_len: int
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    block_size: int | None = None
    num_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False


@dataclass(slots=True, frozen=True)
class BenchmarkedEngine:
    """A loaded engine. `generate(workload)` returns each request's tokens; `llm` is the library's own object."""

    name: str
    generate: Callable[[Workload], list[list[int]]]
    reset: Callable[[], object]  # empties the prefix cache
    close: Callable[[], object]
    llm: Any


def make_engine(name: str, options: EngineOptions) -> BenchmarkedEngine:
    """Load an engine. Raises ImportError if its library is not installed, ValueError for an unknown name."""
    makers = {"nanovllm": _make_nanovllm, "vllm": _make_vllm, "transformers": _make_transformers}
    if name not in makers:
        raise ValueError(f"engine={name!r} must be one of {', '.join(ENGINES)}")
    return makers[name](options)


def _make_nanovllm(options: EngineOptions) -> BenchmarkedEngine:
    from nanovllm import LLM, SamplingParams

    own = {"device": options.device, "kvcache_block_size": options.block_size}
    llm = LLM(str(options.model_dir), num_kvcache_blocks=options.num_blocks, **own, **_vllm_options(options))

    def generate(workload: Workload) -> list[list[int]]:
        params = [
            SamplingParams(temperature=workload.temperature, max_tokens=n, ignore_eos=True) for n in workload.max_tokens
        ]
        outputs = llm.generate(workload.prompts, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    return BenchmarkedEngine("nanovllm", generate, llm.reset_prefix_cache, llm.close, llm)


def _make_vllm(options: EngineOptions) -> BenchmarkedEngine:
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ImportError(f"engine vllm: vLLM is not installed ({error}); pip install vllm") from error

    own = {"block_size": options.block_size, "num_gpu_blocks_override": options.num_blocks}
    own = {key: value for key, value in own.items() if value is not None}
    llm = LLM(str(options.model_dir), **own, **_vllm_options(options))

    def generate(workload: Workload) -> list[list[int]]:
        params = [
            SamplingParams(temperature=workload.temperature, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in workload.max_tokens
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return BenchmarkedEngine("vllm", generate, llm.reset_prefix_cache, lambda: None, llm)


def _vllm_options(options: EngineOptions) -> dict[str, Any]:
    """The options that nano-vLLM and vLLM call by the same name."""
    optional = {
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
    }
    return {
        "skip_tokenizer_init": True,
        "load_format": options.load_format,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": options.enable_prefix_caching,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enable_expert_parallel": options.enable_expert_parallel,
        **{key: value for key, value in optional.items() if value is not None},
    }


def _make_transformers(options: EngineOptions) -> BenchmarkedEngine:
    """`generate` on left-padded batches. A batch runs until its longest request ends; further tokens are cut."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.load_format == "dummy":
        config = AutoConfig.from_pretrained(options.model_dir)
        dtype = config.dtype if dtype == "auto" else dtype
        with torch.device(options.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model_dir, dtype=dtype).to(options.device)
    model = model.eval()
    model.generation_config.eos_token_id = None  # transformers would use it, since the config below sets none

    def generate_batch(prompts: list[list[int]], max_tokens: list[int], temperature: float) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
        generation = GenerationConfig(
            max_new_tokens=max(max_tokens), do_sample=temperature > 0, pad_token_id=0, use_cache=True, **sampling
        )
        out = model.generate(
            ids.to(options.device), attention_mask=mask.to(options.device), generation_config=generation
        )
        rows = out[:, width:].tolist()
        return [row[:n] for row, n in zip(rows, max_tokens, strict=True)]

    def generate(workload: Workload) -> list[list[int]]:
        batch = options.max_num_seqs or len(workload.prompts)
        outputs: list[list[int]] = []
        for i in range(0, len(workload.prompts), batch):
            part = slice(i, i + batch)
            outputs += generate_batch(workload.prompts[part], workload.max_tokens[part], workload.temperature)
        return outputs

    return BenchmarkedEngine("transformers", generate, lambda: None, lambda: None, model)
