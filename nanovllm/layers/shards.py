"""Copies a checkpoint's tensor, or a rank's share of it, into a parameter, and refuses a wrong shape."""

import torch


def copy_share(param: torch.Tensor, loaded: torch.Tensor, dim: int, total: int, rank: int) -> None:
    """Copy `rank`'s share of `loaded`, which has `total` features along `dim`; fill the rest of `param` with zeros.

    Of a tensor mapped from a file only the share is read. Raises ValueError on a wrong shape.
    """
    whole = [*param.shape[:dim], total, *param.shape[dim + 1 :]]
    if list(loaded.shape) != whole:
        raise ValueError(f"shape {list(loaded.shape)} where the model has {whole}")
    share = param.shape[dim]
    start = min(rank * share, total)
    length = min(share, total - start)
    param.data.narrow(dim, 0, length).copy_(loaded.narrow(dim, start, length))
    param.data.narrow(dim, length, share - length).zero_()


def split_exactly(loaded: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """`loaded` in parts of `sizes` along dimension 0. Raises ValueError if it is not of their sum."""
    if len(loaded) != sum(sizes):
        raise ValueError(f"shape {list(loaded.shape)} where the model has {sum(sizes)} rows, of {sizes}")
    return loaded.split(sizes)


def copy_exactly(param: torch.Tensor, loaded: torch.Tensor) -> None:
    """Copy `loaded` into `param`, converting the dtype. Raises ValueError unless the shapes are equal."""
    if param.shape != loaded.shape:
        raise ValueError(f"shape {list(loaded.shape)} where the model has {list(param.shape)}")
    param.data.copy_(loaded)
