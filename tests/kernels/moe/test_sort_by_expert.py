"""Promises of the sorted order: every pair once, in a tile of its expert; tiles without work say so."""

import pytest
import torch

from nanovllm.kernels.moe import sort_by_expert as kernels

# tokens, experts, k, rows of a tile
CASES = [(1, 8, 2, 16), (5, 4, 4, 16), (40, 7, 3, 16), (30, 24, 8, 32), (3, 60, 6, 64), (300, 5, 2, 128), (9, 1, 1, 4)]


def draw(tokens: int, experts: int, k: int, device: str, kind: str = "random") -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens + experts + k)
    scores = torch.rand(tokens, experts, generator=generator)
    if kind == "skewed":  # all tokens take the same experts, and most experts are empty
        scores += torch.arange(experts)
    return scores.topk(k, dim=-1).indices.int().to(device)


@pytest.mark.parametrize("chunk", [32, 4096])
@pytest.mark.parametrize("kind", ["random", "skewed"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_order_is_the_references(case, kind: str, chunk: int, device: str, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    tokens, experts, k, rows = case
    ids = draw(tokens, experts, k, device, kind)
    first_and_number = [(0, experts), (experts // 3, experts - experts // 3), (0, (experts + 1) // 2)]
    for first, number in first_and_number:  # all experts, the last ones and the first ones
        order = kernels.sort_by_expert_triton(ids, first, number, rows)
        want = kernels.sort_by_expert_reference(ids, first, number, rows)
        assert order.experts.tolist() == want.experts.tolist()
        used = want.experts >= 0
        assert torch.equal(order.pairs[used], want.pairs[used])


def test_the_reference_has_each_pair_once_in_a_tile_of_its_expert(device: str) -> None:
    ids = draw(50, 10, 4, device)
    order = kernels.sort_by_expert_reference(ids, 2, 6, 16)
    pairs, experts = order.pairs, order.experts
    found = pairs[pairs >= 0].long()
    is_here = (ids.flatten() >= 2) & (ids.flatten() < 8)
    assert sorted(found.tolist()) == is_here.nonzero().flatten().tolist()
    for tile, expert in zip(pairs, experts.tolist(), strict=True):
        assert (ids.flatten()[tile[tile >= 0].long()] - 2 == expert).all()


@pytest.mark.parametrize("rows", [16, 128])
def test_there_is_room_for_the_worst_case(rows: int, device: str) -> None:
    """One pair over a whole tile for each expert wastes the most rows."""
    experts = 5
    ids = torch.arange(experts, device=device).repeat_interleave(rows + 1).int()[:, None]
    order = kernels.sort_by_expert_triton(ids, 0, experts, rows)
    assert len(order.experts) == kernels.most_tiles(len(ids), experts, rows) == 2 * experts
    assert order.experts.tolist() == [expert for expert in range(experts) for _ in range(2)]
