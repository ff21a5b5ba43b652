"""Triton where it is installed; elsewhere a stand-in that lets kernel files be imported for their references.

A plain CPU install of PyTorch has no Triton. The kernels are then never launched, but the module that defines one
also holds its PyTorch reference, which is the CPU implementation, so `@triton.jit` and `tl.constexpr` must still mean
something at import.
"""

import os

try:
    import triton

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, *args: object, **kwargs: object) -> "_Absent":
            return self

    triton = tl = TensorDescriptor = _Absent()
else:  # what a Triton lacks that is too old is an error, and not a reason to go on without
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

# Kernels are run by Triton's interpreter, which knows no inline assembly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

__all__ = ["HAS_TRITON", "INTERPRETED", "TensorDescriptor", "tl", "triton"]
