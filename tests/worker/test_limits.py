"""What a device cannot do is said before anything is loaded or allocated for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.worker import resolve
from nanovllm.worker.input_batch import MAX_STATE, InputBatch


def test_rows_that_int32_cannot_index_are_refused_before_they_are_allocated(
    checkpoint: Callable[..., Path], make_llm: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=r"max_num_seqs=8000000 .* max_model_len=320 .*at most 2147483647"):
        make_llm(checkpoint("plain"), max_num_seqs=8_000_000, max_num_batched_tokens=8_000_000)


def test_the_largest_rows_are_accepted() -> None:
    """On a device without memory, which allocates nothing."""
    width = MAX_STATE // 64 - 100
    batch = InputBatch(num_rows=64, max_model_len=width, max_blocks=4, device="meta", num_slots=0)
    assert batch.token_ids.shape == (64, width + 1)
    assert batch.offsets[-1] <= MAX_STATE


def test_cuda_without_triton_is_told_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "HAS_TRITON", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cuda", "auto"):
        with pytest.raises(RuntimeError, match="Triton is not installed.*pip install triton.*device='cpu'"):
            resolve.resolve_device(device)
    assert resolve.resolve_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve.resolve_device("auto") == "cpu"
