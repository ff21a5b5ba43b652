"""What lm-eval's `vllm` model class asks of vLLM, by the same calls; tools/run_lm_eval.py runs lm-eval itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import Reference
from nanovllm.vllm.renderers.hf import resolve_chat_template
from nanovllm.vllm.tokenizers import get_tokenizer

from nanovllm.vllm import LLM, SamplingParams, TokensPrompt

PROMPTS = [[65, 66, 67, 68, 69, 70], [1, 2, 3, 4], [200]]


@pytest.fixture(scope="module")
def llm(text_model: Path) -> Iterator[LLM]:
    """Of the options that it gives, most of which ask for nothing."""
    llm = LLM(
        model=str(text_model),
        revision=None,
        dtype="float32",
        tokenizer=None,
        tokenizer_mode="auto",
        tokenizer_revision=None,
        trust_remote_code=False,
        tensor_parallel_size=1,
        max_model_len=None,
        max_num_seqs=None,
        quantization=None,
        seed=1234,
        enable_lora=False,
        max_lora_rank=16,
        gpu_memory_utilization=0.9,
        swap_space=4,
        disable_log_stats=True,
        kv_cache_memory_bytes=4 << 20,
    )
    yield llm
    llm.shutdown()


def test_log_likelihoods_of_token_ids_are_transformers(llm: LLM, text_model: Path) -> None:
    params = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in PROMPTS],
        sampling_params=[params] * 3,
        use_tqdm=False,
        lora_request=None,
    )
    for ids, output in zip(PROMPTS, outputs, strict=True):
        expected = torch.log_softmax(Reference(text_model).logits(ids), dim=-1)
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(ids)
        for place, by_token in enumerate(output.prompt_logprobs[1:]):
            found = {token: getattr(logprob, "logprob", logprob) for token, logprob in by_token.items()}
            assert found[ids[place + 1]] == pytest.approx(expected[place, ids[place + 1]].item(), abs=1e-4)
            assert max(found, key=found.get) == expected[place].argmax().item()  # whether it is the greedy token


def test_generation_until_a_string(llm: LLM) -> None:
    whole = llm.generate([{"prompt_token_ids": PROMPTS[0]}], SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
    assert len(whole.text) > 4
    stop = whole.text[3:5]
    params = SamplingParams(
        max_tokens=12,
        stop=[stop, "<|end|>"],
        temperature=0.0,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
    )
    until = llm.generate([TokensPrompt(prompt_token_ids=PROMPTS[0])], sampling_params=[params], use_tqdm=True)
    assert until[0].outputs[0].text == whole.text[: whole.text.index(stop)]


def test_what_it_asks_about_the_model_and_the_tokenizer(llm: LLM, text_model: Path) -> None:
    assert llm.llm_engine.model_config.max_model_len == 320
    tokenizer = get_tokenizer(str(text_model), tokenizer_mode="auto", trust_remote_code=False, revision=None)
    assert tokenizer.name_or_path == str(text_model) and tokenizer.eos_token == "<|end|>"
    assert tokenizer.decode(tokenizer.eos_token_id) == "<|end|>" and tokenizer.bos_token_id is None
    config = llm.llm_engine.model_config
    assert resolve_chat_template(tokenizer=tokenizer, chat_template=None, tools=None, model_config=config) is None
    tokenizer.chat_template = "{{ messages }}"
    assert resolve_chat_template(tokenizer, None, None, model_config=config) == "{{ messages }}"
    with pytest.raises(ValueError, match="tokenizer_mode='mistral'"):
        get_tokenizer(str(text_model), tokenizer_mode="mistral")
