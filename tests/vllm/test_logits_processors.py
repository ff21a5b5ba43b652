"""A program's own logits processors, by vLLM's protocol."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inside import batch_of, processors_over, update_of_batch
from nanovllm.vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
)
from nanovllm.vllm.v1.sample.logits_processor.builtin import process_dict_updates

from nanovllm import LLM, SamplingParams


class Target(LogitsProcessor):
    """Only `extra_args["target"]` may be drawn."""

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        if params.extra_args and not isinstance(params.extra_args.get("target"), int):
            raise ValueError("target must be an integer")

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        assert vllm_config.model_config.max_model_len == 320
        self.targets: dict[int, int] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.targets, batch_update, lambda params, *_: (params.extra_args or {}).get("target"))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, target in self.targets.items():
            kept = logits[row, target].clone()
            logits[row] = float("-inf")
            logits[row, target] = kept
        return logits


class NeverTwice(AdapterLogitsProcessor):
    """No token of prompt or output may be drawn again."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[..., torch.Tensor] | None:
        def forbid(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[prompt_ids + output_ids] = float("-inf")
            return logits

        return forbid if params.extra_args is not None else None


PROMPTS = [[i, 2 * i, 7] for i in range(1, 7)]


def tokens(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.parametrize("with_graphs", [False, True])
def test_those_who_ask_are_changed_and_the_others_are_as_without(
    text_model: Path, make_llm: Callable[..., LLM], with_graphs: bool
) -> None:
    """Of lengths that let the batch shrink and move, with edits of ours besides, and fewer rows than requests."""
    params = [SamplingParams(max_tokens=3 + 2 * i, seed=i, ignore_eos=True, logprobs=1) for i in range(6)]
    params[3].repetition_penalty = 1.5
    expected = tokens(make_llm(text_model), params)
    for i in (1, 4):
        params[i].extra_args = {"target": 100 + i}
    llm = make_llm(text_model, logits_processors=[Target], max_num_seqs=4, with_graphs=with_graphs)
    found = llm.generate(PROMPTS, params, use_tqdm=False)
    for i, output in enumerate(found):
        assert output.outputs[0].token_ids == ([100 + i] * (3 + 2 * i) if i in (1, 4) else expected[i])
    # log-probabilities are the model's own
    assert found[1].outputs[0].logprobs[0][101].logprob < -0.5


def test_every_completion_of_a_request_is_changed(text_model: Path, make_llm: Callable[..., LLM]) -> None:
    params = SamplingParams(n=3, max_tokens=2, ignore_eos=True, extra_args={"target": 101})
    (output,) = make_llm(text_model, logits_processors=[Target]).generate([5], params, use_tqdm=False)
    assert [completion.token_ids for completion in output.outputs] == [[101, 101]] * 3


def test_a_requests_own_processor_sees_prompt_and_output(text_model: Path, make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(text_model, logits_processors=[f"{__name__}:NeverTwice"], max_num_seqs=4)
    params = [SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, extra_args={}) for _ in PROMPTS]
    for prompt, drawn in zip(PROMPTS, tokens(llm, params), strict=True):
        assert len(set(drawn)) == 12 and not set(drawn) & set(prompt)


def test_what_cannot_be_served_is_refused(text_model: Path, make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(text_model, logits_processors=[Target])
    with pytest.raises(ValueError, match="target must be an integer"):
        llm.generate([[1]], SamplingParams(extra_args={"target": "x"}), use_tqdm=False)
    with pytest.raises(ValueError, match="extra_args=.* this engine has no logits_processors"):
        make_llm(text_model).generate([[1]], SamplingParams(extra_args={"target": 1}), use_tqdm=False)
    with pytest.raises(TypeError, match="logits_processors has <class 'int'>"):
        make_llm(text_model, logits_processors=[int])
    with pytest.raises(ValueError, match="need tensor_parallel_size=1"):
        make_llm(text_model, logits_processors=[Target], tensor_parallel_size=2)
    with pytest.raises(TypeError, match="must be a list of classes"):
        make_llm(text_model, logits_processors=Target)


def test_a_failing_processor_ends_the_call_and_the_engine_serves_on(
    text_model: Path, make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(text_model, logits_processors=[Target])
    params = [SamplingParams(max_tokens=4, extra_args={"target": 9})] * 6
    with monkeypatch.context() as patch:
        patch.setattr(Target, "apply", lambda self, logits: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokens(llm, params)
    assert tokens(llm, params) == [[9] * 4] * 6


def test_updates_tell_where_everybody_is() -> None:
    """Against a list that is kept by the updates alone, over random comings and goings."""
    engine = SimpleNamespace(scheduler=SimpleNamespace(running=[]))
    processors = processors_over(engine)
    rng, told, count = random.Random(0), {}, 0
    for _ in range(300):
        kept = [seq for seq in engine.scheduler.running if rng.random() < 0.7]
        for _ in range(rng.randrange(3)):
            kept.append(_Sequence(count))
            count += 1
        rng.shuffle(kept)
        for row, seq in enumerate(kept):
            seq.row = row
        engine.scheduler.running = kept
        update = update_of_batch(processors, kept)
        process_dict_updates(told, update, lambda params, prompt_ids, output_ids: params)
        assert sorted(told) == list(range(len(kept)))
        assert [told[i] for i in range(len(kept))] == [seq.params for seq in batch_of(processors)]
        logits = torch.tensor([[float(seq.params)] for seq in kept]).reshape(len(kept), 1)
        assert torch.equal(processors([seq.row for seq in kept], logits), logits)


class _Sequence:
    def __init__(self, number: int) -> None:
        self.params, self.token_ids, self.num_prompt_tokens, self.row = number + 1, [1, 2], 1, -1


def test_swaps_are_understood_too() -> None:
    entries = {0: "a", 2: "c"}
    update = BatchUpdate(3, [], [], [(0, 1, MoveDirectionality.SWAP), (1, 2, MoveDirectionality.SWAP)])
    assert process_dict_updates(entries, update, lambda *_: None)
    assert entries == {1: "c", 2: "a"}
