"""A fake engine: drains the inbox on a thread of its own and publishes tokens that it was told to say.

It has the real one's manners (deadlines, cancels, stop ids, timing, stats, heartbeat) and no model, so that the front
end can be tested, and measured, alone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vserve.bridge import Bridge
from vserve.engine.inbox import Inbox
from vserve.engine.request import (
    Cancel,
    Emit,
    EngineStats,
    FinishReason,
    GenRequest,
    RequestId,
    Timing,
    TokenLogprobs,
)
from vserve.errors import EngineDied
from vserve.observe.heartbeat import Heartbeat

Script = Callable[[GenRequest], Sequence[int]]
"""What a request is answered with: ids said over and over until something ends it."""

PARK_S = 0.2


@dataclass(slots=True)
class _Live:
    request: GenRequest
    script: Sequence[int]
    scheduled_s: float
    first_s: float = 0.0
    count: int = 0


class FakeEngine:
    """Says script(request), tokens_per_step ids each step of at least step_s seconds, to every live request.

    fail: called with each new request; the text it returns ends the request with an error.  dies_on: a request whose
    prompt holds this id ends the engine.  Cancels are put in ``cancels`` in the order in which they arrive.
    """

    def __init__(
        self,
        inbox: Inbox,
        bridge: Bridge,
        script: Script,
        *,
        tokens_per_step: int = 1,
        step_s: float = 0.0,
        heartbeat: Heartbeat | None = None,
        fail: Callable[[GenRequest], str | None] = lambda request: None,
        dies_on: int | None = None,
    ) -> None:
        self._inbox = inbox
        self._bridge = bridge
        self._script = script
        self._tokens_per_step = tokens_per_step
        self._step_s = step_s
        self._fail = fail
        self._dies_on = dies_on
        self.heartbeat = heartbeat or Heartbeat(time.monotonic())
        self.cancels: queue.SimpleQueue[Cancel] = queue.SimpleQueue()
        self.requests: list[GenRequest] = []
        self.running = threading.Event()
        self.running.set()
        self._live: dict[RequestId, _Live] = {}
        self._steps = self._generated = self._finished = 0
        self._busy_s = 0.0
        self._stopping = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping = True
        self._stop.set()
        self.running.set()
        self._inbox.wake()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopping:
            self.running.wait()
            began = time.monotonic()
            emits: list[Emit] = []
            for item in self._inbox.drain():
                if isinstance(item, Cancel):
                    self.cancels.put(item)
                    if item.id in self._live:
                        emits.append(self._end(self._live[item.id], (), item.reason, None, began))
                elif not self._add(item, began, emits):
                    self._bridge.died(EngineDied("told to"))
                    self.heartbeat.ended(began)
                    return
            for live in list(self._live.values()):
                emits.append(self._step(live))
            if emits:
                self._steps += 1
                self._busy_s += time.monotonic() - began
                self.heartbeat.step(began)
                self._bridge.publish(emits, self._stats())
                if self._step_s:
                    self._stop.wait(self._step_s)
            if not self._live:
                self.heartbeat.idle(time.monotonic())
                self._inbox.park(PARK_S)

    def _add(self, request: GenRequest, now: float, emits: list[Emit]) -> bool:
        self.requests.append(request)
        if self._dies_on is not None and self._dies_on in request.prompt:
            return False
        error = self._fail(request)
        if error is not None:
            timing = Timing(request.arrival_s, now, now, now)
            emits.append(Emit(request.id, finish=FinishReason.ERROR, timing=timing, error=error))
        else:
            self._live[request.id] = _Live(request, self._script(request), now, count=len(request.continued))
        return True

    def _step(self, live: _Live) -> Emit:
        request, script = live.request, live.script
        now = time.monotonic()
        if request.deadline_s is not None and now > request.deadline_s:
            return self._end(live, (), FinishReason.TIMEOUT, None, now)
        live.first_s = live.first_s or now
        ids: list[int] = []
        if not request.max_tokens:
            return self._end(live, (), FinishReason.LENGTH, None, now)
        for _ in range(self._tokens_per_step):
            token = script[live.count % len(script)]
            ids.append(token)
            live.count += 1
            if token in request.stop_ids and live.count > request.min_tokens:
                return self._end(live, tuple(ids), FinishReason.STOP, token, now)
            if live.count >= request.max_tokens:
                return self._end(live, tuple(ids), FinishReason.LENGTH, None, now)
        self._generated += len(ids)
        first = live.count == len(ids)
        return Emit(
            request.id,
            tuple(ids),
            logprobs=_logprobs(request, ids),
            cached_tokens=_cached(request),
            timing=self._timing(live, now) if first else None,
            prompt_logprobs=_scores(request) if first else None,
        )

    def _end(self, live: _Live, ids: tuple[int, ...], finish: FinishReason, stop_id: int | None, now: float) -> Emit:
        request = live.request
        del self._live[request.id]
        self._finished += 1
        timing = self._timing(live, now)
        scores = _scores(request) if live.count == len(ids) else None
        return Emit(
            request.id, ids, finish, stop_id, _logprobs(request, ids), _cached(request), timing, prompt_logprobs=scores
        )

    def _timing(self, live: _Live, now: float) -> Timing:
        """As the engine has it: one chunk takes the whole prompt."""
        request = live.request
        chunks = ((self._steps + 1, live.scheduled_s, 0, len(request.prompt)),) if request.traced else ()
        return Timing(request.arrival_s, live.scheduled_s, live.first_s or now, now, chunks=chunks)

    def _stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._live),
            total_blocks=100,
            free_blocks=100 - min(100, len(self._live)),
            steps_total=self._steps,
            generated_tokens_total=self._generated,
            finished_total=self._finished,
            busy_s_total=self._busy_s,
        )


def _cached(request: GenRequest) -> int:
    return len(request.prompt) // 16 * 16


def _logprobs(request: GenRequest, ids: Sequence[int]) -> tuple[TokenLogprobs, ...] | None:
    wanted = request.sampling.logprobs
    return None if wanted is None else _made_up(ids, wanted)


def _scores(request: GenRequest) -> tuple[TokenLogprobs, ...] | None:
    wanted = request.prompt_logprobs
    return None if wanted is None else _made_up(request.prompt[1:], wanted)


def _made_up(ids: Sequence[int], wanted: int) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(-0.5, 1, tuple((token + i, -0.5 - i if i < 2 else float("-inf")) for i in range(wanted)))
        for token in ids
    )
