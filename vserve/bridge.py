"""The one module that both threads run: requests and cancels go down to the engine, emitted tokens come up.

Crossing 1 (L to G) hands the request object to the Inbox; crossing 2 (G to L) is one wake-up of the loop however many
steps have been published since: when the loop is behind, it drains them all at once and merges each stream's tokens
into one push, so the backlog is bounded by the number of live streams, not by time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from vserve.engine.inbox import Inbox
from vserve.engine.request import Cancel, Emit, EngineStats, FinishReason, GenRequest, RequestId
from vserve.errors import EngineDied, Unavailable

log = logging.getLogger(__name__)

SLICE = 64
"""Streams served in one callback of the loop before other callbacks get a turn (keeps a callback near 1 ms)."""


class TokenSink(Protocol):
    """Where one sequence's tokens go.  Called on L only; must not block.

    A sink that raises is logged, gets ``fail`` and its sequence is cancelled; the other streams do not notice.
    """

    def push(self, emit: Emit) -> None:
        """Take the tokens since the last push; after one with finish set nothing follows."""

    def fail(self, error: EngineDied) -> None:
        """The engine is gone: this stream ends now; nothing follows."""


class Bridge:
    """Joins one event loop and one engine thread.  Thread of each method: see its docstring."""

    def __init__(self, loop: asyncio.AbstractEventLoop, inbox: Inbox) -> None:
        self._loop = loop
        self._inbox = inbox
        self._sinks: dict[RequestId, TokenSink] = {}
        self._published: deque[tuple[Sequence[Emit], EngineStats]] = deque()
        self._wake_pending = False  # set by G, cleared by L before it drains: at most one wake-up is ever queued
        self._ready: deque[Emit] = deque()  # the round under way: at most one a stream; a callback is due while any is
        self._death: EngineDied | None = None
        self._ids = itertools.count(1)
        self.stats = EngineStats()
        self.on_stats: Callable[[EngineStats], None] | None = None

    def next_id(self) -> RequestId:
        """A fresh request id.  L only."""
        return RequestId(next(self._ids))

    @property
    def live(self) -> int:
        """Sequences submitted and not yet ended.  L only."""
        return len(self._sinks)

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
        self._inbox.put(request)
        self._sinks[request.id] = sink

    def cancel(self, request_id: RequestId, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Stop a sequence and forget its sink: nothing more is pushed to it.  L only; an ended id is ignored."""
        if self._sinks.pop(request_id, None) is not None and self._death is None:
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
        self._fan_out()

    def _gather(self) -> None:
        self._wake_pending = False  # before reading: a publish after this line wakes the loop again
        merged: dict[RequestId, list[Emit]] = {}
        while self._published:
            emits, self.stats = self._published.popleft()
            for emit in emits:
                merged.setdefault(emit.id, []).append(emit)
        self._ready.extend(parts[0] if len(parts) == 1 else merge(parts) for parts in merged.values())

    def _fan_out(self) -> None:
        ready = self._ready
        for _ in range(min(SLICE, len(ready))):
            self._deliver(ready.popleft())
        if ready:
            self._loop.call_soon(self._fan_out)
        elif self._published:
            self._loop.call_soon(self._drain)

    def _deliver(self, emit: Emit) -> None:
        sink = self._sinks.get(emit.id)
        if sink is None:  # cancelled, or ended by an error of its own
            return
        if emit.finish is not None:
            del self._sinks[emit.id]
        try:
            sink.push(emit)
        except Exception:
            log.exception("a stream could not take its tokens")
            self.cancel(emit.id, FinishReason.ERROR)
            _fail(sink, EngineDied("An internal error ended this stream."))

    def _die(self, error: EngineDied) -> None:
        self._death = error
        while self._published or self._ready:  # what was computed before the end still reaches its clients
            while self._ready:
                self._deliver(self._ready.popleft())
            self._gather()
        sinks = list(self._sinks.values())
        self._sinks.clear()
        for sink in sinks:
            _fail(sink, error)


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
        timing=last.timing,
        error=last.error,
    )
