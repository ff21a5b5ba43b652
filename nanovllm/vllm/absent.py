"""Stand-ins for vLLM's classes that nano-vLLM lacks: a program can import one, but using it raises an error.

Programs import at their top what they may never use, so the import must succeed.
"""

from typing import Any

_REASONS = {
    "there are no LoRA adapters": "LoRARequest",
    "there is no beam search; SamplingParams(n=…) draws several completions": "BeamSearchParams",
    "each request says itself what it wants: SamplingParams(structured_outputs=…)": "StructuredOutputsConfig",
    "its models generate text; none does pooling": """
        ClassificationOutput ClassificationRequestOutput EmbeddingOutput EmbeddingRequestOutput PoolerConfig
        PoolingOutput PoolingParams PoolingRequestOutput ScoringOutput ScoringRequestOutput
    """,
    "the engine alone chooses how to compile; the tokens are the same": "CompilationConfig",
    "there is no speculative decoding": "SpeculativeConfig",
    "the cache stays on the device": "KVEventsConfig KVTransferConfig",
    "new weights come by LLM.load_weights()": "WeightTransferConfig",
    "models are those of nanovllm/models/": "ModelRegistry",
    "there is no Ray": "initialize_ray_cluster",
}


class _Absent(type):
    """The metaclass of the stand-ins: calling one, or reading an attribute of it, raises NotImplementedError."""

    why: str

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # the standard library looks these up on any object
            raise AttributeError(name)
        raise NotImplementedError(f"nano-vLLM has no {cls.__name__}: {cls.why}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"nano-vLLM has no {cls.__name__}: {cls.why}")


for _why, _names in _REASONS.items():
    globals().update({name: _Absent(name, (), {"why": _why, "__module__": __name__}) for name in _names.split()})
