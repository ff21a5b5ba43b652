"""Triton where it is installed; elsewhere a stand-in, so that kernel files can still be imported.

A CPU install of PyTorch comes without Triton. It never launches a kernel, but the kernel's file also has the PyTorch
code that runs instead. So `@triton.jit` and `tl.constexpr` must mean something when Python imports the file.
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
else:  # outside of the try: a Triton that is too old for these imports is an error
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

# Whether Triton's interpreter runs the kernels. It knows no inline assembly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

__all__ = ["HAS_TRITON", "INTERPRETED", "TensorDescriptor", "tl", "triton"]
