"""How busy the engine has been lately, from the counters it publishes with each step.

Knows nothing of HTTP.  Event-loop thread only; ``observe`` runs once a step and must stay cheap.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vserve.engine.request import EngineStats

WINDOW_S = 10.0
SAMPLE_S = 0.25
RETRY_LIMIT_S = 60


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    busy_s: float
    finished: int


class Usage:
    """Share of time busy and requests finished a second, over about the last WINDOW_S seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds, monotonic."""
        self._clock = clock
        self._samples: deque[_Sample] = deque([_Sample(clock(), 0.0, 0)], maxlen=int(WINDOW_S / SAMPLE_S) + 2)
        self._last = EngineStats()

    def observe(self, stats: EngineStats) -> None:
        """Take the counters of one step."""
        self._last = stats
        now = self._clock()
        if now - self._samples[-1].at_s >= SAMPLE_S:
            self._samples.append(_Sample(now, stats.busy_s_total, stats.finished_total))

    def utilization(self) -> float:
        """Share of the window that the engine spent in steps, in [0, 1]."""
        base, elapsed = self._base()
        if elapsed <= 0.0:
            return 0.0
        return min(1.0, max(0.0, (self._last.busy_s_total - base.busy_s) / elapsed))

    def seconds_to_finish(self, requests: int) -> int:
        """Whole seconds in which so many requests probably finish, in [1, RETRY_LIMIT_S]."""
        base, elapsed = self._base()
        finished = self._last.finished_total - base.finished
        if finished <= 0 or elapsed <= 0.0:
            return 1
        return max(1, min(RETRY_LIMIT_S, math.ceil(requests * elapsed / finished)))

    def _base(self) -> tuple[_Sample, float]:
        """The youngest sample at least a window old, else the oldest there is; and the seconds it stands for."""
        now = self._clock()
        base = self._samples[0]
        for sample in self._samples:
            if now - sample.at_s < WINDOW_S:
                break
            base = sample
        # A sample much older than the window means that the engine was idle since: no step, no sample.
        return base, min(now - base.at_s, WINDOW_S)
