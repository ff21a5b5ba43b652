"""The kernels run for real where there is a GPU and in Triton's interpreter where there is none."""

import pytest
import torch

if not torch.cuda.is_available():
    import paged_cache  # noqa: F401  on import, gives the interpreter bfloat16's rounding


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"
