"""What the extras may cost in memory is known before the cache's size is fixed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE
from inside import run_largest_step

from nanovllm.worker import logit_extras


@pytest.mark.parametrize(("max_num_seqs", "num_tokens"), [(16, 1024), (40, 600), (4, 64)])
def test_the_step_that_memory_is_measured_in_has_the_largest_row_batches(
    max_num_seqs: int,
    num_tokens: int,
    checkpoint: Callable[..., Path],
    make_llm: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logit_extras, "ROW_BATCH_BYTES", 4 * VOCAB_SIZE * 48)
    edited, scored = [], []
    edit_logits, token_logprobs = logit_extras.edit_logits, logit_extras.token_logprobs
    monkeypatch.setattr(logit_extras, "edit_logits", lambda x, *rest: edited.append(len(x)) or edit_logits(x, *rest))
    monkeypatch.setattr(
        logit_extras, "token_logprobs", lambda x, *rest: scored.append(len(x)) or token_logprobs(x, *rest)
    )
    options = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": num_tokens, "enforce_eager": True}
    runner = make_llm(checkpoint("plain"), **options).engine.runner
    with torch.inference_mode():
        run_largest_step(runner)
    width = VOCAB_SIZE + logit_extras.SORTED_COST * 20
    assert max(edited) == min(48, max_num_seqs)
    assert max(scored) == min(48 * VOCAB_SIZE // width, num_tokens)
