"""The one module that both threads run: requests and cancels go down to the engine, emitted tokens come up.

Crossing 1 (L to G) hands the request object to the Inbox; crossing 2 (G to L) is one wake-up of the loop however many
steps have been published since: when the loop is behind, it drains them all at once and merges each stream's tokens
into one push, so the backlog is bounded by the number of live streams, not by time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vserve.engine.inbox import Inbox
from vserve.engine.request import Cancel, Emit, EngineStats, FinishReason, GenRequest, RequestId, Timing
from vserve.errors import EngineDied, Unavailable

log = logging.getLogger(__name__)

SLICE = 32
SLICE_S = 0.00015
"""Most streams served in one turn of the loop, and the seconds after which it takes no further one: sockets are read
between two turns, and first and last tokens cost ten times as much as others."""


class TokenSink(Protocol):
    """Where one sequence's tokens go.  Called on L only; must not block.

    A sink that raises is logged, gets ``fail`` and its sequence is cancelled; the other streams do not notice.
    """

    def push(self, emit: Emit) -> None:
        """Take the tokens since the last push; after one with finish set nothing follows."""

    def fail(self, error: EngineDied) -> None:
        """The engine is gone: this stream ends now; nothing follows."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that has ended.

    tokens: those that reached the loop before anybody cancelled it.  latency_s: from arrival to the end as the loop saw
    it.  timing: None when the engine had none to tell.
    """

    reason: FinishReason
    prompt_tokens: int
    tokens: int
    latency_s: float
    timing: Timing | None


class Meter(Protocol):
    """Measures what crosses the bridge.  Called on L only; must be quick and must not raise."""

    def step(self, stats: EngineStats) -> None:
        """A turn of the engine, each once and in order."""

    def first(self, wait_s: float, /) -> None:
        """A sequence's first tokens came so long after its arrival."""

    def gap(self, gap_s: float, /) -> None:
        """Further tokens of a sequence came so long after the ones before."""

    def ended(self, end: Ended) -> None:
        """A sequence has ended; once for each that was submitted."""


class Tracer(Protocol):
    """Follows the sequences whose requests are traced, and no others.  Called on L only; must not raise."""

    def sink(self, request: GenRequest, sink: TokenSink, queued_s: float) -> TokenSink:
        """What takes the tokens of a request, submitted at queued_s, in sink's place; it hands them on."""

    def ended(self, request_id: RequestId, end: Ended) -> None:
        """Such a sequence has ended; once for each."""


class Turns(Protocol):
    """When the loop runs long jobs.  Called on L only."""

    def soon(self, job: Callable[[], None], /) -> object:
        """Run the job in a later pass of the loop."""

    def now(self, job: Callable[[], None], /) -> object:
        """Run the job at once where no other waits, else soon."""


