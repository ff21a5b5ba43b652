"""nano-vLLM: an LLM inference engine that can be read in an afternoon."""

from nanovllm.demo import demo_model
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "demo_model"]
