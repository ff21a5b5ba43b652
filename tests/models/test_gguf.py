"""GGUF files: the model, its config and its tokenizer are those from which the file was made, or an error says why not.

The files are written by `gguf_files.py` as llama.cpp's converter writes them. A real one is in `test_chat_model.py`.
"""

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from checkpoints import ROPE, SEEDS, SHAPES, Reference, make_model, random_prompts
from gguf import GGMLQuantizationType as Kind
from gguf_files import gguf_tensors, write_gguf
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import ByteLevel

from nanovllm import LLM, SamplingParams
from nanovllm.models.checkpoint_config import load_hf_config
from nanovllm.models.gguf_config import ARCHITECTURES, read_config
from nanovllm.models.gguf_file import GGUFTensor, read_gguf
from nanovllm.models.gguf_weights import read_gguf_tensors, to_torch
from nanovllm.models.model_path import resolve_model_path
from nanovllm.text.gguf_tokenizer import load_gguf_tokenizer

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 320,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 64},
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Qwen2": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "Gemma3": {"sliding_window": 64, "query_pre_attn_scalar": 32},
}


def hf_model(family: str, **changes: Any) -> Any:
    """A random model whose norms and biases are random too, so that none can be mixed up."""
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(family, family) + "Config")
    model = getattr(transformers, family + "ForCausalLM")(config(**{**SMALL, **FAMILIES[family], **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                param.add_(0.3 * torch.randn(param.shape, generator=generator))
            else:  # large enough that attention attends, and the logits differ
                param.mul_(6.0)
    return model.eval()


def has(config: dict[str, Any], expected: dict[str, Any]) -> bool:
    return {key: config.get(key) for key in expected} == expected


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", make_model(SHAPES["plain"]))


class TestConversion:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_config_and_tensors_are_those_of_the_model(self, family: str, tmp_path: Path) -> None:
        model = hf_model(family)
        path = write_gguf(tmp_path / "model.gguf", model)
        config = read_config(path)
        compared = config.keys() - {"dtype", "architectures", "eos_token_id"}
        assert {key: config[key] for key in compared} == {key: getattr(model.config, key) for key in compared}
        assert config["architectures"] == [type(model).__name__]
        model.save_pretrained(tmp_path / "saved")
        saved, read = load_file(tmp_path / "saved" / "model.safetensors"), dict(read_gguf_tensors(path))
        assert saved.keys() == read.keys()
        tolerance = 1e-6 if family == "Gemma3" else 0.0  # 1 was added and is subtracted
        for name, tensor in saved.items():
            torch.testing.assert_close(read[name], tensor, rtol=0, atol=tolerance, msg=name)

    def test_the_dtype_is_bfloat16_unless_all_is_float32(self, tmp_path: Path) -> None:
        model = make_model(SHAPES["plain"])
        kinds = {Kind.F32: "float32", Kind.F16: "bfloat16", Kind.BF16: "bfloat16", Kind.Q8_0: "bfloat16"}
        for kind, dtype in kinds.items():
            if kind is Kind.Q8_0:
                model = hf_model("Qwen3")
            assert read_config(write_gguf(tmp_path / "model.gguf", model, kind=kind))["dtype"] == dtype

    def test_rope_scaling_of_the_metadata(self, tmp_path: Path) -> None:
        def rope(metadata: dict[str, Any]) -> dict[str, Any]:
            path = write_gguf(tmp_path / "model.gguf", make_model(SHAPES["plain"]), metadata)
            return read_config(path)["rope_parameters"]

        linear = {".rope.scaling.type": "linear", ".rope.scaling.factor": 3.0}
        assert rope(linear) == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
        yarn = {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.original_context_length": 80}
        assert rope(yarn) == {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 80,
        }
        with pytest.raises(ValueError, match=r"rope.scaling.type='longrope' is not supported"):
            rope({".rope.scaling.type": "longrope"})

    def test_llama3_scaling_is_found_in_its_tensor(self, tmp_path: Path) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        llama3 = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        model = hf_model("Llama", head_dim=64, max_position_embeddings=131072, rope_parameters=llama3)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
        factors = 500000.0 ** (-torch.arange(32) / 32) / scaled
        path = tmp_path / "model.gguf"

        def write(factors: torch.Tensor) -> None:
            write_gguf(path, model, edit=lambda tensors: tensors.update({"rope_freqs.weight": factors.float().numpy()}))

        write(factors)
        found = read_config(path)["rope_parameters"]
        assert found.pop("factor") == pytest.approx(32.0, rel=1e-5) and has(llama3, found)
        assert "rope_freqs.weight" not in dict(read_gguf_tensors(path))
        write(torch.ones(32))
        assert read_config(path)["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}
        write(torch.linspace(1, 9, 32))
        with pytest.raises(ValueError, match="rope_freqs.weight"):
            read_config(path)

    def test_gemmas_windows_and_rotations(self, tmp_path: Path) -> None:
        scaling = {".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0}
        config = read_config(write_gguf(tmp_path / "model.gguf", hf_model("Gemma3"), scaling))
        assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
        assert config["rope_parameters"] == {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        }

    def test_tokens_that_end_a_text(self, tmp_path: Path) -> None:
        metadata = {
            "tokenizer.ggml.tokens": ["a", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "b"],
            "tokenizer.ggml.token_type": [1, 3, 3, 1, 1],
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.eot_token_id": 4,
        }
        path = write_gguf(tmp_path / "model.gguf", make_model(SHAPES["plain"]), metadata)
        assert read_config(path)["eos_token_id"] == [2, 4, 1]  # 3 is not a control token

    @pytest.mark.parametrize(
        ("metadata", "error"),
        [
            ({"general.architecture": "mamba"}, r"general.architecture='mamba' is not supported: .* llama, qwen2"),
            ({".attn_logit_softcapping": 50.0}, r"qwen3.attn_logit_softcapping=50.0 is not supported"),
            ({".rope.dimension_count": 8}, r"qwen3.rope.dimension_count=8, unlike head_dim=16"),
            ({".attention.value_length": 8}, r"qwen3.attention.value_length=8"),
            ({".attention.head_count_kv": [2, 1]}, r"qwen3.attention.head_count_kv=\[2, 1\]: layers of different"),
            ({".attention.head_count": 0}, r"qwen3.attention.head_count=0 must be"),
        ],
    )
    def test_what_we_lack_is_named(self, metadata: dict[str, Any], error: str, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "model.gguf", make_model(SHAPES["plain"]), metadata)
        with pytest.raises(ValueError, match=error):
            read_config(path)

    def test_every_architecture_is_tested(self) -> None:
        assert {"llama", "qwen2", "qwen3", "qwen3moe", "gemma3"} == ARCHITECTURES.keys()

    def test_unknown_tensor_is_named(self, tmp_path: Path) -> None:
        model, extra = make_model(SHAPES["plain"]), {"blk.0.ssm_a.weight": np.ones(4, np.float32)}
        path = write_gguf(tmp_path / "model.gguf", model, edit=lambda tensors: tensors.update(extra))
        with pytest.raises(ValueError, match=r"tensor 'blk.0.ssm_a.weight' is not known"):
            list(read_gguf_tensors(path))


class TestBlocks:
    @pytest.mark.parametrize("kind", [kind for kind in Kind if kind.name.startswith(("Q", "IQ", "TQ", "MXFP"))])
    def test_any_block_is_read_as_gguf_reads_it(self, kind: Kind) -> None:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        generator = np.random.default_rng(0)
        data = generator.integers(0, 60, (24, 2 * block_bytes), dtype=np.uint8)  # small bytes: no scale is NaN
        try:
            expected = gguf.dequantize(data, kind)
        except NotImplementedError:
            pytest.skip(f"gguf does not dequantize {kind.name}")
        tensor = GGUFTensor(kind.name, (24, 2 * block_size), data.reshape(-1))
        assert torch.equal(to_torch(tensor, torch.float32), torch.from_numpy(expected))
        assert torch.equal(to_torch(tensor, torch.bfloat16), torch.from_numpy(expected).bfloat16())

    @pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
    def test_quantized_weights_are_near_the_originals(self, kind: Kind, tmp_path: Path) -> None:
        model = hf_model("Llama")
        read = dict(read_gguf_tensors(write_gguf(tmp_path / "model.gguf", model, kind=kind)))
        for name, param in model.named_parameters():
            error = (read[name] - param).abs().max() / param.abs().max()
            assert error < {"4": 0.15, "5": 0.08, "8": 0.01}[kind.name[1]], name

    def test_a_large_tensor_is_read_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = np.random.default_rng(0).standard_normal((1500, 256), dtype=np.float32)
        data = gguf.quants.quantize(weights, Kind.Q4_0)
        tensor = GGUFTensor("Q4_0", (1500, 256), data.reshape(-1))
        sizes, dequantize = [], gguf.dequantize
        monkeypatch.setattr(gguf, "dequantize", lambda piece, kind: sizes.append(piece.size) or dequantize(piece, kind))
        assert torch.equal(to_torch(tensor, torch.float32), torch.from_numpy(dequantize(data, Kind.Q4_0)))
        assert len(sizes) == 3 and max(sizes) <= 131072 // 32 * 18

    @pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
    def test_numbers_stay_in_the_mapped_file(self, kind: Kind, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "model.gguf", make_model(SHAPES["plain"]), kind=kind)
        file = read_gguf(path)
        tensor = to_torch(file.tensors["token_embd.weight"], torch.float32)
        assert tensor.dtype == {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
        assert tensor.data_ptr() == file.tensors["token_embd.weight"].data.ctypes.data


class TestDamage:
    def test_file_cut_off_anywhere_is_an_os_error(self, qwen3: Path, tmp_path: Path) -> None:
        content = qwen3.read_bytes()
        for length in (0, 3, 20, 24, 40, 100, 500, 2000, 5000, len(content) // 2, len(content) - 1):
            (tmp_path / "cut.gguf").write_bytes(content[:length])
            with pytest.raises(OSError, match="cut.gguf is (not a GGUF file|damaged|cut off)"):
                read_gguf(tmp_path / "cut.gguf")

    def test_changed_bytes_raise_nothing_else(self, qwen3: Path) -> None:
        content, generator = qwen3.read_bytes(), random.Random(0)
        end_of_header = content.index(b"output_norm.weight") + 100
        for _ in range(300):
            changed = bytearray(content)
            for _ in range(generator.choice((1, 2, 4))):
                changed[generator.randrange(4, end_of_header)] = generator.choice((0, 1, 255, generator.randrange(256)))
            qwen3.write_bytes(changed)
            for read in (load_hf_config, lambda path: list(read_gguf_tensors(path))):
                with contextlib.suppress(OSError, ValueError):
                    read(qwen3)

    def test_file_of_another_kind_is_refused(self, tmp_path: Path, make_llm: Callable[..., LLM]) -> None:
        (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
        with pytest.raises(OSError, match=r"model.gguf is not a GGUF file: it begins with b'PK"):
            make_llm(tmp_path / "model.gguf")
        with pytest.raises(FileNotFoundError, match="is not a file"):
            make_llm(tmp_path / "nowhere.gguf")

    def test_unknown_version_is_refused(self, qwen3: Path) -> None:
        content = bytearray(qwen3.read_bytes())
        content[4] = 9
        qwen3.write_bytes(content)
        with pytest.raises(ValueError, match="version 0x9 of GGUF"):
            read_gguf(qwen3)

    def test_a_split_model_is_read_whole(self, qwen3: Path, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3", split_max_tensors=10)
        model = make_model(SHAPES["plain"])
        for name, tensor in gguf_tensors(model, "qwen3").items():
            writer.add_tensor(name, tensor)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        parts = sorted(tmp_path.glob("m-*.gguf"))
        assert len(parts) == 3
        whole = dict(read_gguf_tensors(qwen3))
        read = dict(read_gguf_tensors(parts[0]))
        assert read.keys() == whole.keys() and all(torch.equal(read[name], whole[name]) for name in read)
        with pytest.raises(ValueError, match="part 2 of 3: give the first part"):
            read_gguf(parts[1])
        qwen3.unlink()
        assert resolve_model_path(str(tmp_path), None) == parts[0]
        parts[2].unlink()
        with pytest.raises(FileNotFoundError, match="00003-of-00003.gguf is missing"):
            read_gguf(parts[0])


class TestEngine:
    GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
    PROMPT = random_prompts([20], seed=9)[0]

    @pytest.mark.parametrize("shape", ["plain", "gqa7-dim24-tied"])
    def test_tokens_are_those_of_the_model_in_the_file(
        self, shape: str, tmp_path: Path, make_llm: Callable[..., LLM]
    ) -> None:
        model = make_model({**SHAPES[shape], "rope_parameters": ROPE["default"]}, SEEDS.get(shape, 0))
        path = write_gguf(tmp_path / "model.gguf", model)
        model.save_pretrained(tmp_path / "saved")
        expected = Reference(tmp_path / "saved").greedy(self.PROMPT, 8)
        llm = make_llm(path)
        assert llm.generate(self.PROMPT, self.GREEDY, use_tqdm=False)[0]["token_ids"] == expected
        llm.sleep(2)
        llm.wake_up()
        llm.load_weights(read_gguf_tensors(path))
        assert llm.generate(self.PROMPT, self.GREEDY, use_tqdm=False)[0]["token_ids"] == expected

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_computes_what_transformers_does(
        self, family: str, tmp_path: Path, make_llm: Callable[..., LLM]
    ) -> None:
        model = hf_model(family)
        prompt = random_prompts([100], vocab_size=SMALL["vocab_size"])[0]  # longer than the windows
        llm = make_llm(write_gguf(tmp_path / "model.gguf", model))
        (found,) = llm.log_likelihood([prompt], use_tqdm=False)
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found.logprobs[1:]), expected, rtol=1e-4, atol=1e-4)

    def test_a_folder_with_one_file_is_that_file(self, qwen3: Path, checkpoint: Callable[..., Path]) -> None:
        assert resolve_model_path(str(qwen3.parent), None) == qwen3
        assert resolve_model_path(str(checkpoint("plain")), None) == checkpoint("plain")
        (qwen3.parent / "other.gguf").touch()
        assert resolve_model_path(str(qwen3.parent), None) == qwen3.parent
        with pytest.raises(FileNotFoundError, match=f"give one of its GGUF files, {qwen3.name}, other.gguf"):
            load_hf_config(qwen3.parent)

    def test_sharded_state_is_not_in_a_file(self, qwen3: Path, make_llm: Callable[..., LLM]) -> None:
        with pytest.raises(FileNotFoundError, match="model-rank-0-part"):
            make_llm(qwen3, load_format="sharded_state")


class TestTokenizer:
    TEXTS = (
        "Hello, world! 12345 in 2024's  summer",
        "  two  spaces\n\n\tand a tab ",
        "été ñandú 日本語 🎉 ½",
        "<|im_start|>user\nI'll say I'LL<|im_end|>",
    )

    def write(self, path: Path, **keys: Any) -> Path:
        metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        return write_gguf(path / "model.gguf", make_model(SHAPES["plain"]), metadata)

    @pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
    def test_bytes_are_merged_within_the_words_of_the_model(self, pre: str, tmp_path: Path) -> None:
        alphabet = sorted(ByteLevel.alphabet())
        merges = [("1", "2"), ("12", "3"), ("3", "4"), ("Ġ", "s"), ("Ġ", "Ġ"), ("'", "s"), ("'", "l"), ("'", "L")]
        tokens = [*alphabet, *map("".join, merges), "<|im_start|>", "<|im_end|>"]
        own = load_gguf_tokenizer(
            self.write(
                tmp_path,
                model="gpt2",
                pre=pre,
                tokens=tokens,
                token_type=[1] * (len(tokens) - 2) + [3, 3],
                merges=[" ".join(merge) for merge in merges],
                bos_token_id=len(tokens) - 2,
                eos_token_id=len(tokens) - 1,
                add_bos_token=False,
            )
        )
        assert (own.bos_token, own.eos_token, len(own)) == ("<|im_start|>", "<|im_end|>", len(tokens))
        vocab = {token: i for i, token in enumerate(tokens)}
        model = tokenizer_models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe")
        reference = Tokenizer(model)
        pieces = {
            "gpt-2": [],
            "smollm": [pre_tokenizers.Digits(individual_digits=True)],
            "llama-bpe": ["12", "345"],
            "qwen2": ["1", "2", "3", "4", "5"],
        }[pre]
        if pre in ("gpt-2", "smollm"):
            reference.pre_tokenizer = pre_tokenizers.Sequence([*pieces, ByteLevel(add_prefix_space=False)])
            reference.decoder = decoders.ByteLevel()
            reference.add_special_tokens(["<|im_start|>", "<|im_end|>"])
            assert [own(text).input_ids for text in self.TEXTS] == [reference.encode(t).ids for t in self.TEXTS]
        else:
            words = own.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12345")
            assert [word for word, _ in words] == (["123", "45"] if pre == "llama-bpe" else pieces)
        assert all(own.decode(own(text).input_ids) == text for text in self.TEXTS)

    def test_scores_are_ranks_of_merges(self, tmp_path: Path) -> None:
        words = ["▁", "h", "e", "l", "o", "▁h", "el", "lo", "▁hel", "▁hello", "  "]
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
        scores = [0.0] * 259 + [-float(i) for i in range(len(words))]
        path = self.write(
            tmp_path,
            model="llama",
            tokens=tokens,
            scores=scores,
            token_type=[2, 3, 3, *[6] * 256, *[1] * (len(words) - 1), 4],
            bos_token_id=1,
            eos_token_id=2,
            unknown_token_id=0,
        )
        own = load_gguf_tokenizer(path)
        assert own.tokenize("hello") == ["▁hello"]
        assert own("hello").input_ids == [1, tokens.index("▁hello")]
        assert own.decode(own("hello é").input_ids, skip_special_tokens=True) == "hello é"
        assert own("</s>").input_ids == [1, 2] and own.eos_token_id == 2
        no_prefix = self.write(
            tmp_path,
            model="llama",
            tokens=tokens,
            scores=scores,
            token_type=[2, 3, 3, *[6] * 256, *[1] * len(words)],
            add_space_prefix=False,
            add_bos_token=False,
        )
        assert isinstance(load_gguf_tokenizer(no_prefix).backend_tokenizer.normalizer, normalizers.Replace)
        assert load_gguf_tokenizer(no_prefix).tokenize("hello") == ["h", "el", "lo"]

    def test_thousands_of_tokens_of_their_own_take_no_time(self, tmp_path: Path) -> None:
        """Gemma 3 has 6,400: added one by one they took 20 s, for each addition looks at all before it."""
        own_tokens = [f"<unused {i}>" for i in range(5000)]
        tokens = [*sorted(ByteLevel.alphabet()), *own_tokens]
        kinds = [1] * 256 + [3, 4] * 2500
        path = self.write(tmp_path, model="gpt2", pre="gpt-2", tokens=tokens, token_type=kinds, merges=[])
        start = time.process_time()
        own = load_gguf_tokenizer(path)
        assert time.process_time() - start < 1
        ids = own("<unused 4998>a<unused 4999>").input_ids
        assert ids == [256 + 4998, tokens.index("a"), 256 + 4999]
        assert own.decode(ids, skip_special_tokens=True) == "a<unused 4999>"

    @pytest.mark.parametrize("key", ["model", "pre"])
    def test_unknown_vocabulary_is_named(self, key: str, tmp_path: Path, make_llm: Callable[..., LLM]) -> None:
        keys = {"model": "gpt2", "tokens": ["a"], "merges": ["a a"], key: "runes"}
        with pytest.raises(ValueError, match=f"tokenizer.ggml.{key}='runes' is not supported.*give LLM a tokenizer="):
            make_llm(self.write(tmp_path, **keys), skip_tokenizer_init=False)
