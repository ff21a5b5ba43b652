"""The kernels run for real where there is a GPU and in Triton's interpreter where there is none."""

import os

import pytest
import torch

# Before any test file imports a kernel: Triton reads it when a function is decorated.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import paged_cache  # noqa: F401  on import, gives the interpreter bfloat16's rounding


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"
