"""The kernels run for real where there is a GPU and in Triton's interpreter where there is none."""

import pytest
import torch

if not torch.cuda.is_available():
    import interpreter  # noqa: F401  which mends Triton's on import


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"
