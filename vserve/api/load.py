"""How busy the engine has been lately and how much it got done, from the counters it publishes with each step.

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
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens a second, means over the window."""

    prompt: float
    generation: float


class Usage:
    """Share of time busy and requests finished a second, over about the last WINDOW_S seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds, monotonic."""
        self._clock = clock
        self._samples: deque[_Sample] = deque([_Sample(clock(), EngineStats())], maxlen=int(WINDOW_S / SAMPLE_S) + 2)
        self._last = EngineStats()
        self._last_s = clock()

    def observe(self, stats: EngineStats) -> None:
        """Take the counters of one step."""
        self._last = stats
        now = self._last_s = self._clock()
        if now - self._samples[-1].at_s >= SAMPLE_S:
            self._samples.append(_Sample(now, stats))

    def utilization(self) -> float:
        """Share of the window that the engine spent in steps, in [0, 1]."""
        base, elapsed = self._base()
        if elapsed <= 0.0:
            return 0.0
        return min(1.0, max(0.0, (self._last.busy_s_total - base.stats.busy_s_total) / elapsed))

    def throughput(self) -> Throughput:
        """Tokens of prompts computed or found cached, and tokens generated.  A prompt counts with its first token."""
        base, elapsed = self._base()
        if elapsed <= 0.0:
            return Throughput(0.0, 0.0)
        last, first = self._last, base.stats
        return Throughput(
            (last.prompt_tokens_total - first.prompt_tokens_total) / elapsed,
            (last.generated_tokens_total - first.generated_tokens_total) / elapsed,
        )

    def seconds_to_finish(self, requests: int) -> int:
        """Whole seconds in which so many requests probably finish, in [1, RETRY_LIMIT_S]."""
        base, elapsed = self._base()
        finished = self._last.finished_total - base.stats.finished_total
        if finished <= 0 or elapsed <= 0.0:
            return 1
        return max(1, min(RETRY_LIMIT_S, math.ceil(requests * elapsed / finished)))

    def _base(self) -> tuple[_Sample, float]:
        """The youngest sample at least a window old, else the oldest there is; and the seconds it stands for."""
        now = self._clock()
        if now - self._last_s >= WINDOW_S:  # what came after the last sample is no more of this window than it is
            return _Sample(now, self._last), 0.0
        base = self._samples[0]
        for sample in self._samples:
            if now - sample.at_s < WINDOW_S:
                break
            base = sample
        # A sample much older than the window means that the engine was idle since: no step, no sample.
        return base, min(now - base.at_s, WINDOW_S)
