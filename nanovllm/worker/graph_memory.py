"""Reads what a replayed graph has computed, without keeping the memory from the graphs recorded after it."""

from types import SimpleNamespace

import torch


def unowned(x: torch.Tensor) -> torch.Tensor:
    """`x` again, as a tensor that has no claim to its memory on a GPU. Raises ValueError if `x` is not contiguous.

    Memory that nobody claims goes to the next graph that is recorded, so all graphs may have their logits in one place.
    Nothing but a replay writes there: until the next one the result may be read, as long as the graph lives. A CPU has
    no graphs, and there `x` itself is returned.
    """
    if not x.is_cuda:
        return x
    if not x.is_contiguous():
        raise ValueError(f"a tensor of strides {x.stride()} must be contiguous")
    # PyTorch's one public way to a tensor that does not own its memory.
    memory = {"shape": (x.nbytes,), "typestr": "|u1", "data": (x.data_ptr(), False), "strides": None, "version": 3}
    flat = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=memory), device=x.device)
    return flat.view(x.dtype).view(x.shape)
