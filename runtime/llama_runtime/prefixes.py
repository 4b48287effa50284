"""What identifies the beginning of a prompt: a hash of all its tokens up to the end of a block."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from llama_runtime.sequence import Sequence

DIGEST_BYTES = 32


def block_hashes(seq: Sequence, block_size: int) -> list[bytes]:
    """For each full block of a prompt, a hash of its tokens and of all before them.

    The first one's predecessor is a hash of the salt, so sequences of different salts have nothing
    in common. They are computed once: a prompt that waits or runs is asked about in every step.

    Args:
        seq: whose prompt; it keeps the hashes.
        block_size: tokens of a block, always the same for a sequence.

    Returns:
        The hashes in order: not to be altered.
    """
    if seq.block_hashes is None:
        digest = blake2b(seq.params.cache_salt.encode(), digest_size=DIGEST_BYTES).digest()
        hashes = list[bytes]()
        for end in range(block_size, seq.num_prompt_tokens + 1, block_size):
            tokens = array("q", seq.token_ids[end - block_size : end]).tobytes()
            digest = blake2b(digest + tokens, digest_size=DIGEST_BYTES).digest()
            hashes.append(digest)
        seq.block_hashes = hashes
    return seq.block_hashes
