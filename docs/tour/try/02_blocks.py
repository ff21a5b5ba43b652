"""How does free memory become blocks, and how do two requests share one?

The arithmetic is that of `worker/memory.py`; the books are the engine's own BlockManager, with blocks of 4 tokens so
that they can be read. Expect: the second request takes over the two full blocks that it has in common with the first
and is given one of its own; the third, which differs in its first token, shares nothing although the rest is equal.
"""

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence


def sequence(name: str, tokens: list[int]) -> Sequence:
    return Sequence(name, tokens, SamplingParams(max_tokens=8), len(tokens) + 8, frozenset(), {}, seed=0)


def admit(manager: BlockManager, seq: Sequence) -> None:
    """What the scheduler does when a prompt enters: look for its prefix, give blocks, and compute all of it."""
    manager.admit(seq, manager.find_prefix(seq))
    found = seq.num_computed_tokens
    seq.num_computed_tokens = len(seq.token_ids)
    manager.publish(seq)
    print(f"{seq.request_id}: block table {seq.block_tables[0]}, {found} of {len(seq.token_ids)} tokens found")


def main() -> None:
    layers, kv_heads, head_dim, bf16 = 28, 8, 128, 2  # Qwen3-0.6B
    token_bytes = layers * 2 * kv_heads * head_dim * bf16  # a key and a value in each layer
    block_bytes = 256 * token_bytes
    print(f"a token takes {token_bytes:,} bytes, a block of 256 tokens {block_bytes:,}")
    print(f"4 GiB of free memory are {(4 << 30) // block_bytes} blocks")

    manager = BlockManager(num_blocks=8, block_size=4)
    system = [7, 7, 7, 7, 8, 8, 8, 8]  # the beginning that requests have in common: two full blocks
    first, second = sequence("first", [*system, 1, 2, 3]), sequence("second", [*system, 4, 5])
    third = sequence("third", [9, *system[1:], 1, 2, 3])
    for seq in (first, second, third):
        admit(manager, seq)
    entries = sum(len(seq.block_tables[0]) for seq in (first, second, third))
    print(f"{8 - manager.num_free_blocks} of 8 blocks are used; without sharing it would be {entries}, too many")

    manager.release(first)
    print(f"first has gone: {manager.num_free_blocks} free; second still holds the shared two")
    manager.release(second)
    print(f"second has gone too: {manager.num_free_blocks} free, the shared two among them")
    again = sequence("again", [*system, 6])
    admit(manager, again)
    stats = manager.stats
    print(f"their content was still there; in all {stats.prefix_hits} of {stats.prefix_queries} tokens were found")


if __name__ == "__main__":
    main()
