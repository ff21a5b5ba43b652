"""nano-vLLM: an LLM inference engine that can be read in an afternoon."""

from nanovllm.async_llm import AsyncLLM
from nanovllm.demo import demo_model
from nanovllm.errors import EngineDeadError, RankError
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, LogLikelihood, Logprob, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

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
    "demo_model",
]
