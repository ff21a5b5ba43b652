"""Names a full block by its content: a digest of its tokens and of the digest before it, so of the whole prefix."""

from array import array
from hashlib import blake2b

from nanovllm.engine.sequence import Sequence


def extend_digests(seq: Sequence, block_size: int) -> None:
    """Compute the digests of full blocks that `seq` lacks: BLAKE2b-128(parent's digest, token ids)."""
    parent = seq.block_digests[-1] if seq.block_digests else b""
    for start in range(len(seq.block_digests) * block_size, len(seq.token_ids) - block_size + 1, block_size):
        content = array("I", seq.token_ids[start : start + block_size]).tobytes()
        parent = blake2b(parent + content, digest_size=16).digest()
        seq.block_digests.append(parent)
