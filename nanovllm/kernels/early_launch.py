"""Programmatic dependent launch: a kernel starts while the kernel before it still runs.

A decode step of a small model is some 220 kernels of a few microseconds, and between the end of one and the first load
of the next a microsecond or more goes by. Hopper and later GPUs can start a kernel early: its programs start as those
of the kernel before it end. They do what depends on no recent result (fetch weights into the L2 cache, compute
addresses, read the step's splits), and then call `wait_for_previous`. When that returns, all kernels before have ended,
and their stores are visible (CUDA C++ Programming Guide, "Programmatic Dependent Launch").

Two rules keep this sound:

1. A kernel calls `wait_for_previous` before its first store, and before it reads what the previous kernel may have
   written.
2. It lets the next kernel start only *after* that. So when a kernel starts, the one before the previous has ended, and
   the kernel may read at once whatever is older than the last launch.
"""

from functools import lru_cache
from typing import Any

import torch

from nanovllm.kernels.device import is_hopper
from nanovllm.kernels.triton_shim import tl, triton

LINE_BYTES = 128  # of the L2 cache


def early_launch(tensor: torch.Tensor) -> dict[str, Any]:
    """Launch options, on this tensor's device, of a kernel that calls `wait_for_previous(EARLY)`."""
    return _options(tensor.device)


@lru_cache
def _options(device: torch.device) -> dict[str, Any]:
    can = device.type == "cuda" and is_hopper(device)
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}


@triton.jit
def fetch(pointers, mask):
    """Ask the L2 cache to fetch the lines at `pointers`, without waiting for them.

    This is never too early: if the previous kernel writes to such a line later, it writes to that same cache.
    """
    pointers, mask = tl.broadcast(pointers, mask)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [pointers, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Wait until all kernels before this one have ended, then let the next one start."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
