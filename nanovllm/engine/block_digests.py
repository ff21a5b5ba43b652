"""Names a full block by its content: a digest of its tokens and of the digest before it, so of the whole prefix."""

from array import array
from hashlib import blake2b


def extend_digests(digests: list[bytes], token_ids: list[int], block_size: int) -> None:
    """Append the digests that the full blocks of `token_ids` lack: BLAKE2b-128(parent's digest, token ids)."""
    parent = digests[-1] if digests else b""
    for start in range(len(digests) * block_size, len(token_ids) - block_size + 1, block_size):
        content = array("I", token_ids[start : start + block_size]).tobytes()
        parent = blake2b(parent + content, digest_size=16).digest()
        digests.append(parent)
