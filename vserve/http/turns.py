"""Turns: the long jobs of the event loop, one in each of its passes.

A pass runs every callback that is ready and then reads every socket that is; whatever comes meanwhile, a health probe
among it, waits for all of them.  Requests come in bursts (every stream of a round ends in one step, and its client asks
again), and a step's tokens go to every stream: as callbacks they would make one pass of many milliseconds.  Owns the
order of such jobs; knows no request.  L only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

QUICK_S = 0.00015
"""Seconds of a pass in which requests are begun: many refusals, or one half of what is let in."""

Job = Callable[[], None]


class Turns:
    """Shared by all that runs on one loop.  clock: seconds, never set back.

    Two lines, served by turns while both have somebody: what goes on (tokens on their way to clients) and what is to be
    begun (requests).  So neither a burst of requests nor a crowd of streams holds the other up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._clock = clock
        self._going: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._went = False  # the last turn was that of one that goes on
        self._due = False
        self._until_s: float | None = None  # None: in this pass nothing that was read has been begun yet

    def soon(self, job: Job) -> None:
        """Run the job, which goes on with something, in a later pass."""
        self._going.append(job)
        self._wake()

    def now(self, job: Job) -> None:
        """Run the job at once where no other waits, else soon."""
        if self._going or self._waiting:
            self._going.append(job)
        else:
            job()

    def wait(self, job: Job) -> None:
        """Run the job, which begins something, in a later pass; quick ones share one."""
        self._waiting.append(job)
        self._wake()

    def next(self, job: Job) -> None:
        """Run the second half of a job that begins something: at once where no other waits, else before its like."""
        if self._going or self._waiting:
            self._waiting.appendleft(job)
        else:
            job()

    def free(self) -> bool:
        """Whether what has just been read may be begun at once: nothing waits, and this pass has been quick."""
        if self._going or self._waiting:
            return False
        now_s = self._clock()
        if self._until_s is None:
            self._until_s = now_s + QUICK_S
            self._wake()
        return now_s < self._until_s

    def _wake(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._due, self._until_s = False, None
        going, waiting = self._going, self._waiting
        if not (going or waiting):
            return
        try:
            self._went = bool(going) and not (waiting and self._went)
            if self._went:
                going.popleft()()
                return
            until_s = self._clock() + QUICK_S
            while waiting:
                waiting.popleft()()
                if self._clock() >= until_s:
                    break
        finally:
            if going or waiting:
                self._wake()  # sockets are read in between
