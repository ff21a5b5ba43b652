"""Structured outputs on a CUDA device: masks come while the device computes, and every text is as asked."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
import torch
from inside import assert_nothing_is_held

from nanovllm import LLM, CompletionOutput, SamplingParams, StructuredOutputsParams, demo_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = ["import os\n", "def load(self, file, key):\n    return ", "class Stack:\n", "x = {"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{2,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
OPTIONS = {
    "device": "cuda",
    "dtype": "float32",
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 512,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "skip_tokenizer_init": False,
}


def structured(seed: int, outputs: dict[str, Any], **params: Any) -> SamplingParams:
    same = {"max_tokens": 200, "seed": seed, **params}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**outputs), **same)


COMPACT_JSON = {"json": SCHEMA, "disable_any_whitespace": True}
MIXED = [
    structured(1, COMPACT_JSON),
    SamplingParams(max_tokens=60, seed=5),
    structured(2, {"regex": "[a-z]{3}=[0-9]{1,3};"}, temperature=0),
    structured(3, {"choice": ["yes", "no", "perhaps"]}, top_k=5, repetition_penalty=1.3),
    structured(4, {"grammar": 'root ::= "(" root ")" | "x"'}, logprobs=2),
    SamplingParams(max_tokens=30, temperature=0, logprobs=1),
]


def completions(llm: LLM, prompts: Any, params: Any) -> list[CompletionOutput]:
    return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]


def texts(llm: LLM, num: int) -> list[str]:
    return [found.text for found in completions(llm, [PROMPTS[i % 4] for i in range(num)], requests(num))]


def requests(num: int) -> list[SamplingParams]:
    return [structured(i, COMPACT_JSON) if i % 3 else MIXED[i % len(MIXED)] for i in range(num)]


@pytest.fixture(params=[False, True], ids=["graphs", "eager"])
def llm(request: pytest.FixtureRequest, make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    yield make_llm(demo_model(), enforce_eager=request.param, **OPTIONS)


def test_every_text_is_what_its_request_asks_for(llm: LLM) -> None:
    assert llm.engine.max_behind == 1
    params = [structured(i, COMPACT_JSON) for i in range(64)]
    for found in completions(llm, PROMPTS * 16, params):
        assert found.finish_reason == "stop"
        jsonschema.validate(json.loads(found.text), SCHEMA)
    mixed = completions(llm, PROMPTS[:1] * len(MIXED), MIXED)
    assert re.fullmatch("[a-z]{3}=[0-9]{1,3};", mixed[2].text)
    assert mixed[3].text in ("yes", "no", "perhaps")
    assert re.fullmatch(r"\(*x\)*", mixed[4].text) and mixed[4].text.count("(") == mixed[4].text.count(")")
    assert_nothing_is_held(llm)


def test_tokens_one_step_behind_are_those_of_reading_at_once(llm: LLM) -> None:
    """The masks then come before the next launch either way, and the batches are of the same shapes."""
    behind = completions(llm, PROMPTS[:1] * len(MIXED), MIXED)
    llm.engine.max_behind = 0
    llm.reset_prefix_cache()
    at_once = completions(llm, PROMPTS[:1] * len(MIXED), MIXED)
    assert [found.token_ids for found in behind] == [found.token_ids for found in at_once]


def test_logits_that_a_graph_leaves_give_the_tokens_of_eager_steps(make_llm: Callable[..., LLM]) -> None:
    """With grammars alone, with other edits besides, and with log-probabilities, in batches of all sizes."""
    penalized = [SamplingParams(max_tokens=40, repetition_penalty=1.2, seed=i, logprobs=1) for i in range(8)]
    params = requests(24) + penalized
    found = []
    for eager in (False, True):
        llm = make_llm(demo_model(), enforce_eager=eager, **OPTIONS)
        outputs = completions(llm, PROMPTS * 8, params)
        found.append([(output.token_ids, output.finish_reason) for output in outputs])
        assert all(output.finish_reason in ("stop", "length") for output in outputs)
    assert found[0] == found[1]


def test_plain_requests_keep_their_tokens_beside_grammars(llm: LLM) -> None:
    """Greedy, in float32."""
    plain = SamplingParams(max_tokens=60, temperature=0)
    alone = completions(llm, PROMPTS * 2, plain)[:4]
    llm.reset_prefix_cache()
    together = completions(llm, PROMPTS * 2, [plain] * 4 + [structured(i, COMPACT_JSON) for i in range(4)])
    assert [found.token_ids for found in together[:4]] == [found.token_ids for found in alone]


def test_preemption_keeps_a_grammars_place(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(demo_model(), **{**OPTIONS, "num_kvcache_blocks": 12, "max_model_len": 150})
    for i, text in enumerate(texts(llm, 24)):
        if i % 3:
            jsonschema.validate(json.loads(text), SCHEMA)
    assert llm.stats().num_preemptions > 0
    assert_nothing_is_held(llm)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_devices_draw_under_the_same_masks(make_tp: Callable[..., LLM]) -> None:
    llm = make_tp(demo_model(), tensor_parallel_size=2, **OPTIONS)
    for i, text in enumerate(texts(llm, 12)):
        if i % 3:
            jsonschema.validate(json.loads(text), SCHEMA)
