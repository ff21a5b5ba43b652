"""A weight format is a file: parameters of its own, dtypes of their own, cut over ranks, and models never know."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanovllm import LLM
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers import embed_head, linear
from nanovllm.layers.linear import ColumnParallelLinear, Linear, RowParallelLinear
from nanovllm.layers.weight_format import PlainFormat
from nanovllm.models import loader


class ScaledCodes(PlainFormat):
    """int8 codes, and a float32 scale for each output."""

    def parameters(self, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        codes, scale = torch.empty(out_features, in_features, dtype=torch.int8), torch.empty(out_features)
        return {name: nn.Parameter(x, requires_grad=False) for name, x in (("codes", codes), ("scale", scale))}

    def matmul(self, layer, x, bias, gate=None, in_slices=False):
        out = F.linear(x, (layer.codes * layer.scale[:, None]).to(x.dtype), bias)
        first, up = out.chunk(2, dim=-1)
        return F.silu(first) * up if gate else out


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.float().abs().amax(dim=1) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def test_a_formats_parameters_are_cut_over_ranks_like_a_weight() -> None:
    codes, scale = encode(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    whole = F.linear(x, codes * scale[:, None])
    columns, total = [], torch.zeros(3, 8)
    for rank in range(2):
        tp = TensorParallel(rank, 2)
        column, row = ColumnParallelLinear(12, 8, tp), RowParallelLinear(12, 8, tp)
        for layer in (column, row):
            layer.use_format(ScaledCodes(), torch.bfloat16)
            assert not hasattr(layer, "weight"), "the plain format's parameter is left"
            layer.load_shard(layer.codes, codes, None)
            layer.load_shard(layer.scale, scale, None)
        columns.append(column(x))
        total += row(x[:, 6 * rank : 6 * rank + 6]).total()
    torch.testing.assert_close(torch.cat(columns, dim=1), whole)
    torch.testing.assert_close(total, whole)


def test_a_model_in_another_format_loads_by_name_and_keeps_each_parameters_dtype(
    checkpoint: Callable[[str], Path], make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked, written in place, dropped and loaded again, in a bfloat16 model whose scales are float32."""
    plain = make_llm(checkpoint("plain"), dtype="bfloat16")
    tensors = dict(plain.engine.runner.model.named_parameters())
    source = [(name, tensor.clone()) for name, tensor in tensors.items() if tensor is not None]
    source += [
        (f"{name}.{leaf}", tensor)
        for name, layer in plain.engine.runner.model.named_modules()
        if isinstance(layer, Linear)
        for leaf, tensor in layer.format.hidden_tensors(layer).items()
    ]
    monkeypatch.setattr(linear, "PackedFormat", ScaledCodes)
    monkeypatch.setattr(embed_head, "PackedFormat", lambda has_lookups: PlainFormat())
    llm = make_llm(checkpoint("plain"), dtype="bfloat16", load_format="dummy")
    model = llm.engine.runner.model
    places = loader.tensor_places(model)
    assert "model.layers.0.self_attn.q_proj.codes" in places and "model.layers.0.self_attn.q_proj.scale" in places
    merged = {}
    for name, tensor in source:
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module) if module else model
        if isinstance(owner, Linear) and leaf == "weight" and isinstance(owner.format, ScaledCodes):
            codes, scale = encode(tensor)
            merged |= {f"{module}.codes": codes, f"{module}.scale": scale}
        else:
            merged[name] = tensor
    named = []
    for name, (module, leaf, shard) in places.items():
        whole = merged[f"{module}.{leaf}"]
        layer = model.get_submodule(module)
        if shard is not None:
            sizes = layer.shard_sizes if isinstance(layer.shard_sizes, list) else list(layer.shard_sizes.values())
            keys = range(len(sizes)) if isinstance(layer.shard_sizes, list) else list(layer.shard_sizes)
            whole = dict(zip(keys, whole.split(sizes), strict=True))[shard]
        named.append((name, whole))
    with pytest.raises(ValueError, match=r"codes' is torch.float32: weights must be int8"):
        llm.load_weights([(name, x.float()) for name, x in named])
    llm.load_weights(named)
    params = dict(model.named_parameters())
    assert params["model.layers.0.mlp.down_proj.scale"].dtype == torch.float32
    assert params["model.layers.0.mlp.down_proj.codes"].dtype == torch.int8
    assert params["model.norm.weight"].dtype == torch.bfloat16

    def hidden_states(llm: LLM) -> list[int]:
        return llm.log_likelihood([[5, 6, 7, 8, 9, 10, 11, 12]], use_tqdm=False)[0].logprobs[1:]

    before = hidden_states(llm)
    torch.testing.assert_close(before, hidden_states(plain), rtol=0.05, atol=0.1)  # codes of 8 bits
    llm.sleep(2)
    llm.wake_up()
    llm.load_weights(iter(named))
    assert hidden_states(llm) == before
