"""Watchdog: the timer that looks at the engine's heartbeat and tells people, once, when it stalls.

Owns the timer, the log lines and the dump of every thread's stack.  What a stall is, stall.py says.  L only.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import time
from collections.abc import Callable
from typing import TextIO

from vserve.observe.heartbeat import Heartbeat
from vserve.observe.stall import Seen, Sight, Stalls

log = logging.getLogger(__name__)

LOOK_S = 1.0
LOOKS_A_BOUND = 4


class Watchdog:
    """Looks at one heartbeat from ``start`` to ``stop``.

    bound_s: the longest a step may take.  out: a stream with a descriptor, for the stacks.  on_stall: called once a
    stall with one line for people, after the dump.  clock: that of the heartbeat.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        bound_s: float,
        out: TextIO,
        *,
        on_stall: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heartbeat = heartbeat
        self._out = out
        self._on_stall = on_stall
        self._clock = clock
        self._every_s = min(LOOK_S, bound_s / LOOKS_A_BOUND)
        self._stalls = Stalls(bound_s, self._every_s, clock())
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look now and then from now on.  Inside the running loop."""
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._tick)

    def stop(self) -> None:
        """Look no more.  Calling it again changes nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self.start()  # before the look, which may stop it
        self.look()

    def look(self) -> Sight:
        """Look once and say what there is to say."""
        seen = self._stalls.look(self._heartbeat, self._clock())
        if seen.sight is Sight.BEGUN:
            self._report(seen)
        elif seen.sight is Sight.OVER:
            log.warning("the engine goes on: it has shown a sign of life after its stall")
        elif seen.sight is Sight.ENDED:
            self.stop()
        return seen.sight

    def _report(self, seen: Seen) -> None:
        reason = seen.reason or "the engine hangs"
        log.error("the engine hangs: %s; the stacks of all threads follow", reason)
        self._out.flush()
        faulthandler.dump_traceback(file=self._out, all_threads=True)
        if self._on_stall is not None:
            self._on_stall(reason)
