"""nano-vLLM: an LLM inference engine that can be read in an afternoon."""

from nanovllm.async_llm import AsyncLLM
from nanovllm.demo import demo_model
from nanovllm.errors import EngineDeadError, RankError
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput, Score
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineDeadError",
    "Logprob",
    "RankError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "Score",
    "demo_model",
]
