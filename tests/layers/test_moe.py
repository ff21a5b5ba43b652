"""The mixture of experts computes what transformers' blocks compute, whole or cut over ranks in either way."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.moe import MERGED, MIXTRAL_NAMES, QWEN_NAMES, Experts, SparseMoE
from nanovllm.models import loader

HIDDEN, SIZE, NUM, K = 24, 10, 7, 3  # neither 2 nor 3 ranks come out even
OF_CONFIG = {"hidden_size": HIDDEN, "num_experts_per_tok": K}
TINY = {
    **OF_CONFIG,
    "vocab_size": 19,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
}


def qwen3_moe(renormalize: bool) -> tuple[nn.Module, dict[str, Any]]:
    config = Qwen3MoeConfig(**OF_CONFIG, moe_intermediate_size=SIZE, num_experts=NUM, norm_topk_prob=renormalize)
    return Qwen3MoeSparseMoeBlock(config), {"renormalize": renormalize}


def olmoe() -> tuple[nn.Module, dict[str, Any]]:
    config = OlmoeConfig(**OF_CONFIG, intermediate_size=SIZE, num_experts=NUM, norm_topk_prob=False)
    return OlmoeSparseMoeBlock(config), {"renormalize": False}


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    config = MixtralConfig(**OF_CONFIG, intermediate_size=SIZE, num_local_experts=NUM)
    return MixtralSparseMoeBlock(config), {"names": MIXTRAL_NAMES}


def gpt_oss() -> tuple[nn.Module, dict[str, Any]]:
    config = GptOssConfig(**OF_CONFIG, intermediate_size=SIZE, num_local_experts=NUM)
    return GptOssMLP(config), {"names": MERGED, "activation": "clamped", "bias": True, "router_name": "router"}


FAMILIES = {
    "qwen3_moe": lambda: qwen3_moe(True),
    "qwen3_moe, not renormalized": lambda: qwen3_moe(False),
    "olmoe": olmoe,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
}


def checkpoint_of(block: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as they lie on disk: transformers merges those of the experts when it loads them."""
    for name, tensor in block.state_dict().items():
        if not names or not name.startswith("experts."):
            yield name, tensor
            continue
        for expert, weight in enumerate(tensor):
            if name == "experts.gate_up_proj":
                gate, up = weight.chunk(2)
                yield f"experts.{expert}.{names[0]}.weight", gate
                yield f"experts.{expert}.{names[1]}.weight", up
            else:
                yield f"experts.{expert}.{names[2]}.weight", weight


def place(layer: nn.Module, name: str) -> tuple[nn.Module, str, Any]:
    """(module, parameter, shard) of a checkpoint's tensor, as the loader finds it."""
    if name.startswith("experts."):
        leaf, shard = layer.experts.checkpoint_names[name.removeprefix("experts.")]
        return layer.experts, leaf, shard
    module, _, leaf = name.rpartition(".")
    return layer.get_submodule(module), leaf, None


def load(layer: SparseMoE, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Give the layer the checkpoint's tensors; what nobody loads stays NaN."""
    for param in layer.parameters():
        param.data.fill_(float("nan"))
    names = set()
    for name, tensor in tensors:
        module, leaf, shard = place(layer, name)
        module.load_shard(getattr(module, leaf), tensor, shard)
        names.add(name)
    assert names >= {f"experts.{name}" for name in layer.experts.checkpoint_names}


def random_block(family: str) -> tuple[nn.Module, dict[str, Any]]:
    block, options = FAMILIES[family]()
    generator = torch.Generator().manual_seed(0)
    for param in block.parameters():
        param.data.copy_(torch.randn(param.shape, generator=generator) * 0.6)
    return block.eval(), options


def x_of(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))


