"""The layers cut over ranks compute, put together, what the whole layer does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.norm.all_reduce import PeerBuffers, make_inboxes
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    PartialSum,
    RowParallelLinear,
)
from nanovllm.layers.packed_format import PackedFormat
from nanovllm.layers.qkv_linear import QKVParallelLinear

HIDDEN = 24
SIZES = [1, 2, 4]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load(layer: nn.Module, tensors: dict[str | int | None, torch.Tensor], leaf: str = "weight") -> None:
    """Give the layer the checkpoint's tensors; what nobody loads stays NaN."""
    param = getattr(layer, leaf)
    param.data.fill_(float("nan"))
    for shard, tensor in tensors.items():
        layer.load_shard(param, tensor, shard)


@pytest.mark.parametrize("size", SIZES)
def test_columns_of_all_ranks_are_the_whole_output(size: int) -> None:
    x, weight, bias = random(5, HIDDEN), random(16, HIDDEN, seed=1), random(16, seed=2)
    parts = []
    for rank in range(size):
        layer = ColumnParallelLinear(HIDDEN, 16, TensorParallel(rank, size), bias=True)
        load(layer, {None: weight})
        load(layer, {None: bias}, "bias")
        parts.append(layer(x))
    torch.testing.assert_close(torch.cat(parts, dim=1), F.linear(x, weight, bias))


