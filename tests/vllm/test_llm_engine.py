"""vLLM's `LLMEngine`, whose caller does the steps, and the metrics under vLLM's names."""

from collections.abc import Callable
from pathlib import Path

import pytest
from nanovllm.vllm.v1.metrics.reader import Counter, Gauge

from nanovllm import LLM, RequestOutput, RequestOutputKind, SamplingParams
from nanovllm.vllm import EngineArgs, LLMEngine

PROMPTS = [[65, 66, 67], [70] * 40, [1, 2]]


@pytest.fixture
def llm(text_model: Path, make_llm: Callable[..., LLM]) -> LLM:
    return make_llm(text_model, skip_tokenizer_init=False)


def run(engine: LLMEngine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def test_stepping_gives_what_generate_gives(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=5, seed=i, n=1 + i % 2, logprobs=1) for i in range(3)]
    expected = llm.generate(PROMPTS, params, use_tqdm=False)
    engine = llm.llm_engine
    for i, (prompt, param) in enumerate(zip(PROMPTS, params, strict=True)):
        assert engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, param) == f"r{i}"
    outputs = run(engine)
    for i, output in enumerate(expected):
        last = outputs[f"r{i}"][-1]
        assert last.finished and not any(o.finished for o in outputs[f"r{i}"][:-1])
        assert [c.token_ids for c in last.outputs] == [c.token_ids for c in output.outputs]
        assert [c.text for c in last.outputs] == [c.text for c in output.outputs]
        assert last.outputs[0].logprobs == output.outputs[0].logprobs
    assert engine.step() == [] and not engine.has_unfinished_requests()


def test_kinds_of_output_are_vllms(llm: LLM) -> None:
    engine = llm.llm_engine
    for kind in RequestOutputKind:
        engine.add_request(kind.name, PROMPTS[0], SamplingParams(max_tokens=4, temperature=0, output_kind=kind))
    outputs = run(engine)
    assert [len(o.outputs[0].token_ids) for o in outputs["CUMULATIVE"]] == [1, 2, 3, 4]
    assert [len(o.outputs[0].token_ids) for o in outputs["DELTA"]] == [1, 1, 1, 1]
    assert [len(o.outputs[0].token_ids) for o in outputs["FINAL_ONLY"]] == [4]


def test_parameters_are_checked_and_the_requests_own(llm: LLM) -> None:
    engine = llm.llm_engine
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    params.stop = None
    engine.add_request("a", PROMPTS[0], params)
    params.max_tokens = -1
    with pytest.raises(ValueError, match="max_tokens=-1"):
        engine.add_request("b", PROMPTS[0], params)
    assert len(run(engine)["a"][-1].outputs[0].token_ids) == 3


def test_steps_take_nothing_from_a_stream(llm: LLM) -> None:
    engine = llm.llm_engine
    stream = llm.stream([PROMPTS[0]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert len(next(stream)["token_ids"]) == 1
    engine.add_request("a", PROMPTS[1], SamplingParams(max_tokens=9, ignore_eos=True))
    assert set(run(engine)) == {"a"}
    assert [(len(output["token_ids"]), output.finished) for output in stream] == [(5, True)]


def test_a_request_is_aborted_and_says_nothing_more(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("a", PROMPTS[0], SamplingParams(max_tokens=8, ignore_eos=True))
    engine.add_request("b", PROMPTS[1], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.step()
    engine.abort_request(["a", "unknown"])
    assert engine.get_num_unfinished_requests() == 1
    assert set(run(engine)) == {"b"}
    assert llm.stats().cache_usage == 0


def test_what_cannot_run_is_refused(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("a", PROMPTS[0], SamplingParams())
    with pytest.raises(ValueError, match="'a'"):
        engine.add_request("a", PROMPTS[0], SamplingParams())
    with pytest.raises(TypeError, match="request_id=3"):
        engine.add_request(3, PROMPTS[0], SamplingParams())
    with pytest.raises(TypeError, match="params=None"):
        engine.add_request("b", PROMPTS[0], None)
    with pytest.raises(ValueError, match="lora_request="):
        engine.add_request("b", PROMPTS[0], SamplingParams(), lora_request=object())
    with pytest.raises(NotImplementedError, match="stat_loggers"):
        LLMEngine.from_engine_args(EngineArgs(model="m"), stat_loggers=[object])
    assert set(run(engine)) == {"a"}


def test_an_engine_of_its_own_is_closed_when_it_is_dropped(text_model: Path) -> None:
    args = EngineArgs(model=str(text_model), dtype="float32", block_size=16, num_gpu_blocks_override=8)
    engine = LLMEngine.from_engine_args(args)
    engine.add_request("a", "hello", SamplingParams(max_tokens=2))
    assert run(engine)["a"][-1].finished


@pytest.mark.parametrize("max_behind", [0, 1])
def test_forgetting_the_cache_under_running_requests_changes_no_token(
    text_model: Path, make_llm: Callable[..., LLM], max_behind: int
) -> None:
    llm = make_llm(text_model, max_behind=max_behind, max_num_batched_tokens=16)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, prompt_logprobs=0)
    expected = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params, use_tqdm=False)]
    engine = llm.llm_engine
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, params)
    outputs: dict[str, list[int]] = {}
    for step in range(200):
        if step % 4 == 1:
            assert engine.reset_prefix_cache(reset_running_requests=True) is True
            assert not llm.engine.scheduler.running
        outputs |= {o.request_id: o.outputs[0].token_ids for o in engine.step()}
        if not engine.has_unfinished_requests():
            break
    assert [outputs[str(i)] for i in range(3)] == expected
    assert llm.stats().num_preemptions > 3
    assert llm.reset_prefix_cache() is True


def test_metrics_have_vllms_names_and_count(llm: LLM) -> None:
    llm.generate([PROMPTS[1]] * 2, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    llm.generate([PROMPTS[1]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["vllm:generation_tokens"].value == 12
    assert metrics["vllm:prompt_tokens"].value == 120
    assert metrics["vllm:prefix_cache_queries"].value == 120
    assert metrics["vllm:prefix_cache_hits"].value in (32, 64)  # the second may have shared the first's, too
    assert metrics["vllm:num_preemptions"].value == 0
    assert metrics["vllm:num_requests_running"].value == 0
    assert all(isinstance(metric, Counter | Gauge) for metric in metrics.values())
    assert metrics["vllm:kv_cache_usage_perc"].labels["model_name"] == llm.llm_engine.model_config.model