def expected(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        out = block(x[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


def build(options: dict[str, Any], tp: TensorParallel = TensorParallel()) -> SparseMoE:  # noqa: B008 -- frozen
    return SparseMoE(HIDDEN, SIZE, NUM, K, tp, **options)


@pytest.mark.parametrize("whole_experts", [False, True], ids=["cut experts", "whole experts"])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_partial_sums_of_all_ranks_are_transformers_block(family: str, size: int, whole_experts: bool) -> None:
    block, options = random_block(family)
    tensors = list(checkpoint_of(block, options.get("names", QWEN_NAMES)))
    for num_tokens in (0, 1, 5, 40):
        x, total = x_of(num_tokens), torch.zeros(num_tokens, HIDDEN)
        for rank in range(size):
            layer = build(options, TensorParallel(rank, size, whole_experts=whole_experts))
            load(layer, iter(tensors))
            total += layer(x).total()
        torch.testing.assert_close(total, expected(block, x), rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU runs no kernels here: tests/kernels/moe does")
@pytest.mark.parametrize("whole_experts", [False, True], ids=["cut experts", "whole experts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_computes_what_a_cpu_computes(family: str, whole_experts: bool) -> None:
    block, options = random_block(family)
    for rank in range(2):
        layer = build(options, TensorParallel(rank, 2, whole_experts=whole_experts))
        load(layer, checkpoint_of(block, options.get("names", QWEN_NAMES)))
        for num_tokens in (1, 5, 300):
            x = x_of(num_tokens)
            want = layer.cpu()(x).partial
            torch.testing.assert_close(layer.cuda()(x.cuda()).partial.cpu(), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_come_back_bit_for_bit(family: str) -> None:
    block, options = random_block(family)
    layer = build(options)
    load(layer, checkpoint_of(block, options.get("names", QWEN_NAMES)))
    experts, x = layer.experts, x_of(6)
    before = {name: param.clone() for name, param in experts.named_parameters()}
    out = layer(x).total()
    experts.use_packed_format(torch.float32)
    experts.format.lay_out(experts)
    if not experts.format.is_laid_out:
        pytest.skip("this CPU packs no float32")
    assert experts.gate_up is None and experts.down is None, "the weights are there twice"
    experts.format.lay_out(experts)
    torch.testing.assert_close(layer(x).total(), out, rtol=1e-5, atol=1e-5)
    hidden = experts.format.hidden_tensors(experts)
    assert all(torch.equal(hidden[name], before[name]) for name in ("gate_up", "down"))
    experts.format.undo_layout(experts)
    assert not experts.format.is_laid_out and not experts.format.hidden_tensors(experts)
    assert all(torch.equal(param, before[name]) for name, param in experts.named_parameters())
    experts.format.lay_out(experts)
    experts.format.drop(experts)
    assert {name: param.shape for name, param in experts.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert experts.gate_up.is_meta and not experts.format.is_laid_out


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_tensor_of_a_wrong_shape_is_refused_by_every_rank(family: str) -> None:
    block, options = random_block(family)
    for rank in range(2):
        layer = build(options, TensorParallel(rank, 2, whole_experts=True))
        for name, tensor in checkpoint_of(block, options["names"]):
            module, leaf, shard = place(layer, name)
            for wrong in (tensor[..., :-1], tensor[None]):
                with pytest.raises(ValueError, match=r"shape \[.*\] where the model has \["):
                    module.load_shard(getattr(module, leaf), wrong, shard)


def test_a_token_of_nans_hurts_no_other() -> None:
    block, options = random_block("qwen3_moe")
    layer = build(options)
    load(layer, checkpoint_of(block, QWEN_NAMES))
    x = x_of(5)
    want = layer(x).total()
    x[2] = float("nan")
    out = layer(x).total()
    assert out[2].isnan().all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(out[others], want[others])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build({"names": QWEN_NAMES, "bias": True}), "bias=True"),
        (lambda: SparseMoE(8, 4, 4, 5, TensorParallel()), r"num_experts_per_tok=5 must be in \[1, 4\]"),
    ],
)
def test_impossible_experts_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_ranks_have_all_experts_once_and_the_last_have_fewer() -> None:
    for num, size in ((7, 3), (8, 2), (2, 3)):
        ranks = [Experts(8, 4, num, TensorParallel(rank, size, whole_experts=True)) for rank in range(size)]
        owned = [range(e.first_expert, e.first_expert + e.num_local) for e in ranks]
        assert [expert for part in owned for expert in part] == list(range(num))
        assert sorted(map(len, owned), reverse=True) == list(map(len, owned)) and len(owned[0]) - len(owned[-1]) <= 1


ON_DISK = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**TINY, moe_intermediate_size=SIZE, num_experts=NUM, norm_topk_prob=True),
        "mlp",
        {},
    ),
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig(**TINY, intermediate_size=SIZE, num_experts=NUM, norm_topk_prob=False),
        "mlp",
        {"renormalize": False},
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**TINY, intermediate_size=SIZE, num_local_experts=NUM),
        "block_sparse_moe",
        {"names": MIXTRAL_NAMES},
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig(**TINY, intermediate_size=SIZE, num_local_experts=NUM, layer_types=["full_attention"]),
        "mlp",
        {"names": MERGED, "activation": "clamped", "bias": True, "router_name": "router"},
    ),
}


