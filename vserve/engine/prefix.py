"""The prefix cache: what a full block holds, named by everything that came before it.

A block's key is a hash over its parent's key and its own tokens, and the first parent is a hash of the salt, so two
blocks have one key only when salt, all earlier tokens and their own tokens are equal.  ``block_keys`` is a pure
function on values: any thread may compute keys.  ``PrefixCache`` (G only) finds and names blocks for sequences; who
holds a block, and when a cached one is evicted, is the pool's business.

128 bits of BLAKE2b: a chance collision needs some 2**64 blocks, and finding one on purpose is as hard.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Items

from vserve.engine.pages import PagePool
from vserve.engine.sequence import Sequence

KEY_BYTES = 16
_ITEM = next(code for code in ("i", "l") if array(code).itemsize == 4)


def root_key(salt: bytes) -> bytes:
    """The parent of a sequence's first block; different salts never share a block."""
    return hashlib.blake2b(salt, digest_size=KEY_BYTES, person=b"vserve prefix").digest()


def block_keys(parent: bytes, tokens: Items[int], block_size: int) -> list[bytes]:
    """One key for each full block of tokens, in order; a rest shorter than block_size gets none.

    parent: the key of the block before tokens, or ``root_key``.  Token ids fit 32 bits.
    """
    packed = array(_ITEM, tokens)
    if sys.byteorder != "little":
        packed.byteswap()  # keys may be compared between machines one day
    raw = memoryview(packed.tobytes())
    width = 4 * block_size
    blake2b = hashlib.blake2b
    keys = []
    for start in range(0, len(tokens) // block_size * width, width):
        # The parent has a fixed length, so parent + tokens splits in one way only.
        parent = blake2b(parent + raw[start : start + width], digest_size=KEY_BYTES).digest()
        keys.append(parent)
    return keys


class PrefixCache:
    """Beginnings that sequences share, block by block.  Not enabled, it finds and names nothing.  G only."""

    def __init__(self, pool: PagePool, block_size: int, *, enabled: bool) -> None:
        self._pool = pool
        self._block_size = block_size
        self._enabled = enabled

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest cached beginning that leaves at least one token to compute; holds none of them."""
        if not self._enabled:
            return []
        found = []
        usable = (len(sequence.tokens) - 1) // self._block_size
        for key in self._keys(sequence, usable)[:usable]:
            block = self._pool.find(key)
            if block is None:
                break
            found.append(block)
        return found

    def note_full(self, sequence: Sequence, full: dict[bytes, int]) -> None:
        """Add to full (key -> block) what planned steps complete with known tokens and what has no name yet."""
        if not self._enabled:
            return
        count = min(sequence.planned, len(sequence.tokens)) // self._block_size
        if count > sequence.named:
            keys = self._keys(sequence, count)
            for place in range(sequence.named, count):
                full[keys[place]] = sequence.blocks[place]
            sequence.named = count

    def name(self, full: Mapping[bytes, int]) -> None:
        """Let later sequences find the blocks that ``note_full`` collected."""
        for key, block in full.items():
            self._pool.name(block, key)

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """At least count keys of the sequence's first blocks, all of whose tokens are known; each computed once."""
        keys, size = sequence.keys, self._block_size
        if len(keys) < count:
            parent = keys[-1] if keys else root_key(sequence.request.cache_salt)
            keys += block_keys(parent, sequence.tokens[len(keys) * size : count * size], size)
        return keys
