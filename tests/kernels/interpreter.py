"""What Triton's interpreter is given on import: the arithmetic of bfloat16, and a memory of what it has patched."""

import os
from functools import cache
from typing import Any

import numpy as np
import torch


def mend_arithmetic() -> None:
    """Give Triton's interpreter the arithmetic of bf16: its dot multiplies the bit patterns, and its casts truncate."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert_float, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_to_nearest(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert_float(data, source, target, mode)
        nearest = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
        return nearest.view(torch.int16).numpy().view(np.uint16)

    def dot_of_values(self: object, a: object, b: object, *rest: object) -> object:
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return dot(self, a, b, *rest)

    interpreter._convert_float = convert_to_nearest
    interpreter.InterpreterBuilder.create_dot = dot_of_values


def remember_builtins() -> None:
    """Look for a module's builtins once, and patch none that are patched.

    The interpreter looks through all of triton.language anew at each launch and each call of a device function, though
    a launch has patched it already: two fifths of a test's time.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    is_builtin = tl.core.is_builtin

    @cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name in dir(package) if is_builtin(getattr(package, name))]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        names = builtins_of(package)
        if names and is_builtin(getattr(package, names[0])):  # all of them are patched together, or none
            for name in names:
                interpreter._patch_attr(package, name, getattr(package, name), builder, scope)

    interpreter._patch_builtin = patch


if os.environ.get("TRITON_INTERPRET") == "1":
    mend_arithmetic()
    remember_builtins()
