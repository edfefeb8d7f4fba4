"""Collector: when garbage is collected in a process that serves and does little else, so that no pause is long.

A collection holds every thread, 0.5 to 1 us for each object that it looks at.  What a request leaves behind is freed
without one, for nothing of it is in a cycle; but what the last minute's streams keep, so that they can be gone on with,
is tens of thousands of objects: 20 to 50 ms.  Owns the time of collections.  G only.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

YOUNG = 1000
"""New objects after which they are looked at, under load too: some 0.1 ms."""
OLD_S = 300.0
"""Under load without a pause, those that outlived this are looked at so often, lest cycles among them pile up."""
WHOLE_S = 60.0
"""All are looked at in idle moments, at least so far apart."""


class Collector:
    """The garbage collector in our hands from ``start`` to ``end``.

    collect, count: gc.collect and gc.get_count.  now_s everywhere: time.monotonic() seconds.
    """

    def __init__(
        self,
        collect: Callable[[int], object] = gc.collect,
        count: Callable[[], tuple[int, int, int]] = gc.get_count,
    ) -> None:
        self._collect = collect
        self._count = count
        self._was_enabled = False
        self._stepped = False  # since everything was looked at
        self._old_s: float | None = None  # when the load began, or all but the oldest were last looked at
        self._whole_s = float("-inf")

    def start(self) -> None:
        """From now on nothing is collected but here."""
        self._was_enabled = gc.isenabled()
        gc.disable()

    def stepped(self, now_s: float) -> None:
        """A step has been taken."""
        self._stepped = True
        if self._old_s is None:
            self._old_s = now_s
        if now_s - self._old_s >= OLD_S:
            self._collect(1)
            self._old_s = now_s
        elif self._count()[0] >= YOUNG:
            self._collect(0)

    def idle(self, now_s: float) -> None:
        """For a while there has been nothing to do."""
        self._old_s = None
        if self._stepped and now_s - self._whole_s >= WHOLE_S:
            self._collect(2)
            self._stepped = False
            self._whole_s = now_s

    def end(self) -> None:
        """Leave the collector as it was."""
        if self._was_enabled:
            gc.enable()
