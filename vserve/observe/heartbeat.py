"""Heartbeat: what the engine thread (G) leaves behind as it goes, and how the event loop (L) reads it.

G stores one small immutable value; L loads it.  No lock: a reader sees the whole old value or the whole new one.
Knows nothing of steps or requests.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Phase(enum.Enum):
    """What G said it was doing."""

    STARTING = "starting"
    IDLE = "idle"
    STEPPING = "stepping"
    ENDED = "ended"


IDLE_SILENCE_S = 2.0
"""How long an idle thread may be silent beyond the bound of a step: it sleeps for a second between two beats."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """healthy is false when the thread has ended, or has shown no sign of life for too long while it owes one.

    phase: what it did last.  age_s: seconds since its last beat.  reason: one line for people, set when not healthy.
    """

    healthy: bool
    phase: Phase
    age_s: float
    reason: str | None = None


class Heartbeat:
    """The last beat: (phase, when).  now_s everywhere: time.monotonic() seconds."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._last = (Phase.STARTING, now_s)
        self.steps = 0

    def idle(self, now_s: float) -> None:
        """Nothing to do as of now.  G only; repeated at least every few seconds while that lasts."""
        self._last = (Phase.IDLE, now_s)

    def step(self, now_s: float) -> None:
        """A step begins.  G only."""
        self._last = (Phase.STEPPING, now_s)
        self.steps += 1

    def ended(self, now_s: float) -> None:
        """The thread runs no more steps.  G only."""
        self._last = (Phase.ENDED, now_s)

    @property
    def stepping(self) -> bool:
        """Whether a step was the last thing seen.  Any thread."""
        return self._last[0] is Phase.STEPPING

    def verdict(self, now_s: float, *, stall_bound_s: float = 60.0) -> Verdict:
        """Whether the thread is well.  Any thread.

        stall_bound_s: the longest a step may take: it must exceed the longest prefill of one step.
        STARTING is healthy here: how long loading may take is for the one who loads to judge.
        """
        phase, beat_s = self._last
        age_s = max(0.0, now_s - beat_s)
        if phase is Phase.ENDED:
            return Verdict(False, phase, age_s, "the engine has ended")
        bound_s = stall_bound_s + IDLE_SILENCE_S if phase is Phase.IDLE else stall_bound_s
        if phase is not Phase.STARTING and age_s > bound_s:
            doing = "the running step began" if phase is Phase.STEPPING else "the engine was last seen idle"
            return Verdict(False, phase, age_s, f"{doing} {age_s:.0f} s ago, the limit is {bound_s:g} s")
        return Verdict(True, phase, age_s)
