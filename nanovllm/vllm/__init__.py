"""vLLM's names for nano-vLLM's classes and functions, at vLLM's module paths.

The package only hands calls on; a reader of the engine can skip it. A program for vLLM runs with `vllm` replaced by
`nanovllm.vllm` in its imports, or unchanged, with the alias:

    python -m nanovllm.vllm program.py …        or, in the program, before it imports vllm,
    nanovllm.vllm.install()

The alias is a folder on Python's path. It has a package `vllm` that stands for this one, so the processes that the
program starts find it too. Classes of vLLM that nano-vLLM lacks can be imported, since programs import them before they
use them; using one raises NotImplementedError (`absent.py`). docs/vllm.md lists them.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.24.0"  # the vLLM version that has these names
ALIAS = str(Path(__file__).parent / "alias")

# Our module -> the names of vLLM that it defines.
_HOMES = {
    "nanovllm": """
        LLM AsyncLLM SamplingParams StructuredOutputsParams RequestOutputKind RequestOutput CompletionOutput Logprob
    """,
    "nanovllm.outputs": "RequestMetrics",
    "nanovllm.models.sharded_state": "ShardedStateLoader",
    "nanovllm.vllm.arguments": "EngineArgs AsyncEngineArgs FlexibleArgumentParser ProfilerConfig",
    "nanovllm.vllm.engines": "LLMEngine AsyncLLMEngine ModelConfig VllmConfig",
    "nanovllm.vllm.guided_decoding": "GuidedDecodingParams",
    "nanovllm.vllm.helpers": """
        PromptLogprobs PromptType SampleLogprobs SingletonPrompt TextPrompt TokensPrompt UsageContext
        cached_get_tokenizer cleanup_dist_env_and_memory current_platform get_ip get_open_port get_tokenizer
        init_logger random_uuid resolve_chat_template resolve_hf_chat_template set_random_seed
    """,
    "nanovllm.vllm.logits_processors": """
        AdapterLogitsProcessor BatchUpdate LogitsProcessor MoveDirectionality RequestLogitsProcessor
        process_dict_updates
    """,
    "nanovllm.vllm.metrics": "Counter Gauge Histogram Metric Vector",
    "nanovllm.vllm.absent": """
        BeamSearchParams ClassificationOutput ClassificationRequestOutput CompilationConfig EmbeddingOutput
        EmbeddingRequestOutput KVEventsConfig KVTransferConfig LoRARequest ModelRegistry PoolerConfig PoolingOutput
        PoolingParams PoolingRequestOutput ScoringOutput ScoringRequestOutput SpeculativeConfig
        StructuredOutputsConfig WeightTransferConfig initialize_ray_cluster
    """,
}
# vLLM's module ("" is `vllm` itself) -> the names that programs import from it.
_PATHS = {
    "": """
        AsyncEngineArgs AsyncLLMEngine ClassificationOutput ClassificationRequestOutput CompletionOutput
        EmbeddingOutput EmbeddingRequestOutput EngineArgs LLM LLMEngine ModelRegistry PoolingOutput PoolingParams
        PoolingRequestOutput PromptType RequestOutput SamplingParams ScoringOutput ScoringRequestOutput TextPrompt
        TokensPrompt initialize_ray_cluster
    """,
    "config": """
        CompilationConfig KVEventsConfig KVTransferConfig ModelConfig PoolerConfig ProfilerConfig SpeculativeConfig
        StructuredOutputsConfig VllmConfig WeightTransferConfig
    """,
    "distributed": "cleanup_dist_env_and_memory",
    "distributed.parallel_state": "cleanup_dist_env_and_memory",
    "engine.arg_utils": "AsyncEngineArgs EngineArgs",
    "engine.async_llm_engine": "AsyncLLMEngine",
    "engine.llm_engine": "LLMEngine",
    "entrypoints.chat_utils": "resolve_hf_chat_template",
    "entrypoints.llm": "LLM",
    "inputs": "PromptType SingletonPrompt TextPrompt TokensPrompt",
    "inputs.data": "PromptType SingletonPrompt TextPrompt TokensPrompt",
    "logger": "init_logger",
    "logprobs": "Logprob PromptLogprobs SampleLogprobs",
    "lora.request": "LoRARequest",
    "model_executor": "set_random_seed",
    "model_executor.model_loader": "ShardedStateLoader",
    "model_executor.models": "ModelRegistry",
    "model_executor.utils": "set_random_seed",
    "outputs": """
        ClassificationOutput ClassificationRequestOutput CompletionOutput EmbeddingOutput EmbeddingRequestOutput
        PoolingOutput PoolingRequestOutput RequestOutput ScoringOutput ScoringRequestOutput
    """,
    "platforms": "current_platform",
    "pooling_params": "PoolingParams",
    "renderers.hf": "resolve_chat_template",
    "sampling_params": """
        BeamSearchParams GuidedDecodingParams RequestOutputKind SamplingParams StructuredOutputsParams
    """,
    "sequence": "Logprob PromptLogprobs RequestMetrics SampleLogprobs",
    "tokenizers": "cached_get_tokenizer get_tokenizer",
    "transformers_utils.tokenizer": "cached_get_tokenizer get_tokenizer",
    "usage.usage_lib": "UsageContext",
    "utils": "FlexibleArgumentParser get_ip get_open_port random_uuid",
    "utils.argparse_utils": "FlexibleArgumentParser",
    "utils.network_utils": "get_ip get_open_port",
    "utils.torch_utils": "set_random_seed",
    "v1.engine.async_llm": "AsyncLLM",
    "v1.engine.llm_engine": "LLMEngine",
    "v1.metrics.reader": "Counter Gauge Histogram Metric Vector",
    "v1.sample.logits_processor": """
        AdapterLogitsProcessor BatchUpdate LogitsProcessor MoveDirectionality RequestLogitsProcessor
    """,
    "v1.sample.logits_processor.builtin": "process_dict_updates",
}

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
_NAMES_OF = {path: names.split() for path, names in _PATHS.items()}
_PACKAGES = {path.rsplit(".", n)[0] for path in _PATHS for n in range(1, path.count(".") + 1)}
__all__ = _NAMES_OF[""]


def install() -> None:
    """Make `import vllm` import `nanovllm.vllm` from now on, in this process and in the processes that it starts.

    Raises:
        RuntimeError: the program has already imported another `vllm`.
    """
    if sys.modules.get("vllm", sys.modules[__name__]) is not sys.modules[__name__]:
        raise RuntimeError("vllm has been imported already: call nanovllm.vllm.install() before")
    if ALIAS not in sys.path:
        sys.path.insert(0, ALIAS)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if ALIAS not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([ALIAS, *filter(None, paths)])
    importlib.invalidate_caches()
    importlib.import_module("vllm")


def _get(path: str, name: str) -> Any:
    """Look up a name of vLLM's module. The import waits until a program uses the name, since most names need torch."""
    if name not in _NAMES_OF.get(path, ()):
        raise AttributeError(f"module {__name__ + '.' + path if path else __name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __getattr__(name: str) -> Any:
    return _get("", name)


class _PathFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the modules of `_PATHS`. `vllm.x` and `nanovllm.vllm.x` are the same module."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        is_alias = fullname.startswith("vllm.") and sys.modules.get("vllm") is sys.modules[__name__]
        relative = fullname.removeprefix("vllm." if is_alias else f"{__name__}.")
        if relative == fullname or relative not in _PATHS.keys() | _PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=relative in _PACKAGES)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        if spec.name.startswith("vllm."):
            return importlib.import_module(f"{__name__}.{spec.name.removeprefix('vllm.')}")
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.find_spec(module.__name__)  # an import under the alias may have left its own spec
        path = module.__name__.removeprefix(f"{__name__}.")
        module.__all__ = _NAMES_OF.get(path, [])
        module.__getattr__ = lambda name: _get(path, name)


sys.meta_path.append(_PathFinder())
