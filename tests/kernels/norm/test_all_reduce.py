"""All ranks get the same sum, call after call, in any order and size; no rank waits for a dead one.

In the interpreter each rank is a process, and their inboxes lie in shared memory; on a GPU each is a stream of one
device, whose kernels run at once.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from nanovllm.kernels.norm import all_reduce
from nanovllm.kernels.norm.all_reduce import (
    PeerBuffers,
    make_inboxes,
    one_shot_add_rms_norm,
    one_shot_all_reduce,
    one_shot_all_reduce_reference,
)
from nanovllm.kernels.norm.rms_norm import add_rms_norm_reference
from nanovllm.kernels.triton_shim import tl

COLUMNS, MAX_ROWS, EPS = 40, 7, 1e-6
ROWS = [1, 7, 4, 0, 5, 2, 2]  # of each call: the inboxes of one are larger or smaller than those of the next


def inboxes(size: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    def new_empty(shape: tuple[int, ...], words: torch.dtype) -> torch.Tensor:
        made = torch.empty(shape, dtype=words, device=device)
        return made.share_memory_() if device == "cpu" else made

    return [make_inboxes(size, MAX_ROWS, COLUMNS, dtype, new_empty) for _ in range(size)]


def connect(rank: int, boxes: list[torch.Tensor], stop: torch.Tensor, dtype: torch.dtype) -> PeerBuffers:
    device = boxes[0].device
    addresses = torch.tensor([box.data_ptr() for box in (*boxes, stop)], dtype=torch.int64, device=device)
    turns = torch.zeros(3, dtype=torch.int32, device=device)  # fewer programs than rows
    return PeerBuffers(rank, len(boxes), boxes[0].shape[2], COLUMNS, dtype, boxes[rank], addresses, turns, stop)


def messages(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of each call: `[ranks, rows, columns]`, with zeros of either sign."""
    generator = torch.Generator().manual_seed(size)
    made = [torch.randn(size, rows, COLUMNS, generator=generator) for rows in ROWS]
    return [torch.where(x.abs() < 0.2, -0.0, x).to(dtype) for x in made]


def residual_and_weight(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, COLUMNS, generator=generator).to(dtype), torch.rand(COLUMNS, generator=generator).to(dtype)


def call(index: int, x: torch.Tensor, peers: PeerBuffers) -> list[torch.Tensor]:
    """Every other call also does the norm, and every fourth gets its x in slices."""
    if index % 2 == 0:
        return [one_shot_all_reduce(x, peers)]
    residual, weight = (t.to(x.device) for t in residual_and_weight(len(x), x.dtype))
    if index % 4 == 1:
        x = torch.stack([x.float() * share for share in (0.5, 0.25, 0.25)])  # exact
    return [*one_shot_add_rms_norm(x, residual, weight, EPS, peers)]


def run_rank(rank: int, boxes: list[torch.Tensor], stop: torch.Tensor, xs: list[torch.Tensor], results: Any) -> None:
    import interpreter  # noqa: F401  which mends Triton's on import

    torch.set_num_threads(1)
    peers = connect(rank, boxes, stop, xs[0].dtype)
    results[rank] = [[t.tolist() for t in call(i, x[rank].clone(), peers)] for i, x in enumerate(xs)]


def run_in_processes(boxes: list[torch.Tensor], stop: torch.Tensor, xs: list[torch.Tensor]) -> list[Any]:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(run_rank, (boxes, stop, xs, results), nprocs=len(boxes))
        return [results[rank] for rank in range(len(boxes))]


def run_in_streams(boxes: list[torch.Tensor], stop: torch.Tensor, xs: list[torch.Tensor]) -> list[Any]:
    streams = [torch.cuda.Stream() for _ in boxes]
    peers = [connect(rank, boxes, stop, xs[0].dtype) for rank in range(len(boxes))]
    copies = [[x[rank].to("cuda") for x in xs] for rank in range(len(boxes))]
    # Kernels are compiled, which may wait for the device, while no rank waits for another.
    stop.fill_(1)
    for rank in range(len(boxes)):
        for index, x in enumerate(copies[rank]):
            call(index, x.clone(), peers[rank])
    torch.cuda.synchronize()
    stop.zero_()
    for each, box in zip(peers, boxes, strict=True):
        each.turns.zero_()
        box.fill_(torch.iinfo(box.dtype).min)
    torch.cuda.synchronize()
    results: list[Any] = [[] for _ in boxes]
    for index in range(len(xs)):
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[rank].append(call(index, copies[rank][index], peers[rank]))
    torch.cuda.synchronize()
    return [[[t.tolist() for t in outs] for outs in calls] for calls in results]


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.bfloat16), (3, torch.float32)])
def test_every_rank_has_the_same_sum_in_call_after_call(size: int, dtype: torch.dtype, device: str) -> None:
    boxes, xs = inboxes(size, dtype, device), messages(size, dtype)
    stop = torch.zeros(1, dtype=torch.int32)
    stop = stop.pin_memory() if device == "cuda" else stop.share_memory_()
    run: Callable[..., list[Any]] = run_in_streams if device == "cuda" else run_in_processes
    results = run(boxes, stop, xs)
    assert all(result == results[0] for result in results)
    for index, (got, x) in enumerate(zip(results[0], xs, strict=True)):
        total = one_shot_all_reduce_reference(list(x))
        expected = [total]
        if index % 2:
            residual, weight = residual_and_weight(x.shape[1], dtype)
            expected = [*add_rms_norm_reference(total, residual, weight, EPS)]
        exact = 0.0 if size == 2 else torch.finfo(dtype).eps  # three may be added in another order
        for ours, theirs, bits in zip(got, expected, [torch.finfo(dtype).eps, exact][-len(got) :], strict=True):
            ours = torch.tensor(ours, dtype=dtype).view_as(theirs)
            torch.testing.assert_close(ours, theirs, rtol=2 * bits, atol=2 * bits)
    assert all(bool((box == torch.iinfo(box.dtype).min).all()) for box in boxes), "an inbox was not emptied"


def test_a_rank_that_is_told_to_give_up_does_not_wait(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(all_reduce, "POLLS", tl.constexpr(64))  # between two looks: 20 s in the interpreter
    boxes = inboxes(2, torch.float32, device)
    stop = torch.zeros(1, dtype=torch.int32)
    peers = connect(0, boxes, stop.pin_memory() if device == "cuda" else stop, torch.float32)
    peers.give_up()
    x = torch.full((2, COLUMNS), -0.0, device=device)
    one_shot_all_reduce(x, peers)
    if device == "cuda":
        torch.cuda.synchronize()
    sent = boxes[1][0, 0, :2].cpu()
    assert bool((sent == 0).all()), "a zero was sent that reads as nothing"


def test_messages_fit_by_their_shape() -> None:
    peers = connect(0, inboxes(2, torch.bfloat16, "cpu"), torch.zeros(1, dtype=torch.int32), torch.bfloat16)
    assert peers.fit(MAX_ROWS, COLUMNS, torch.bfloat16)
    assert not peers.fit(MAX_ROWS, COLUMNS, torch.float32)
    assert not peers.fit(MAX_ROWS, COLUMNS - 1, torch.bfloat16)
    assert not peers.fit(MAX_ROWS + 1, COLUMNS, torch.bfloat16)
