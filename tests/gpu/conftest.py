"""The fixture that all tests on a device share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def exact_float32() -> Iterator[None]:
    """Compute float32 matrix products in float32, not in TF32, on both sides of a comparison. Followers' default is the
    same.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
