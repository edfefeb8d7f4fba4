"""Stalls: when a silent heartbeat is a stall, when it begins and when it is over.

Pure: time is passed in.  Owns no timer and says nothing to anyone; watchdog.py does both.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from vserve.observe.heartbeat import Heartbeat, Phase


class Sight(enum.Enum):
    """What one look at the heartbeat saw."""

    FINE = enum.auto()
    BEGUN = enum.auto()  # seen for the first time: once a stall
    LASTS = enum.auto()
    OVER = enum.auto()  # the first sign of life after it
    ENDED = enum.auto()  # the thread has ended, which is no stall


@dataclass(frozen=True, slots=True)
class Seen:
    """One look.  age_s: seconds since the last beat.  reason: one line for people, set while a stall is seen."""

    sight: Sight
    age_s: float
    reason: str | None = None


class Stalls:
    """Judges looks that come every every_s seconds; bound_s: the longest a step may take.

    A look that comes much too late means that the whole process stood still (SIGSTOP, a paused machine): that time is
    not held against the engine.
    """

    def __init__(self, bound_s: float, every_s: float, now_s: float) -> None:
        self._bound_s = bound_s
        self._every_s = every_s
        self._looked_s = now_s
        self._lost_s = 0.0  # of the time since the last beat, what nobody could have used
        self._stalled = False

    def look(self, heartbeat: Heartbeat, now_s: float) -> Seen:
        """What is to be seen at now_s, not before the last look."""
        gap_s, self._looked_s = now_s - self._looked_s, now_s
        verdict = heartbeat.verdict(now_s)
        lost_s = gap_s - self._every_s if gap_s > 2 * self._every_s else 0.0
        if verdict.age_s >= gap_s:  # no beat since the last look
            lost_s += self._lost_s
        self._lost_s = min(lost_s, verdict.age_s)
        verdict = heartbeat.verdict(now_s, stall_bound_s=self._bound_s + self._lost_s)
        return Seen(self._judge(verdict.phase, verdict.healthy), verdict.age_s, verdict.reason)

    def _judge(self, phase: Phase, healthy: bool) -> Sight:
        if phase is Phase.ENDED:
            return Sight.ENDED
        before, self._stalled = self._stalled, not healthy
        if before:
            return Sight.OVER if healthy else Sight.LASTS
        return Sight.FINE if healthy else Sight.BEGUN
