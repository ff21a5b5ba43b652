"""What a device cannot do is said before anything is loaded or allocated for it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_family

from nanovllm.config import Config
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.attention.contract import AttentionSpec
from nanovllm.step_plan import NewRow, StepPlan
from nanovllm.worker import memory, resolve
from nanovllm.worker.cuda_graph import StepShape
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


def test_layers_of_different_heads_cannot_share_a_cache() -> None:
    specs = [AttentionSpec(4, 2, 64, 1.0), AttentionSpec(4, 1, 64, 1.0, window=8)]
    with pytest.raises(ValueError, match=r"\[\(1, 64\), \(2, 64\)\].*must be equal"):
        memory.group_specs(specs, 100)


def test_a_window_that_no_sequence_outgrows_makes_no_group() -> None:
    specs = [AttentionSpec(4, 2, 64, 1.0), AttentionSpec(4, 2, 64, 1.0, window=100)]
    assert memory.group_specs(specs, 101).windows == (None, 100)
    assert memory.group_specs(specs, 100).windows == (None,) and specs[1].window is None


def test_a_context_that_only_some_layers_stretch_is_not_the_models(
    tmp_path: Path, make_llm: Callable[..., Any]
) -> None:
    path = save_family(tmp_path, "gemma3-scaled")  # factor 8 in layers with full attention
    assert make_llm(path, max_model_len=320).engine.runner.max_model_len == 320
    with pytest.raises(ValueError, match="max_model_len=321 must be at most the model's 320"):
        make_llm(path, max_model_len=321)


def test_a_window_leaves_room_for_longer_sequences(caplog: pytest.LogCaptureFixture) -> None:
    """In a group with a window a sequence needs blocks for that and one chunk, however long it is."""
    config = Config(model="any", max_num_batched_tokens=32)
    fit = partial(memory.fit_max_model_len, num_blocks=40, block_size=16)
    assert fit(config, 10_000, windows=(None, None)) == 20 * 16
    assert fit(config, 10_000, windows=(None, 17)) == (40 - 4) * 16
    assert fit(config, 10_000, windows=(17, 9)) == 10_000
    config.max_model_len = 577
    with pytest.raises(ValueError, match=r"max_model_len=577 .* holds 576 tokens; lower .* max_num_batched_tokens=32"):
        fit(config, 577, windows=(None, 17))
    with pytest.raises(ValueError, match="no room for 3 blocks.* of 100 bytes; raise num_kvcache_blocks=2"):
        config.num_kvcache_blocks = 2
        memory.num_cache_blocks(config, 100, 3, None, lambda: 0, TensorParallel(), "cpu")


def test_rows_have_a_block_table_for_each_group_of_layers() -> None:
    batch = InputBatch(num_rows=3, max_model_len=50, max_blocks=4, device="cpu", num_slots=1, num_groups=2)
    new = [NewRow(row, [7], 0, [[row, 5], [-1, row + 8]], 1.0, 0, 1.0, 0.0, 0, 0, []) for row in (2, 0)]
    plan = StepPlan(new_rows=new, rows=[2, 0], query_lens=[1, 1], num_decodes=2)
    plan.new_blocks = [(2, 1, 2, 77), (0, 0, 3, 66)]
    batch.apply(plan, 0, StepShape(2))
    assert batch.block_tables.tolist() == [
        [[0, 5, 0, 66], [0] * 4, [2, 5, 0, 0]],
        [[0, 8, 0, 0], [0] * 4, [0, 10, 77, 0]],
    ]
