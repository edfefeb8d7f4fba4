"""EngineLoop: the engine thread (G) from its first to its last instruction.

Drains the inbox, lets the scheduler plan, launches, waits, commits and publishes; parks when nothing lives.  Owns the
order of these acts and the end of the thread.  What a step means is the scheduler's, what it computes the runner's.
A request's own failure comes back as an error in Results and ends that request alone; anything raised here ends the
engine, once, through ``died``.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from vserve.engine.collector import Collector
from vserve.engine.inbox import Inbox
from vserve.engine.request import Emit, EngineStats, GenRequest
from vserve.engine.scheduler import Scheduler
from vserve.engine.sequence import Plan, Results
from vserve.errors import EngineDied
from vserve.observe.heartbeat import Heartbeat

log = logging.getLogger(__name__)

PARK_S = 1.0
"""Longest silence of an idle engine: its heartbeat is renewed this often."""
SETTLE_S = 0.05
"""Idle time before spare work is done, so that a request right behind the last one does not wait for it."""


class Pending(Protocol):
    """A step under way."""

    def wait(self) -> Results:
        """Block until its ids are on the host.  G only; called once."""


class StepRunner(Protocol):
    """What computes steps, in the order they are launched."""

    def launch(self, plan: Plan) -> Pending:
        """Start the step.  G only."""


class EngineLoop:
    """Runs on G by ``run``; ``stop`` is for any thread.

    publish: takes what one turn produced and the stats; must not block.  died: called at most once, as the last act,
    when the loop ends for any reason but ``stop``.  depth: steps in flight, 1 or 2.  clock: time.monotonic.
    idle: work for moments when nothing lives, a little each call; False: there is none left.
    owns_gc: switch the collector off while running and collect when idle; for a process that serves and does little
    else.
    """

    def __init__(
        self,
        inbox: Inbox,
        scheduler: Scheduler,
        runner: StepRunner,
        publish: Callable[[list[Emit], EngineStats], None],
        died: Callable[[EngineDied], None],
        heartbeat: Heartbeat,
        *,
        depth: int = 1,
        idle: Callable[[], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
        owns_gc: bool = False,
    ) -> None:
        self._inbox = inbox
        self._scheduler = scheduler
        self._runner = runner
        self._publish = publish
        self._died = died
        self._heartbeat = heartbeat
        self._depth = depth
        self._idle = idle
        self._clock = clock
        self._collector = Collector() if owns_gc else None
        self._in_flight: deque[tuple[Plan, Pending]] = deque()
        self._busy_s = 0.0
        self._stopping = False

    def stop(self) -> None:
        """End the loop after the step in hand; what still lives then ends with an error.  Any thread."""
        self._stopping = True
        self._inbox.wake()

    def run(self) -> None:
        """Serve until ``stop`` or a failure.  The body of G, called once; raises only what ``died`` raises."""
        try:
            if self._collector is not None:
                self._collector.start()
            while not self._stopping:
                self._turn()
            self._close()
        except BaseException as error:
            log.exception("the engine has ended")
            self._heartbeat.ended(self._clock())
            self._inbox.seal()
            self._died(EngineDied(f"The engine has ended: {type(error).__name__}"))
        finally:
            self._heartbeat.ended(self._clock())
            if self._collector is not None:
                self._collector.end()

    def _turn(self) -> None:
        """Take what came, keep depth steps in flight, commit the oldest; or park."""
        begun_s = self._clock()
        emits = self._take(begun_s)
        if emits:
            self._publish(emits, self._scheduler.stats(self._busy_s))  # not to wait for the step below
        plan = self._scheduler.plan(begun_s)
        self._report_waiting()  # after planning, before the step: what has just been admitted waits no more
        if plan is None and not self._in_flight:
            self._park(begun_s)
            return
        self._heartbeat.step(begun_s)
        if plan is not None:
            self._in_flight.append((plan, self._runner.launch(plan)))
        if plan is None or len(self._in_flight) >= self._depth:
            self._commit()
        now_s = self._clock()
        self._busy_s += now_s - begun_s
        if self._collector is not None:
            self._collector.stepped(now_s)

    def _take(self, now_s: float) -> list[Emit]:
        """Requests, cancels and deadlines since the last turn; returns the Emits of what they ended."""
        scheduler = self._scheduler
        items = self._inbox.drain()
        ended: list[Emit | None] = []
        for item in items:
            if isinstance(item, GenRequest):
                ended.append(scheduler.add(item, now_s))
            else:
                ended.append(scheduler.cancel(item.id, item.reason, now_s))
        ended += scheduler.expire(now_s)
        return [emit for emit in ended if emit is not None]

    def _report_waiting(self) -> None:
        self._inbox.report_waiting(self._scheduler.waiting, self._scheduler.waiting_tokens)

    def _commit(self) -> None:
        plan, pending = self._in_flight.popleft()
        results = pending.wait()
        emits = self._scheduler.commit(plan, results, self._clock())
        self._publish(emits, self._scheduler.stats(self._busy_s))

    def _park(self, now_s: float) -> None:
        if self._scheduler.live:
            # plan() promises a step while anything lives and nothing is in flight; without it clients would hang
            raise RuntimeError(f"{self._scheduler.live} sequences live and no step is possible")
        self._heartbeat.idle(now_s)
        if self._idle is not None:
            self._inbox.park(SETTLE_S)  # clients often come in a row: what is between them is not idle yet
            if self._inbox.size or self._stopping or self._idle():
                return
            self._idle = None
        self._inbox.park(PARK_S)
        if self._collector is not None and not self._inbox.size and not self._stopping:
            self._collector.idle(self._clock())

    def _close(self) -> None:
        """Commit what is in flight and end what lives, so that every stream hears of it."""
        self._inbox.seal()  # before the last drain: what was accepted is in it, and nothing is accepted after it
        while self._in_flight:
            self._commit()
        now_s = self._clock()
        emits = self._take(now_s) + self._scheduler.cancel_all("The server is stopping.", now_s)
        self._report_waiting()
        self._publish(emits, self._scheduler.stats(self._busy_s))
