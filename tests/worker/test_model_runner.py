"""What a device's rows and cache must not let through from one request to another."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import SamplingParams


@pytest.mark.parametrize("options", [{}, {"num_kvcache_blocks": 14}, {"max_num_batched_tokens": 33}])
def test_nan_left_in_the_cache_by_others_is_never_seen(
    checkpoint: Callable[..., Path], make_llm: Callable[..., Any], options: dict[str, Any]
) -> None:
    """A request whose numbers overflowed leaves NaN in its blocks; whoever gets them next answers as ever."""
    rng = random.Random(0)
    prompts = [[rng.randrange(211) for _ in range(n)] for n in (1, 15, 16, 17, 40, 70)]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    llm = make_llm(checkpoint("plain"), **options)
    clean = [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]
    llm.reset_prefix_cache()
    with torch.inference_mode():
        llm.engine.runner.kv_cache.fill_(float("nan"))
    assert [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)] == clean


def test_a_batch_whose_sending_was_interrupted_is_sent_again(
    checkpoint: Callable[..., Path], make_llm: Callable[..., Any]
) -> None:
    """The device has the decode's batch; the next request begins with the prompt's, the last that the host knows of."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    llm = make_llm(checkpoint("plain"))
    clean = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]["token_ids"]
    llm.reset_prefix_cache()
    batch, calls = llm.engine.runner.batch, []
    send = batch._send_batch

    def interrupted(*args: Any) -> None:
        send(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    batch._send_batch = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]["token_ids"] == clean
