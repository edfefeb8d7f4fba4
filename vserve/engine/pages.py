"""PagePool: who holds which block of the KV cache.  Knows numbers and opaque keys; not tokens, sequences or tensors.

Every block is in exactly one of three states, and ``free + held + cached == total`` after every call:

    free     nobody holds it and its content is worth nothing
    held     one or more sequences hold it (reference count > 0); it may carry a key
    cached   nobody holds it, but its content can be found again under its key; the least recently used goes first
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class PagePool:
    """Reference-counted blocks 0 to total - 1.  G only."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"a page pool needs at least one block, got {total}")
        self.total = total
        self._holders = [0] * total
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks without content."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and that a key still finds."""
        return len(self._cached)

    @property
    def held(self) -> int:
        """Blocks that at least one sequence holds."""
        return self.total - len(self._free) - len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that ``take`` can hand out: free ones, and cached ones after eviction."""
        return len(self._free) + len(self._cached)

    def take(self, count: int) -> list[int]:
        """count blocks, each held once, content undefined.  The caller has checked ``available``; ValueError if not."""
        if count > self.available:
            raise ValueError(f"{count} blocks wanted, {self.available} available")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._holders[block] = 1
            taken.append(block)
        return taken

    def find(self, key: bytes) -> int | None:
        """The block whose content key names, or None.  Changes nothing: call ``share`` to hold it."""
        return self._block_of.get(key)

    def is_held(self, block: int) -> bool:
        """True while some sequence holds the block; False for a cached or free one."""
        return self._holders[block] > 0

    def share(self, blocks: Iterable[int]) -> None:
        """Hold each block once more.  Only for blocks that ``find`` has just returned."""
        for block in blocks:
            if not self._holders[block]:
                del self._cached[block]
            self._holders[block] += 1

    def give_back(self, blocks: Iterable[int]) -> None:
        """Drop one hold on each block; those nobody holds then become cached (if named) or free.

        Give a sequence's blocks last block first: eviction then eats its tail before the beginning that others share.
        """
        for block in blocks:
            left = self._holders[block] - 1
            if left < 0:
                raise ValueError(f"block {block} is given back but nobody holds it")
            self._holders[block] = left
            if left:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def name(self, block: int, key: bytes) -> None:
        """Let key find the held block from now on.  A key that already finds another block stays with that one."""
        if not self._holders[block]:
            raise ValueError(f"block {block} is named but nobody holds it")
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """No key finds these blocks any more: their content is not to be trusted.  Holders keep them."""
        for block in blocks:
            key = self._key_of.pop(block, None)
            if key is None:
                continue
            del self._block_of[key]
            if not self._holders[block]:
                del self._cached[block]
                self._free.append(block)

    def check(self) -> None:
        """Raise AssertionError unless every invariant of this class holds.  For tests; O(total)."""
        held = {block for block, holders in enumerate(self._holders) if holders}
        free, cached = set(self._free), set(self._cached)
        if len(self._free) != len(free) or len(held) + len(free) + len(cached) != self.total:
            raise AssertionError("a block is counted twice or lost")
        if held & free or held & cached or free & cached:
            raise AssertionError("a block is in two states")
        if {key: block for block, key in self._key_of.items()} != self._block_of:
            raise AssertionError("keys and blocks disagree")
        if not cached <= self._key_of.keys() or free & self._key_of.keys():
            raise AssertionError("a cached block without a key, or a free one with a key")
