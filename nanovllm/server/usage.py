"""How many tokens a request took."""

from dataclasses import dataclass
from typing import Any

from nanovllm.outputs import RequestOutput
from nanovllm.server.openai_fields import StreamOptions


@dataclass(slots=True)
class Usage:
    """Tokens of all of a request's prompts and completions; `cached_tokens` of the prompts' came from the cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add_prompt(self, output: RequestOutput) -> None:
        """Count a prompt: once for all of its completions."""
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens

    def of_chunk(self, options: StreamOptions) -> dict[str, Any]:
        """What a chunk of a stream says of it."""
        if not options.include_usage:
            return {}
        return {"usage": self.as_dict() if options.continuous_usage_stats else None}

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