class OnlyExperts(nn.Module):
    """A model of the block alone, as far as the loader looks."""

    packed_modules: dict[str, Any] = {}
    renamed: dict[str, str] = {}

    def __init__(self, config: dict[str, Any], tp: TensorParallel) -> None:
        super().__init__()
        self.lm_head = SimpleNamespace(is_tied=False)
        setattr(self, config["prefix"], SparseMoE(HIDDEN, SIZE, NUM, K, tp, **config["options"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (block,) = (module for module in self.children() if isinstance(module, SparseMoE))
        return block(x).total()


@pytest.mark.parametrize("whole_experts", [False, True], ids=["cut experts", "whole experts"])
@pytest.mark.parametrize("family", ON_DISK)
def test_files_as_transformers_writes_them_fill_the_block_and_fill_it_again(
    family: str, whole_experts: bool, tmp_path: Path
) -> None:
    """Through the loader: named, packed, dropped, written over while packed, each expert by its own name."""
    cls, hf_config, prefix, options = ON_DISK[family]
    torch.manual_seed(0)
    theirs = cls(hf_config).eval()
    theirs.set_experts_implementation("eager")  # the default wants sizes in multiples of 16 bytes
    block = theirs.model.layers[0].mlp
    for param in block.parameters():
        param.data.normal_(0, 0.6)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ours = {n.removeprefix("model.layers.0."): t for n, t in tensors.items() if f"layers.0.{prefix}." in n}
    x, total = x_of(11), torch.zeros(11, HIDDEN)
    config = {"prefix": prefix, "options": options}
    outline = loader.build_outline(config, OnlyExperts)
    assert set(loader.tensor_places(outline)) == ours.keys()
    for rank in range(2):
        model = loader.build_outline(config, OnlyExperts, TensorParallel(rank, 2, whole_experts=whole_experts))
        model.to_empty(device="cpu")
        with torch.inference_mode():
            loader.update_weights(model, outline, loader.checked_tensors(outline, ours.items()), set())
            loader.lay_out_weights(model)
            before = model(x)
            total += before
            some = {name: tensor for name, tensor in ours.items() if "experts" in name}
            loader.update_weights(model, outline, [(name, 2 * tensor) for name, tensor in some.items()], set())
            assert not torch.equal(model(x), before)
            loader.update_weights(model, outline, some.items(), set())
            assert torch.equal(model(x), before)
            loader.drop_weights(model)
            model.to_empty(device="cpu")
            loaded: set[str] = set()
            loader.update_weights(model, outline, ours.items(), loaded)
            loader.lay_out_weights(model)
            assert loaded == ours.keys() and torch.equal(model(x), before)
    torch.testing.assert_close(total, expected(block, x), rtol=1e-4, atol=2e-5)
