"""What programs written for vLLM, or for upstream nano-vLLM, pass to our methods and do with what they get."""

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_prompts
from tqdm import tqdm

from nanovllm import LLM, AsyncLLM, RequestOutput, SamplingParams

OPTIONS = {"device": "cpu", "dtype": "float32", "block_size": 16, "num_gpu_blocks_override": 64, "max_model_len": -1}
PROMPTS = random_prompts([5, 33, 1], seed=5, vocab_size=256)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


@pytest.fixture(scope="module")
def llm(text_model: Path) -> Iterator[LLM]:
    with LLM(text_model, **OPTIONS, quantization=None, enable_lora=False) as llm:
        yield llm
        assert llm.stats().cache_usage == 0.0


def test_arguments_that_ask_for_nothing_change_nothing(llm: LLM) -> None:
    nothing = {"lora_request": None, "priority": [0, 0, 0], "tokenization_kwargs": None, "mm_processor_kwargs": None}
    plain = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    outputs = llm.generate(PROMPTS, sampling_params=GREEDY, use_tqdm=False, **nothing)
    assert [o["token_ids"] for o in outputs] == [o["token_ids"] for o in plain]
    with pytest.raises(ValueError, match="lora_request=.* must be None: there are no LoRA"):
        llm.generate(PROMPTS, GREEDY, lora_request=object())
    with pytest.raises(ValueError, match="priority=1 must be None or 0: requests are served in the order"):
        llm.chat([{"role": "user", "content": "Hello"}], priority=1)


def test_arguments_of_the_asyncio_front_too(text_model: Path) -> None:
    async def serve() -> list[int]:
        async with AsyncLLM(text_model, **OPTIONS, disable_log_stats=False) as llm:
            with pytest.raises(ValueError, match="priority=2 must be None or 0"):
                llm.generate(PROMPTS[0], GREEDY, "a", priority=2)
            with pytest.raises(NotImplementedError, match=r"AsyncLLM.encode\(\) is not here: .*encode_prompt"):
                llm.encode("Hello", None, "b")
            nothing = {"lora_request": None, "trace_headers": None, "priority": 0, "data_parallel_rank": None}
            return [o.outputs[0].token_ids async for o in llm.generate(PROMPTS[0], GREEDY, "c", **nothing)][-1]

    assert len(asyncio.run(serve())) == 6


class TestParameters:
    """A request has those that were there when it was made."""

    def test_of_a_stream(self, llm: LLM) -> None:
        params = copy.deepcopy(GREEDY)
        stream = llm.stream(PROMPTS, params)
        next(stream)
        params.max_tokens, params.stop_token_ids = 2, [*range(256)]
        finished = [output for output in stream if output.finished]
        assert [len(output["token_ids"]) for output in finished] == [6] * 3

    def test_of_requests_of_the_asyncio_front_that_have_not_begun(self, text_model: Path) -> None:
        async def serve() -> list[int]:
            async with AsyncLLM(text_model, **OPTIONS) as llm:
                params, outputs = copy.deepcopy(GREEDY), []
                for params.max_tokens in (1, 2, 3):
                    outputs.append(llm.generate(PROMPTS[0], params))
                params.max_tokens = 0
                with pytest.raises(ValueError, match="max_tokens=0 must be"):
                    llm.generate(PROMPTS[0], params)
                with pytest.raises(ValueError, match="max_tokens=0 must be"):
                    llm.chat([{"role": "user", "content": "Hello"}], params)
                return [[o async for o in output][-1].metrics.num_generation_tokens for output in outputs]

        assert asyncio.run(serve()) == [1, 2, 3]

    def test_of_one_for_all_and_of_one_for_each(self, llm: LLM) -> None:
        params = copy.deepcopy(GREEDY)
        params.max_tokens = 3
        outputs = llm.generate(PROMPTS, [params, GREEDY, params], use_tqdm=False)
        assert [len(output["token_ids"]) for output in outputs] == [3, 6, 3]
        params.stop = "x"  # a string, as SamplingParams takes it
        assert len(llm.generate(PROMPTS, params, use_tqdm=False)) == 3


class TestOutputs:
    @pytest.fixture(scope="class")
    def output(self, llm: LLM) -> RequestOutput:
        return llm.generate([PROMPTS[0]], GREEDY, use_tqdm=False)[0]

    def test_is_read_as_upstreams_dict(self, output: RequestOutput) -> None:
        text, token_ids = output.outputs[0].text, output.outputs[0].token_ids
        assert dict(output) == {"text": text, "token_ids": token_ids, "finish_reason": "length"}
        assert "text" in output and "logprobs" not in output and 3 not in output
        assert list(output) == list(output.keys()) == ["text", "token_ids", "finish_reason"]
        assert output.get("token_ids") == token_ids and output.get("score") is None and output.get("score", 1) == 1
        with pytest.raises(KeyError, match="'score': a RequestOutput has 'text'"):
            output["score"]

    def test_has_vllms_fields(self, output: RequestOutput) -> None:
        absent = ("lora_request", "encoder_prompt", "encoder_prompt_token_ids", "kv_transfer_params", "prompt_logprobs")
        assert all(getattr(output, name) is None for name in absent)
        (completion,) = output.outputs
        assert completion.finished() and completion.lora_request is None and completion.routed_experts is None
        made = RequestOutput("7", None, [1], None, [completion], True)  # by position, as in vLLM
        assert made.outputs == [completion] and made.finished and made.metrics is None
        assert "lora" not in repr(output) and "encoder" not in repr(output)

    def test_may_be_given_attributes(self, output: RequestOutput) -> None:
        output.reward = output.outputs[0].reward = output.metrics.reward = 1.5
        assert (output.reward, output.outputs[0].reward) == (1.5, 1.5)

    def test_metrics_have_the_names_of_both_of_vllms_engines(self, output: RequestOutput) -> None:
        m = output.metrics
        assert m.arrival_time <= m.first_scheduled_time < m.first_token_time < m.last_token_time <= m.finished_time
        assert (m.queued_ts, m.scheduled_ts) == (m.arrival_time, m.first_scheduled_time)
        assert (m.first_token_ts, m.last_token_ts) == (m.first_token_time, m.last_token_time)
        assert m.first_token_latency == m.first_token_time - m.arrival_time
        assert m.num_generation_tokens == 6

    def test_metrics_of_an_early_output_are_none_or_true(self, llm: LLM) -> None:
        stream = llm.stream([PROMPTS[0]], GREEDY)
        m = next(stream).metrics
        assert m.finished_time is None and m.last_token_time is not None and m.num_generation_tokens == 1
        stream.close()


def test_a_progress_bar_is_the_callers_if_he_makes_one(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    bars = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    llm.generate(PROMPTS, GREEDY, use_tqdm=lambda **options: Bar(**options, colour="green"))
    llm.log_likelihood(PROMPTS, use_tqdm=Bar)
    assert [(bar.n, bar.total) for bar in bars] == [(3, 3), (3, 3)]
    capsys.readouterr()
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert len(bars) == 2 and capsys.readouterr().err == ""