@pytest.mark.parametrize("size", SIZES)
def test_partial_sums_of_all_rows_are_the_whole_output_and_hold_the_bias_once(size: int) -> None:
    x, weight, bias = random(5, HIDDEN), random(16, HIDDEN, seed=1), random(16, seed=2)
    total = torch.zeros(5, 16)
    for rank in range(size):
        layer = RowParallelLinear(HIDDEN, 16, TensorParallel(rank, size), bias=True)
        load(layer, {None: weight})
        load(layer, {None: bias}, "bias")
        share = HIDDEN // size
        total += layer(x[:, rank * share : (rank + 1) * share]).total()
    torch.testing.assert_close(total, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_merged_columns_keep_each_ranks_gate_beside_its_up(size: int) -> None:
    x, gate, up = random(5, HIDDEN), random(12, HIDDEN, seed=1), random(12, HIDDEN, seed=2)
    gates, ups = [], []
    for rank in range(size):
        layer = MergedColumnParallelLinear(HIDDEN, [12, 12], TensorParallel(rank, size))
        load(layer, {1: up, 0: gate})
        first, second = layer(x).chunk(2, dim=1)
        gates.append(first)
        ups.append(second)
    torch.testing.assert_close(torch.cat(gates, dim=1), F.linear(x, gate))
    torch.testing.assert_close(torch.cat(ups, dim=1), F.linear(x, up))


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "size", "kept"),
    [(4, 2, 1, 2), (4, 2, 2, 1), (8, 4, 4, 1), (8, 2, 4, 1), (4, 1, 4, 1), (6, 2, 3, 2), (12, 4, 6, 2), (24, 4, 3, 4)],
)
def test_query_heads_are_cut_and_kv_heads_cut_or_replicated(
    num_heads: int, num_kv_heads: int, size: int, kept: int
) -> None:
    head_dim = 6
    x = random(5, HIDDEN)
    tensors = {
        s: random(n * head_dim, HIDDEN, seed=i)
        for i, (s, n) in enumerate({"q": num_heads, "k": num_kv_heads, "v": num_kv_heads}.items())
    }
    whole = {s: F.linear(x, w).view(5, -1, head_dim) for s, w in tensors.items()}
    for rank in range(size):
        layer = QKVParallelLinear(HIDDEN, head_dim, num_heads, num_kv_heads, TensorParallel(rank, size))
        load(layer, tensors)
        out = layer(x).view(5, -1, head_dim)
        q, k, v = out.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
        first = rank * num_heads // size
        torch.testing.assert_close(q, whole["q"][:, first : first + num_heads // size])
        assert layer.num_kv_heads == kept
        # The kv heads that this rank's query heads attend with
        kv = [(first + head) // (num_heads // num_kv_heads) for head in range(layer.num_heads)]
        torch.testing.assert_close(k.repeat_interleave(layer.num_heads // kept, dim=1), whole["k"][:, kv])
        torch.testing.assert_close(v.repeat_interleave(layer.num_heads // kept, dim=1), whole["v"][:, kv])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab_size", [20, 21, 22, 9])
def test_embeddings_and_logits_of_all_ranks_are_the_whole(vocab_size: int, size: int) -> None:
    weight, x = random(vocab_size, HIDDEN), random(3, HIDDEN, seed=1)
    ids = torch.tensor([0, 4, 5, vocab_size - 1, 7], dtype=torch.int32)
    embedded, logits = torch.zeros(5, HIDDEN), []
    for rank in range(size):
        tp = TensorParallel(rank, size)
        embedding, head, tied = (
            cls(vocab_size, HIDDEN, tp) for cls in (VocabParallelEmbedding, ParallelLMHead, ParallelLMHead)
        )
        load(embedding, {None: weight})
        load(head, {None: weight})
        tied.tie(embedding)
        embedded += embedding(ids)
        logits.append(head(x))
        torch.testing.assert_close(tied(x), logits[-1], rtol=0, atol=0)
    torch.testing.assert_close(embedded, weight[ids.long()], rtol=0, atol=0)
    whole = torch.cat(logits, dim=1)
    torch.testing.assert_close(whole[:, :vocab_size], F.linear(x, weight))
    assert not whole[:, vocab_size:].any() and whole.shape[1] < vocab_size + size


class Gathers:
    """A group whose ranks all have the same."""

    def __init__(self, size: int) -> None:
        self.size = size

    def all_gather(self, out: torch.Tensor, part: torch.Tensor) -> None:
        out.copy_(part.repeat(self.size, 1))


def test_gathered_logits_are_the_vocabulary_without_padding() -> None:
    weight, x = random(21, HIDDEN), random(3, HIDDEN, seed=1)
    head = ParallelLMHead(21, HIDDEN, TensorParallel(1, 4, Gathers(4)))
    load(head, {None: weight})
    assert head.weight.shape == (6, HIDDEN)
    part = F.linear(x, weight[6:12])
    torch.testing.assert_close(head(x), part.repeat(1, 4)[:, :21])


@pytest.mark.parametrize("size", [3, 4, 5, 7])
def test_features_that_do_not_come_out_even_are_padded_with_what_adds_nothing(size: int) -> None:
    x, gate, up, down = random(5, HIDDEN), random(10, HIDDEN, seed=1), random(10, HIDDEN, seed=2), random(8, 10, seed=3)
    total = torch.zeros(5, 8)
    for rank in range(size):
        tp = TensorParallel(rank, size)
        gate_up, out = MergedColumnParallelLinear(HIDDEN, [10, 10], tp), RowParallelLinear(10, 8, tp)
        load(gate_up, {0: gate, 1: up})
        load(out, {None: down})
        total += out(gate_up.gate_mul(x)).total()
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


def test_heads_that_cannot_be_cut_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="num_attention_heads=6 cannot be cut"):
        QKVParallelLinear(8, 4, 6, 2, TensorParallel(0, 4))
    with pytest.raises(ValueError, match="num_attention_heads=4 must be a multiple of num_key_value_heads=3"):
        QKVParallelLinear(8, 4, 4, 3, TensorParallel(0, 4))


def test_tensor_of_another_shape_is_refused_with_both_shapes() -> None:
    layer = ColumnParallelLinear(8, 4, TensorParallel())
    with pytest.raises(ValueError, match=r"shape \[4, 7\] where the model has \[4, 8\]"):
        layer.load_shard(layer.weight, torch.zeros(4, 7), None)
    with pytest.raises(ValueError, match=r"shape \[1\]"):
        layer.load_shard(layer.weight, torch.zeros(1), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_changes_the_layout_and_not_the_layer(dtype: torch.dtype) -> None:
    weight, bias, x = random(48, 64), random(48, seed=1), random(7, 64, seed=2).to(dtype)
    layer = ColumnParallelLinear(64, 48, TensorParallel(), bias=True).to(dtype)
    layer.use_format(PackedFormat(), dtype)
    load(layer, {None: weight})
    load(layer, {None: bias}, "bias")
    plain = layer(x)
    layer.format.lay_out(layer)
    assert layer.format.is_laid_out and layer.weight is None, "not packed: this machine shows nothing"
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(layer(x), plain, rtol=tolerance, atol=tolerance)
    assert torch.equal(layer.format.hidden_tensors(layer)["weight"], weight.to(dtype))
    layer.format.undo_layout(layer)
    assert torch.equal(layer.weight, weight.to(dtype)) and torch.equal(layer(x), plain)


def test_a_sum_in_slices_is_added_up_by_whoever_consumes_it() -> None:
    """A product of few rows on a GPU comes in slices."""
    slices, residual = random(3, 5, 16), random(5, 16, seed=1)
    norm = RMSNorm(16, 1e-6)
    norm.weight.data.copy_(random(16, seed=2))
    total = PartialSum(slices, torch.float32, TensorParallel()).total()
    torch.testing.assert_close(total, slices.sum(dim=0))
    expected = norm(total, residual.clone())
    normed = norm(PartialSum(slices, torch.float32, TensorParallel()), residual.clone())
    torch.testing.assert_close(normed, expected)
    without, itself = norm(PartialSum(slices.bfloat16().float(), torch.bfloat16, TensorParallel()))
    assert without.dtype == itself.dtype == torch.bfloat16


def test_a_sum_over_peers_memory_is_added_and_normed_as_any_other() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inboxes = make_inboxes(1, 8, 16, torch.float32, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))
    stop = torch.zeros(1, dtype=torch.int32)
    stop = stop.pin_memory() if device == "cuda" else stop
    addresses = torch.tensor([inboxes.data_ptr(), stop.data_ptr()], device=device)
    turns = torch.zeros(3, dtype=torch.int32, device=device)
    peers = PeerBuffers(0, 1, 8, 16, torch.float32, inboxes, addresses, turns, stop)
    norm = RMSNorm(16, 1e-6).to(device)
    norm.weight.data.copy_(random(16, seed=3))

    def normed_and_sum(peers: PeerBuffers | None, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        layer = RowParallelLinear(HIDDEN, 16, TensorParallel(0, 1, None, peers)).to(device)
        load(layer, {None: random(16, HIDDEN, seed=1)})
        return norm(layer(random(rows, HIDDEN).to(device)), random(rows, 16, seed=2).to(device))

    for rows in (5, 9):  # the second is too large for the inboxes
        torch.testing.assert_close(normed_and_sum(peers, rows), normed_and_sum(None, rows), rtol=1e-6, atol=1e-6)
    assert turns.tolist() == [1, 1, 1], "not the first sum, or not only that, went over the inboxes"
