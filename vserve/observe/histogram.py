"""Histogram: counts in fixed buckets, cheap enough for every push of every stream.

One bisect and two additions an observation; labels, locks and text are left to the scrape.  Event-loop thread only, and
so is ``snapshot``: what it returns may go to any thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""vLLM's edges."""
STEP_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 5.0, 30.0)
HTTP_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Counted:
    """A histogram at one moment.  counts: one a bound (inclusive, not cumulative), and one for all above."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    def cumulative(self) -> list[tuple[str, float]]:
        """(le, count) as Prometheus has them; the last one is +Inf and counts everything."""
        rows: list[tuple[str, float]] = []
        count = 0
        for bound, here in zip(self.bounds, self.counts, strict=False):
            count += here
            rows.append((str(float(bound)), float(count)))
        rows.append(("+Inf", float(count + self.counts[-1])))
        return rows


class Histogram:
    """bounds: upper edges, ascending."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> Counted:
        """The counts as of now."""
        return Counted(self._bounds, tuple(self._counts), self._total)
