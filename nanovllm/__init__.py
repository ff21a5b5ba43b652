"""nano-vLLM: an LLM inference engine that can be read in an afternoon."""

from typing import Any

from nanovllm import vllm
from nanovllm.async_llm import AsyncLLM
from nanovllm.demo import chat_model, demo_model
from nanovllm.errors import EngineDeadError, RankError
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, LogLikelihood, Logprob, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineDeadError",
    "LogLikelihood",
    "Logprob",
    "RankError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "chat_model",
    "demo_model",
]


def __getattr__(name: str) -> Any:
    """vLLM's other names, as EngineArgs: made on first use."""
    if name in vllm.__all__:
        return getattr(vllm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
