"""Programmatic dependent launch: a kernel is put on the device while the one before it still runs.

A decode step of a small model is some 220 kernels of a few microseconds, and a microsecond or more of each goes by
between the end of one and the first load of the next. On Hopper and later a kernel may be started early: its programs
come to life as those of the kernel before drain, and do what depends on no recent result (weights into the L2
cache, addresses, this step's plan), until `wait_for_previous` returns: then everything before has ended and its
stores are visible (CUDA C++ Programming Guide, "Programmatic Dependent Launch").

Two rules keep this sound. A kernel calls `wait_for_previous` before it reads what the previous one may have written,
and before its first store. And it lets the next one start only *after* that: when a kernel starts, the one before the
previous has then ended, so whatever is older than the last launch may be read at once.
"""

from functools import lru_cache
from typing import Any

import torch

from nanovllm.kernels.device import is_hopper
from nanovllm.kernels.triton_shim import tl, triton

LINE_BYTES = 128  # of the L2 cache


def early_launch(tensor: torch.Tensor) -> dict[str, Any]:
    """Launch options of a kernel that calls `wait_for_previous(EARLY)`, on this tensor's device."""
    return _options(tensor.device)


@lru_cache
def _options(device: torch.device) -> dict[str, Any]:
    can = device.type == "cuda" and is_hopper(device)
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}


@triton.jit
def fetch(pointers, mask):
    """Have the L2 cache fetch the lines at `pointers`; nobody waits for them.

    It is never too early: what the kernel before writes to such a line later, it writes to that same cache.
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
    """Wait for all kernels before this one, then let the next one be started."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
