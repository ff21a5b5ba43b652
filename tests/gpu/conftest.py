"""What all tests on a device share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def exact_float32() -> Iterator[None]:
    """float32 matrix products of both sides in float32 and not in TF32, which is also other ranks' default."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