class _Unpaced:
    """Turns of a loop that has no other long jobs."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.soon = loop.call_soon

    def now(self, job: Callable[[], None], /) -> None:
        job()


class _Unmetered:
    """A Meter that measures nothing."""

    def step(self, stats: EngineStats) -> None: ...
    def first(self, wait_s: float, /) -> None: ...
    def gap(self, gap_s: float, /) -> None: ...
    def ended(self, end: Ended) -> None: ...


class _Stream:
    """A submitted sequence.  reason: why it was cancelled, if it was; last_s: when its last tokens came."""

    __slots__ = ("last_s", "reason", "request", "sink", "tokens")

    def __init__(self, request: GenRequest, sink: TokenSink) -> None:
        self.request = request
        self.sink = sink
        self.tokens = 0
        self.last_s: float | None = None
        self.reason: FinishReason | None = None


class Bridge:
    """Joins one event loop and one engine thread.  Thread of each method: see its docstring.

    clock: time.monotonic, the clock of the requests' arrival_s.  turns: shared with what else runs long on the loop.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        inbox: Inbox,
        clock: Callable[[], float] = time.monotonic,
        turns: Turns | None = None,
    ) -> None:
        self._loop = loop
        self._turns: Turns = turns or _Unpaced(loop)
        self._inbox = inbox
        self._clock = clock
        self._streams: dict[RequestId, _Stream] = {}
        self._leaving: dict[RequestId, _Stream] = {}  # cancelled, until the engine's last word on them
        self._published: deque[tuple[Sequence[Emit], EngineStats]] = deque()
        self._wake_pending = False  # set by G, cleared by L as the wake-up runs: at most one is ever queued
        self._ready: deque[Emit] = deque()  # the round under way: at most one a stream; a callback is due while any is
        self._death: EngineDied | None = None
        self._ids = itertools.count(1)
        self.stats = EngineStats()
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.meter: Meter = _Unmetered()
        self.tracer: Tracer | None = None

    def next_id(self) -> RequestId:
        """A fresh request id.  L only."""
        return RequestId(next(self._ids))

    @property
    def live(self) -> int:
        """Sequences submitted and not yet ended.  L only."""
        return len(self._streams)

    @property
    def death(self) -> EngineDied | None:
        """Why the engine ended, or None while it lives.  L only."""
        return self._death

    def submit(self, request: GenRequest, sink: TokenSink) -> None:
        """Queue the request; its tokens arrive at sink.push.  L only.

        Raises RateLimited (from the inbox) when the queue is full and Unavailable when the engine is gone; in both
        cases nothing was queued.
        """
        if self._death is not None:
            raise Unavailable("The engine has stopped; the server is shutting down.")
        queued_s = self._clock() if request.traced else 0.0  # now: the engine may see it before the next line
        self._inbox.put(request)
        if request.traced and self.tracer is not None:
            sink = self.tracer.sink(request, sink, queued_s)
        self._streams[request.id] = _Stream(request, sink)

    def cancel(self, request_id: RequestId, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Stop a sequence and forget its sink: nothing more is pushed to it.  L only; an ended id is ignored."""
        stream = self._streams.pop(request_id, None)
        if stream is not None and self._death is None:
            stream.reason = reason
            self._leaving[request_id] = stream
            self._inbox.put(Cancel(request_id, reason))

    def publish(self, emits: Sequence[Emit], stats: EngineStats) -> None:
        """Hand one step's tokens to the loop.  G only; never blocks."""
        self._published.append((emits, stats))
        if not self._wake_pending:
            self._wake_pending = True
            self._call(self._drain)

    def died(self, error: EngineDied) -> None:
        """The step loop has ended with error: every open and later stream fails.  G only."""
        self._call(self._die, error)

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop has closed: nobody is left to tell
            return

    def _drain(self) -> None:
        # First of all, whatever this call does: the wake-up it was is used up.  Kept standing through a round that had
        # already taken what it stood for, it would be the last one ever, since nobody sets a flag that is set.
        self._wake_pending = False
        if self._ready:
            # A round is under way; it drains when it is through.  Starting another now would queue a stream's tokens
            # step by step, and the backlog of a loop that is behind would grow instead of being merged.
            return
        self._gather()
        if self.on_stats is not None:
            try:
                self.on_stats(self.stats)
            except Exception:  # the round below would never be run, and every stream would wait for ever
                log.exception("the engine's stats could not be counted")
        if self._ready:
            self._turns.now(self._fan_out)

    def _gather(self) -> None:
        self._wake_pending = False  # before reading: a publish after this line wakes the loop again
        merged: dict[RequestId, list[Emit]] = {}
        while self._published:
            emits, self.stats = self._published.popleft()
            self.meter.step(self.stats)
            for emit in emits:
                merged.setdefault(emit.id, []).append(emit)
        self._ready.extend(parts[0] if len(parts) == 1 else merge(parts) for parts in merged.values())

    def _fan_out(self) -> None:
        ready, now_s = self._ready, self._clock()
        until_s = now_s + SLICE_S
        for _ in range(min(SLICE, len(ready))):
            self._deliver(ready.popleft(), now_s)
            now_s = self._clock()
            if now_s >= until_s:
                break
        if ready:
            self._turns.soon(self._fan_out)
        elif self._published:
            self._turns.soon(self._drain)

    def _deliver(self, emit: Emit, now_s: float) -> None:
        stream = self._streams.get(emit.id)
        if stream is None:  # cancelled, or ended by an error of its own
            if emit.finish is not None and emit.id in self._leaving:
                stream = self._leaving.pop(emit.id)
                self._trace_end(stream, self._end(stream, emit.finish, emit.timing, now_s))
            return
        if emit.ids:
            if stream.last_s is None:
                self.meter.first(now_s - stream.request.arrival_s)
            else:
                self.meter.gap(now_s - stream.last_s)
            stream.last_s = now_s
            stream.tokens += len(emit.ids)
        end: Ended | None = None
        if emit.finish is not None:
            del self._streams[emit.id]
            end = self._end(stream, emit.finish, emit.timing, now_s)
        try:
            stream.sink.push(emit)
        except Exception:
            log.exception("a stream could not take its tokens")
            self.cancel(emit.id, FinishReason.ERROR)
            _fail(stream.sink, EngineDied("An internal error ended this stream."))
        if end is not None:
            self._trace_end(stream, end)  # the last tokens are part of what is traced

    def _end(self, stream: _Stream, finish: FinishReason, timing: Timing | None, now_s: float) -> Ended:
        request, reason = stream.request, stream.reason or finish
        end = Ended(reason, len(request.prompt), stream.tokens, max(0.0, now_s - request.arrival_s), timing)
        self.meter.ended(end)
        return end

    def _trace_end(self, stream: _Stream, end: Ended) -> None:
        if stream.request.traced and self.tracer is not None:
            self.tracer.ended(stream.request.id, end)

    def _die(self, error: EngineDied) -> None:
        self._death = error
        now_s = self._clock()
        while self._published or self._ready:  # what was computed before the end still reaches its clients
            while self._ready:
                self._deliver(self._ready.popleft(), now_s)
            self._gather()
        streams, leaving = list(self._streams.values()), list(self._leaving.values())
        self._streams.clear()
        self._leaving.clear()
        for stream in (*streams, *leaving):
            self._trace_end(stream, self._end(stream, FinishReason.ERROR, None, now_s))
        for stream in streams:
            _fail(stream.sink, error)


def _fail(sink: TokenSink, error: EngineDied) -> None:
    try:
        sink.fail(error)
    except Exception:
        log.exception("a stream could not be told of its end")


def merge(parts: Sequence[Emit]) -> Emit:
    """Emits of one sequence, oldest first, as the single Emit they add up to.  parts is not empty."""
    first, last = parts[0], parts[-1]
    logprobs = None
    if first.logprobs is not None:
        logprobs = tuple(entry for part in parts for entry in part.logprobs or ())
    return Emit(
        id=first.id,
        ids=tuple(token for part in parts for token in part.ids),
        finish=last.finish,
        stop_id=last.stop_id,
        logprobs=logprobs,
        cached_tokens=max(part.cached_tokens for part in parts),
        timing=last.timing or first.timing,
        error=last.error,
        prompt_logprobs=next((part.prompt_logprobs for part in parts if part.prompt_logprobs is not None), None),
    )
