"""Files in which each rank has its own weights, cut and merged as it holds them: it reads no others.

vLLM's load_format "sharded_state". The file names are vLLM's; the tensors in them are ours, and fit as many ranks as
have written them.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

DEFAULT_PATTERN = "model-rank-{rank}-part-{part}.safetensors"


class ShardedStateLoader:
    """vLLM's programs find the pattern under this name."""

    DEFAULT_PATTERN = DEFAULT_PATTERN


def save_shard(model: nn.Module, rank: int, folder: Path, pattern: str | None, max_bytes: int | None) -> None:
    """Write a rank's weights into an existing folder.

    Args:
        pattern: of the file names, with `{rank}` and `{part}`.
        max_bytes: of a file, unless one tensor has more; None: no limit.
    """
    from safetensors.torch import save_file

    pattern = pattern or DEFAULT_PATTERN
    part, num_bytes = {}, 0
    num_parts = 0

    def write() -> None:
        nonlocal num_parts, num_bytes
        save_file(part, folder / pattern.format(rank=rank, part=num_parts))
        num_parts, num_bytes = num_parts + 1, 0
        part.clear()

    for name, tensor in _weights(model):
        if part and max_bytes is not None and num_bytes + tensor.nbytes > max_bytes:
            write()
        part[name] = tensor.contiguous()
        num_bytes += tensor.nbytes
    write()


@torch.inference_mode()
def load_shard(model: nn.Module, rank: int, folder: Path) -> None:
    """Fill a rank's model, whose weights are not laid out yet.

    Raises:
        FileNotFoundError: there are no files of this rank.
        ValueError: naming a tensor that is missing, unexpected, or of another shape or dtype, as when the files were
            written under other options.
    """
    from safetensors import safe_open

    params = dict(model.named_parameters())
    files = sorted(folder.glob(DEFAULT_PATTERN.format(rank=rank, part="*")))
    if not files:
        raise FileNotFoundError(f"no {DEFAULT_PATTERN.format(rank=rank, part='*')} in {folder}")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- not a dict
                tensor, param = tensors.get_tensor(name), params.pop(name, None)
                if param is None or (tensor.shape, tensor.dtype) != (param.shape, param.dtype):
                    expected = "none" if param is None else f"{list(param.shape)} of {param.dtype}"
                    found = f"{list(tensor.shape)} of {tensor.dtype}"
                    raise ValueError(f"tensor {name!r} in {file} is {found}, and the model of this rank has {expected}")
                param.copy_(tensor)
    if params:
        raise ValueError(f"tensors missing in {folder}, rank {rank}: {', '.join(sorted(params)[:5])}")


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter as a checkpoint has it."""
    yield from model.named_parameters()
    for name, layer in model.named_modules():
        if hasattr(layer, "format"):
            for leaf, tensor in layer.format.hidden_tensors(layer).items():
                yield f"{name}.{leaf}", tensor
