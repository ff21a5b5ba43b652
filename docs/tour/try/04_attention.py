"""Does attention mind that its memory is in pieces?

Two sequences of 300 and 40 tokens, whose blocks lie anywhere in a cache of 32 blocks. The engine's own `prepare_inputs`
makes the slots, the keys and values are scattered there, and one query for each sequence reads them back through the
block table: whole, and in splits that are merged afterwards, as the GPU's kernel does it. Expect: the pieces change
nothing, not a bit; splits change the order of a sum, so the last bits of a float32.
"""

import torch

from nanovllm.kernels.attention.decode_splits import DecodeSplits, split_contexts
from nanovllm.kernels.attention.paged_kv import gather_kv
from nanovllm.kernels.prepare_inputs import StepInputs, prepare_inputs

LENGTHS, NUM_BLOCKS, BLOCK, KV_HEADS, DIM = [300, 40], 32, 16, 2, 64


def scatter(keys: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cache, block tables) once `keys [tokens, kv_heads, dim]` are in the cache, whose blocks are dealt in `order`."""
    tables = torch.zeros(1, len(LENGTHS), NUM_BLOCKS, dtype=torch.int32)  # [groups, rows, blocks]
    start = 0
    for row, length in enumerate(LENGTHS):
        num_blocks = -(-length // BLOCK)
        tables[0, row, :num_blocks] = order[start : start + num_blocks]
        start += num_blocks
    rows, ends = torch.arange(len(LENGTHS), dtype=torch.int32), torch.tensor([0, *LENGTHS]).cumsum(0).int()
    token_ids, computed = torch.zeros(len(LENGTHS), 512, dtype=torch.int32), torch.zeros(len(LENGTHS)).int()
    inputs = StepInputs.allocate(sum(LENGTHS), len(LENGTHS), 1, "cpu")
    prepare_inputs(rows, ends, token_ids, computed, tables, BLOCK, inputs)
    slots = inputs.slot_mapping[0]
    cache = torch.full((NUM_BLOCKS, KV_HEADS, BLOCK, DIM), float("nan"))  # what nobody stores must not be read
    cache[slots // BLOCK, :, slots % BLOCK] = keys
    return cache, tables[0]


def attend(q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(output `[kv_heads, dim]`, log of the sum of exponentials `[kv_heads]`); the keys are the values too."""
    scores = (keys @ q.unsqueeze(-1)).squeeze(-1) * DIM**-0.5  # [kv_heads, tokens]
    return (scores.softmax(-1).unsqueeze(1) @ keys).squeeze(1), scores.logsumexp(-1)


def main() -> None:
    torch.manual_seed(0)
    keys, queries = torch.randn(sum(LENGTHS), KV_HEADS, DIM), torch.randn(len(LENGTHS), KV_HEADS, DIM)
    results = []
    for name, order in ("in order", torch.arange(NUM_BLOCKS)), ("shuffled", torch.randperm(NUM_BLOCKS)):
        cache, tables = scatter(keys, order)
        print(f"blocks {name}: the second sequence's block table is {tables[1, :3].tolist()}")
        results.append([attend(q, gather_kv(cache, t, n))[0] for q, t, n in zip(queries, tables, LENGTHS, strict=True)])
    in_order, in_pieces = map(torch.stack, results)
    print(f"in pieces as in order, bit for bit: {torch.equal(in_order, in_pieces)}")

    splits = DecodeSplits.allocate(2, KV_HEADS, KV_HEADS, DIM, "cpu", target_splits=4, min_split=64)
    split_contexts(torch.tensor(LENGTHS, dtype=torch.int32), KV_HEADS, splits)
    merged, mass = torch.zeros(2, KV_HEADS, DIM), torch.zeros(2, KV_HEADS, 1)
    for seq, begin, end, *_ in splits.table.tolist():
        if seq >= 0:
            print(f"a program for each head takes sequence {seq}, tokens {begin} to {end}")
            out, lse = attend(queries[seq], gather_kv(cache, tables[seq], end, begin))
            merged[seq] += lse.exp().unsqueeze(-1) * out
            mass[seq] += lse.exp().unsqueeze(-1)
    print(f"merged splits within 1e-6 of the whole: {torch.allclose(merged / mass, in_pieces, rtol=0, atol=1e-6)}")


if __name__ == "__main__":
    main()
