"""Where the server is in its life: one enum, one table, and the stage of starting that probes report.

Knows nothing of HTTP, models or tokens.  ``to`` runs on the event-loop thread; ``stage`` may be called by any thread.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Status(enum.Enum):
    """What the server can do now."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"
    STOPPED = "stopped"


_NEXT: dict[Status, frozenset[Status]] = {
    Status.STARTING: frozenset({Status.READY, Status.DRAINING, Status.DEAD, Status.STOPPED}),
    Status.READY: frozenset({Status.DRAINING, Status.DEAD}),
    Status.DRAINING: frozenset({Status.STOPPED, Status.DEAD}),
    Status.DEAD: frozenset({Status.STOPPED}),
    Status.STOPPED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """What STARTING is busy with.  share: how much of it is done, in [0, 1], or None when nobody knows."""

    phase: str = "starting"
    share: float | None = None


class Lifecycle:
    """The status and, while STARTING, its stage."""

    def __init__(self) -> None:
        self._status = Status.STARTING
        self._stage = Stage()

    @property
    def status(self) -> Status:
        """The status now."""
        return self._status

    @property
    def stage(self) -> Stage:
        """The last stage reported; of interest while STARTING."""
        return self._stage

    @property
    def phase(self) -> str:
        """One word for probes: the stage's phase while STARTING, else the status."""
        return self._stage.phase if self._status is Status.STARTING else self._status.value

    def report(self, phase: str, share: float | None = None) -> None:
        """Say what starting is busy with.  Any thread: one reference is replaced."""
        self._stage = Stage(phase, share)

    def to(self, status: Status) -> None:
        """Move on.  Raises RuntimeError for a move that the table does not list."""
        if status not in _NEXT[self._status]:
            raise RuntimeError(f"the server cannot go from {self._status.value} to {status.value}")
        self._status = status

    def can(self, status: Status) -> bool:
        """Whether ``to(status)`` would succeed."""
        return status in _NEXT[self._status]
