"""Records in memory: gone with the process.  Event-loop thread only."""

from __future__ import annotations

import time
from collections.abc import Callable

from vserve.store.record import Bounds, Figures, Record


class MemoryStore:
    """A Store of plain dictionaries."""

    def __init__(self, bounds: Bounds | None = None, clock: Callable[[], float] = time.time) -> None:
        """clock: seconds since the epoch."""
        self._bounds = bounds or Bounds()
        self._clock = clock
        self._running: dict[str, Record] = {}
        self._ended: dict[str, Record] = {}  # the first to have ended first
        self._bytes = 0
        self._evictions = 0

    @property
    def bounds(self) -> Bounds:
        """See Store."""
        return self._bounds

    @property
    def figures(self) -> Figures:
        """See Store."""
        return Figures(len(self._running) + len(self._ended), self._bytes, self._evictions)

    async def put(self, record: Record) -> None:
        """See Store."""
        self._drop(record.id)
        (self._running if record.status.running else self._ended)[record.id] = record
        self._bytes += record.size
        self._evict()

    async def get(self, id: str, owner: bytes) -> Record | None:
        """See Store."""
        record = self._running.get(id) or self._ended.get(id)
        return None if record is None or record.owner != owner or self._expired(record) else record

    async def delete(self, id: str, owner: bytes) -> bool:
        """See Store."""
        if await self.get(id, owner) is None:
            return False
        self._drop(id)
        return True

    def close(self) -> None:
        """See Store."""

    def _expired(self, record: Record) -> bool:
        return not record.status.running and record.created_s < self._clock() - self._bounds.age_s

    def _drop(self, id: str) -> None:
        record = self._running.pop(id, None) or self._ended.pop(id, None)
        if record is not None:
            self._bytes -= record.size

    def _evict(self) -> None:
        bounds, ended = self._bounds, self._ended
        while ended:
            oldest = next(iter(ended.values()))
            count = len(self._running) + len(ended)
            if count <= bounds.entries and self._bytes <= bounds.bytes and not self._expired(oldest):
                return
            self._drop(oldest.id)
            self._evictions += 1
