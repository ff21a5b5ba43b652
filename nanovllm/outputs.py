"""What a finished request gives back."""

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class CompletionOutput:
    """One generated continuation. `text` is None when the engine runs without a tokenizer."""

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: str | None  # "stop" | "length" | "abort"
    stop_reason: int | None = None  # the stop token id, unless it is an EOS


@dataclass(slots=True)
class RequestOutput:
    """A request and its completions: vLLM's object, which can also be indexed as upstream nano-vLLM's dict is."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0  # prompt tokens whose keys and values came from the prefix cache

    def __getitem__(self, key: str) -> Any:
        if key not in ("text", "token_ids", "finish_reason"):
            raise KeyError(f"{key!r}: a RequestOutput has 'text', 'token_ids' and 'finish_reason'")
        return getattr(self.outputs[0], key)
