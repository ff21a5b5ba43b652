"""Types and small functions that programs for vLLM import besides its classes."""

import enum
import gc
import logging
import random
import socket
import uuid
from pathlib import Path
from typing import Any, TypedDict

from nanovllm.outputs import Logprob


class TextPrompt(TypedDict):
    prompt: str


class TokensPrompt(TypedDict, total=False):
    prompt_token_ids: list[int]
    prompt: str  # the prompt's text, which the output then repeats


SingletonPrompt = PromptType = str | list[int] | TextPrompt | TokensPrompt
SampleLogprobs = list[dict[int, Logprob]]
PromptLogprobs = list[dict[int, Logprob] | None]


class UsageContext(enum.StrEnum):
    """The kind of program that uses the engine. nano-vLLM accepts and ignores it, since it reports no usage."""

    UNKNOWN_CONTEXT = "UNKNOWN_CONTEXT"
    LLM_CLASS = "LLM_CLASS"
    API_SERVER = "API_SERVER"
    OPENAI_API_SERVER = "OPENAI_API_SERVER"
    OPENAI_BATCH_RUNNER = "OPENAI_BATCH_RUNNER"
    ENGINE_CONTEXT = "ENGINE_CONTEXT"


class _Platform:
    """The device of this machine, CUDA or otherwise the CPU, with the methods that programs call on it."""

    @property
    def device_type(self) -> str:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def device_name(self) -> str:
        return self.device_type

    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    is_cuda_alike = is_cuda

    def is_cpu(self) -> bool:
        return not self.is_cuda()

    def is_rocm(self) -> bool:
        return False

    is_tpu = is_xpu = is_hpu = is_neuron = is_out_of_tree = is_rocm


current_platform = _Platform()


def get_tokenizer(
    tokenizer_name: str | Path,
    *,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """The `transformers` tokenizer of a folder or hub id. `options` are those of `from_pretrained`.

    Raises:
        ValueError: another `tokenizer_mode` than "auto", "hf" or "slow".
    """
    from transformers import AutoTokenizer

    if tokenizer_mode not in ("auto", "hf", "slow"):
        raise ValueError(f"tokenizer_mode={tokenizer_mode!r} must be 'auto', 'hf' or 'slow'")
    if tokenizer_mode == "slow":
        options["use_fast"] = False
    return AutoTokenizer.from_pretrained(
        str(tokenizer_name), trust_remote_code=trust_remote_code, revision=revision, **options
    )


cached_get_tokenizer = get_tokenizer


def resolve_chat_template(
    tokenizer: Any,
    chat_template: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    *,
    model_config: Any = None,
) -> str | None:
    """The Jinja text of `chat_template`, a name or a text, or of the tokenizer's own template; None if it has none."""
    if chat_template is None and not tokenizer.chat_template:
        return None
    return tokenizer.get_chat_template(chat_template, tools=tools)


resolve_hf_chat_template = resolve_chat_template


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Collect garbage. An engine without references has already ended its processes and freed its memory."""
    gc.collect()


def get_open_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get_ip() -> str:
    """This machine's address, or 127.0.0.1 if it has no network. The function sends no packet to find out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 80))
            return s.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def random_uuid() -> str:
    return uuid.uuid4().hex


def set_random_seed(seed: int | None) -> None:
    """Seed Python, NumPy and PyTorch. It does not affect the engine, which samples by its own seed, `LLM(seed=…)`."""
    import numpy
    import torch

    if seed is not None:
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)


def init_logger(name: str) -> logging.Logger:
    return logging.getLogger(name)
