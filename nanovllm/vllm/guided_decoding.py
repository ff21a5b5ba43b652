"""vLLM's name for structured outputs until 0.12: `SamplingParams(guided_decoding=GuidedDecodingParams(…))`."""

from dataclasses import dataclass
from typing import Any

from nanovllm.structured_outputs import StructuredOutputsParams


@dataclass
class GuidedDecodingParams(StructuredOutputsParams):
    """`StructuredOutputsParams` with the fields that chose one of vLLM's backends; here is one, so they say nothing.

    Raises: as `StructuredOutputsParams`.
    """

    backend: str | None = None
    backend_was_auto: bool = False
    disable_fallback: bool = False

    @staticmethod
    def from_optional(**values: Any) -> "GuidedDecodingParams | None":
        """Like the constructor; None if nothing but None is given."""
        return None if all(value is None for value in values.values()) else GuidedDecodingParams(**values)
