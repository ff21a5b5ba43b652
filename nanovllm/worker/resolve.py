"""Replaces "auto" and None in the options by what this machine and checkpoint need; checks tensor_parallel_size."""

from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.triton_shim import HAS_TRITON
from nanovllm.layers.moe import Experts
from nanovllm.layers.rotary_embedding import rope_parameters
from nanovllm.models.loader import DTYPES, build_outline
from nanovllm.models.tied_head import untie_if_heads_differ
from nanovllm.models.weight_files import read_tensors


def resolve_device(device: str) -> str:
    """ "auto" becomes "cuda" if PyTorch sees a CUDA device, and "cpu" if not.

    Raises:
        ValueError: `device` is "cuda", but PyTorch sees no CUDA device.
        RuntimeError: PyTorch sees a CUDA device, but Triton, whose kernels it would run, is not installed.
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
    """Correct `hf_config` by what the weight files hold.

    Where config.json names no dtype, `hf_config` gets that of the first weight of a dtype we know. Where it says that
    the head is tied but the files have a head that differs from the embedding, the head becomes untied.

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
    """ "auto" becomes the dtype that config.json names, or float32 if it names none. Raises ValueError for another."""
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
    """`config.max_model_len`, or the model's own. Raises ValueError for more positions than the model has."""
    own = hf_config.max_position_embeddings
    if config.max_model_len is None:
        return own
    rope = rope_parameters(hf_config)
    is_stretched = rope["rope_type"] not in ("default", "longrope") and not hf_config.has_rope_by_layer_type
    factor = rope["factor"] if is_stretched else 1.0  # by type of layer, those with windows are not stretched
    stretched = int(rope["original_max_position_embeddings"] * factor)
    limit = max(own, stretched)
    if config.max_model_len > limit:
        raise ValueError(f"max_model_len={config.max_model_len} must be at most the model's {limit}")
    return config.max_model_len


def require_cut(config: Config, hf_config: Any, model_cls: type) -> None:
    """Refuse what several ranks cannot share.

    Raises ValueError if tensor_parallel_size does not divide the model's sizes, or exceeds the CUDA devices; or if
    enable_expert_parallel asks a model without experts to share them.
    """
    size = config.tensor_parallel_size
    outline = build_outline(hf_config, model_cls, TensorParallel(0, size, whole_experts=config.enable_expert_parallel))
    if config.enable_expert_parallel and not any(isinstance(module, Experts) for module in outline.modules()):
        raise ValueError(f"enable_expert_parallel=True, but {model_cls.__name__} has no experts")
    if resolve_device(config.device) == "cuda":
        if torch.cuda.device_count() < size:
            raise ValueError(
                f"tensor_parallel_size={size} must be at most the number of CUDA devices, {torch.cuda.device_count()}"
            )
        if torch.cuda.current_device() != 0:  # the engine's own thread would start on device 0 anyway
            raise ValueError(
                f"tensor_parallel_size={size} uses devices 0 to {size - 1}, but the current device is "
                f"{torch.cuda.current_device()}: choose devices with CUDA_VISIBLE_DEVICES"
            )
