"""What "auto" and None mean for this machine and this checkpoint, and into how many ranks they can be cut."""

from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.triton_shim import HAS_TRITON
from nanovllm.layers.rotary_embedding import rope_parameters
from nanovllm.models.loader import DTYPES, build_outline
from nanovllm.models.tied_head import untie_if_heads_differ
from nanovllm.models.weight_files import read_tensors


def resolve_device(device: str) -> str:
    """ "auto" is CUDA where there is one.

    Raises:
        ValueError: "cuda" is asked for and absent. RuntimeError: CUDA is there without Triton, whose kernels it needs.
    """
    has_cuda = torch.cuda.is_available()
    if has_cuda and device != "cpu" and not HAS_TRITON:
        raise RuntimeError(
            "PyTorch sees a CUDA device, but Triton is not installed: `pip install triton`, or device='cpu'"
        )
    if device == "cuda" and not has_cuda:
        raise ValueError("device='cuda' but PyTorch sees no CUDA device; use device='cpu' or 'auto'")
    return device if device != "auto" else "cuda" if has_cuda else "cpu"


def resolve_by_weights(config: Config, hf_config: Any, path: Path) -> None:
    """What the weights have to say in config.json's place: the dtype it leaves out, and whether a tied head is tied.

    Raises as `models.weight_files.read_tensors`.
    """
    if not config.has_checkpoint:
        return
    if config.dtype == "auto" and _saved_dtype(hf_config) is None:
        for _, tensor in read_tensors(path):
            if tensor.dtype in DTYPES:
                hf_config.dtype = str(tensor.dtype).removeprefix("torch.")
                break
    untie_if_heads_differ(hf_config, path, resolve_dtype(config.dtype, hf_config))


def resolve_dtype(dtype: str, hf_config: Any) -> torch.dtype:
    """ "auto" is what the checkpoint was saved in, or float32 if nothing says."""
    if dtype != "auto":
        return getattr(torch, dtype)
    saved = _saved_dtype(hf_config)
    if saved is None:
        return torch.float32
    if saved not in ("bfloat16", "float16", "half", "float32", "float"):
        raise ValueError(f"dtype={saved!r:.80} in config.json is not supported; give LLM a dtype")
    return getattr(torch, saved)


def _saved_dtype(hf_config: Any) -> Any:
    saved = getattr(hf_config, "dtype", None)
    return getattr(hf_config, "torch_dtype", None) if saved is None else saved


def resolve_max_model_len(config: Config, hf_config: Any) -> int:
    """The length asked for, or the model's. Raises ValueError for more than the model's positions can express."""
    own = hf_config.max_position_embeddings
    if config.max_model_len is None:
        return own
    rope = rope_parameters(hf_config)
    factor = 1.0 if rope["rope_type"] == "default" else rope["factor"]
    stretched = int(rope["original_max_position_embeddings"] * factor)
    limit = max(own, stretched)
    if config.max_model_len > limit:
        raise ValueError(f"max_model_len={config.max_model_len} must be at most the model's {limit}")
    return config.max_model_len


def require_cut(config: Config, hf_config: Any, model_cls: type) -> None:
    """Raises ValueError, saying why, if the model cannot be cut into so many parts or there are too few devices."""
    size = config.tensor_parallel_size
    build_outline(hf_config, model_cls, TensorParallel(0, size))
    if resolve_device(config.device) == "cuda":
        if torch.cuda.device_count() < size:
            raise ValueError(
                f"tensor_parallel_size={size} must be at most the number of CUDA devices, {torch.cuda.device_count()}"
            )
        if torch.cuda.current_device() != 0:  # a thread of the engine's own would begin with 0 anyway
            raise ValueError(
                f"tensor_parallel_size={size} takes the devices from 0 on, but device {torch.cuda.current_device()} is "
                "current: choose devices with CUDA_VISIBLE_DEVICES"
            )
