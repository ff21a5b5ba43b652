"""Promises of the step's inputs, kept by the kernel (interpreted on a CPU) and the reference."""

import random
from itertools import accumulate

import pytest
import torch

from nanovllm.kernels import prepare_inputs as kernels

FUNCTIONS = [kernels.prepare_inputs_triton, kernels.prepare_inputs_reference, kernels.prepare_inputs]
POISON = -77


class Rows:
    """Row state as an engine holds it: views of one flat tensor, every row a sequence of its own length."""

    def __init__(
        self, rng: random.Random, num_rows: int, width: int, block_size: int, device: str, num_groups: int = 1
    ) -> None:
        self.block_size = block_size
        max_blocks = -(-width // block_size)
        scalars = 5  # num_computed lies among others
        sizes = [num_rows * width, num_groups * num_rows * max_blocks, num_rows * scalars]
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        self.state = torch.randint(1, 100_000, (sum(sizes),), generator=generator, dtype=torch.int32).to(device)
        token_ids, block_tables, other = self.state.split(sizes)
        self.token_ids = token_ids.view(num_rows, width)
        self.block_tables = block_tables.view(num_groups, num_rows, max_blocks)
        self.num_computed = other.view(num_rows, scalars)[:, 3]
        self.num_computed.copy_(torch.tensor([rng.randint(0, width // 2) for _ in range(num_rows)]))


def buffers(num_tokens: int, num_seqs: int, num_groups: int, device: str) -> kernels.StepInputs:
    """Poisoned, and longer than the step needs."""

    def full(size: int, *groups: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full((*groups, size + 3), POISON, dtype=dtype, device=device)

    slots = full(num_tokens, num_groups, dtype=torch.int64)
    return kernels.StepInputs(full(num_tokens), full(num_tokens), slots, full(num_seqs))


def expected(state: Rows, rows: list[int], query_lens: list[int]) -> tuple[list[list[int]], list[int]]:
    """(id, position, slot in each group) of each token and the length of each sequence, one at a time."""
    tokens, seq_lens = [], []
    for row, query_len in zip(rows, query_lens, strict=True):
        start = int(state.num_computed[row]) if row >= 0 else 0
        seq_lens.append(start + query_len if row >= 0 else 0)
        for position in range(start, start + query_len):
            if row < 0:
                tokens.append([0, 0, *[-1] * len(state.block_tables)])
                continue
            blocks = state.block_tables[:, row, position // state.block_size].tolist()
            slots = [block * state.block_size + position % state.block_size for block in blocks]
            tokens.append([int(state.token_ids[row, position]), position, *slots])
    return tokens, seq_lens


def assert_prepares(function, state: Rows, rows: list[int], query_lens: list[int], device: str) -> None:
    tokens, seq_lens = expected(state, rows, query_lens)
    before = state.state.clone()
    after_num_computed = state.num_computed.tolist()
    for row, query_len in zip(rows, query_lens, strict=True):
        if row >= 0:
            after_num_computed[row] += query_len
    num_groups = len(state.block_tables)
    out = buffers(len(tokens), len(rows), num_groups, device)
    query_start = torch.tensor(list(accumulate(query_lens, initial=0)), dtype=torch.int32, device=device)
    function(
        torch.tensor(rows, dtype=torch.int32, device=device),
        query_start,
        state.token_ids,
        state.num_computed,
        state.block_tables,
        state.block_size,
        out,
    )
    written = zip(out.input_ids.tolist(), out.positions.tolist(), *out.slot_mapping.tolist(), strict=True)
    assert [list(t) for t in written] == tokens + [[POISON] * (2 + num_groups)] * 3
    assert out.seq_lens.tolist() == seq_lens + [POISON] * 3
    assert state.num_computed.tolist() == after_num_computed
    state.num_computed.copy_(torch.tensor(after_num_computed))  # the only state that may have changed
    before_num_computed = before[state.num_computed.storage_offset() :: state.num_computed.stride(0)]
    before_num_computed.copy_(state.num_computed)
    assert torch.equal(before, state.state)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("block_size", [16, 48, 256])
def test_decodes_with_padding_take_the_next_token_of_their_row(function, block_size: int, device: str):
    rng = random.Random(block_size)
    state = Rows(rng, 9, 600, block_size, device)
    assert_prepares(function, state, [4, 0, 8, -1, 3, -1, -1], [1] * 7, device)
    assert_prepares(function, state, [4, 0, 8, -1, 3, -1, -1], [1] * 7, device)  # and the one after it next
    assert_prepares(function, state, [7], [1], device)
    assert_prepares(function, state, [-1], [1], device)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("block_size", [16, 48])
def test_prefill_chunks_go_on_where_their_row_stopped(function, block_size: int, device: str):
    rng = random.Random(block_size)
    state = Rows(rng, 6, 4000, block_size, device)
    assert_prepares(function, state, [5, 1, 2, 0], [1, 1, 33, 1024], device)
    assert_prepares(function, state, [1, 0, 3], [1, 35, 1025], device)
    assert_prepares(function, state, [4, 2], [2, 1], device)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_padding_may_have_no_token_or_more_than_a_row_holds(function, device: str):
    state = Rows(random.Random(0), 6, 100, 16, device)
    assert_prepares(function, state, [5, -1, 1, 2, -1, -1], [1, 1, 33, 9, 0, 1100], device)
    assert_prepares(function, state, [-1, 1, -1, -1], [1, 3, 0, 0], device)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_group_of_layers_gets_slots_of_its_own_block_table(function, device: str):
    state = Rows(random.Random(1), 6, 300, 16, device, num_groups=3)
    assert_prepares(function, state, [5, -1, 0, 2], [1, 1, 1, 1], device)
    assert_prepares(function, state, [1, -1, 4], [1, 40, 70], device)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_random_batches(function, device: str):
    rng = random.Random(0)
    for _ in range(200 if device == "cuda" else 8):
        state = Rows(rng, rng.randint(1, 40), rng.randint(40, 300), rng.choice([16, 48, 64]), device, rng.randint(1, 5))
        num_rows, width = state.token_ids.shape
        rows = rng.sample(range(num_rows), rng.randint(1, num_rows))
        if rng.random() < 0.5:
            rows += [-1] * rng.randint(0, 3)
            query_lens = [1] * len(rows)
        else:
            query_lens = [rng.randint(1, width // 2) for _ in rows]
        assert_prepares(function, state, rows, query_lens, device)
