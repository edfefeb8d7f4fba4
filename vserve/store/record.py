"""What is stored of a response, its states, the bounds of a store and what both kinds of store can do.

Plain values; the bytes of a record are whatever their writer made them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol


class Status(enum.Enum):
    """How far a response is; the words are OpenAI's."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def running(self) -> bool:
        """Whether something may still follow."""
        return bool(NEXT[self])


_ENDS = frozenset({Status.COMPLETED, Status.INCOMPLETE, Status.FAILED, Status.CANCELLED})
NEXT: dict[Status, frozenset[Status]] = {
    Status.QUEUED: _ENDS | {Status.IN_PROGRESS},
    Status.IN_PROGRESS: _ENDS,
    Status.COMPLETED: frozenset(),
    Status.INCOMPLETE: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}
"""The states that may follow each; what is not listed cannot happen."""


@dataclass(frozen=True, slots=True)
class Record:
    """One response.

    owner: whose it is; nobody else finds it.  created_s: seconds since the epoch.  document: the response as JSON.
    items: its input as JSON.  trace: what it said, in the order it was said, as JSON.
    """

    id: str
    owner: bytes
    created_s: float
    status: Status
    document: bytes
    items: bytes = b"[]"
    trace: bytes = b"[]"

    @property
    def size(self) -> int:
        """Bytes that count against a store's bound."""
        return OVERHEAD_BYTES + len(self.document) + len(self.items) + len(self.trace)


OVERHEAD_BYTES = 512
"""Counted for each record beside its content: its key, its owner and the store's own bookkeeping."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a store keeps.  A record above age_s is gone; of too many the first to have ended go first."""

    entries: int = 10_000
    bytes: int = 64 * 2**20
    age_s: float = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class Figures:
    """A store at one moment.  evictions: records dropped for a bound since the start; it only grows."""

    entries: int = 0
    bytes: int = 0
    evictions: int = 0


class StoreFailed(Exception):
    """A record could not be written or read: the disk is full, read-only or damaged.  Nothing was changed.

    The text says what happened, without a path.
    """


class Store(Protocol):
    """Where records are.  Event-loop thread only."""

    @property
    def bounds(self) -> Bounds:
        """How much is kept."""

    @property
    def figures(self) -> Figures:
        """How much there is."""

    async def put(self, record: Record) -> None:
        """Add the record or replace the one of its id, then drop what is too old or too much; never one that runs.

        Raises StoreFailed.
        """

    async def get(self, id: str, owner: bytes) -> Record | None:
        """The owner's record of that id.  Raises StoreFailed."""

    async def delete(self, id: str, owner: bytes) -> bool:
        """Remove the owner's record of that id; False when there is none.  Raises StoreFailed."""

    def close(self) -> None:
        """Let go of files, once what was asked before is done.  Nothing may be asked afterwards."""
