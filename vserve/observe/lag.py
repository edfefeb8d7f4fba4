"""Lag: how late the event loop runs a timer, sampled by one timer.

What it measures is what every stream waits beside its own work.  Event-loop thread only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

EVERY_S = 0.25


class Lag:
    """Calls observe with the seconds by which each beat was late, from ``start`` to ``stop``."""

    def __init__(self, observe: Callable[[float], None], clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds, monotonic; not the loop's own, which stands still while a callback runs."""
        self._observe = observe
        self._clock = clock
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin; called inside the running loop.  A second call changes nothing."""
        if self._timer is None:
            self._arm()

    def stop(self) -> None:
        """End; nothing is left on the loop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._due_s = self._clock() + EVERY_S
        self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._beat)

    def _beat(self) -> None:
        self._observe(max(0.0, self._clock() - self._due_s))
        self._arm()
