"""Tracing: joins what the gate, the handlers, the bridge and the wire know of one request into one Trace.

Owns the traces under way; finished ones go to the ring and to the exporter.  Event-loop thread only.  Where nothing
traces, no request has a trace and none of this runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import orjson

from vserve.bridge import Ended, TokenSink
from vserve.engine.request import Emit, GenRequest, RequestId, Timing
from vserve.errors import EngineDied
from vserve.http.exchange import Exchange, Handler, Response
from vserve.http.site import AccessEntry
from vserve.observe.metrics import Exported, Metrics
from vserve.observe.trace import ID_CHARS, ChoiceTrace, Kept, Trace, TraceRing, parent_of

log = logging.getLogger(__name__)


class Exporter(Protocol):
    """Where finished traces are sent."""

    def offer(self, record: dict[str, object]) -> None:
        """Take the record of a trace, or drop it; never waits, never raises."""

    @property
    def figures(self) -> Exported:
        """What became of those offered so far."""


def trace_of(exchange: Exchange) -> Trace | None:
    """The trace of the exchange's request, None where it has none."""
    note = exchange.note
    return note if isinstance(note, Trace) else None


class Tracing:
    """The traces of one server; the bridge's Tracer.

    ring: None where finished traces are only exported.  exporter: None where they are only kept.
    """

    def __init__(
        self, ring: TraceRing | None, exporter: Exporter | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """clock: that of the exchanges' received_s."""
        self.ring = ring
        self._exporter = exporter
        self._clock = clock
        self._choices: dict[RequestId, tuple[Trace, ChoiceTrace | None]] = {}  # expected or under way

    def show(self, metrics: Metrics) -> None:
        """Have the counts shown there."""
        ring, exporter = self.ring, self._exporter
        if ring is not None:
            metrics.ring = lambda: ring.figures
        if exporter is not None:
            metrics.exported = lambda: exporter.figures

    def handler(self, handler: Handler, route: str) -> Handler:
        """The handler of a route whose requests are traced from now on."""

        def traced(exchange: Exchange) -> Response | Awaitable[Response | None] | None:
            head = exchange.head
            parent = parent_of(head.headers.find("traceparent"))
            exchange.note = Trace(exchange.id, route, head.method, exchange.received_s, self._clock(), parent)
            return handler(exchange)

        return traced

    def expect(self, trace: Trace, request_id: RequestId, prompt_tokens: int) -> None:
        """A sequence of that id will be submitted for the trace's request."""
        self._choices[request_id] = (trace, trace.choice(request_id, prompt_tokens))

    def sink(self, request: GenRequest, sink: TokenSink, queued_s: float) -> TokenSink:
        """See bridge.Tracer."""
        found = self._choices.get(request.id)
        if found is None:  # its exchange has ended
            return sink
        trace, choice = found
        trace.open += 1
        if choice is None:
            return sink
        choice.queued_s = queued_s
        return _TracedSink(sink, choice, self._clock)

    def ended(self, request_id: RequestId, end: Ended) -> None:
        """See bridge.Tracer."""
        found = self._choices.pop(request_id, None)
        if found is None:
            return
        trace, choice = found
        trace.open -= 1
        trace.completion_tokens += end.tokens
        if choice is not None:
            choice.ended_s = self._clock()
            choice.finish_reason = end.reason.value
            if end.timing is not None:
                _take(choice, end.timing)
        self._settle(trace)

    def exchanged(self, entry: AccessEntry) -> None:
        """An exchange has ended (the access log's hook)."""
        trace = entry.note
        if not isinstance(trace, Trace):
            return
        trace.over = True
        trace.ended_s = self._clock()
        trace.status = entry.status
        trace.bytes_written = entry.body_bytes
        trace.gone = entry.gone
        self._settle(trace)

    def _settle(self, trace: Trace) -> None:
        """Let go of a trace of which nothing more will be heard."""
        if trace.open or not trace.over:
            return
        for id in trace.expected:  # those that were never submitted
            self._choices.pop(RequestId(id), None)
        try:
            self._hand_on(trace)
        except Exception:  # the bridge serves all other streams behind this one
            log.exception("a trace could not be kept")

    def _hand_on(self, trace: Trace) -> None:
        record = trace.record()
        if self.ring is not None:
            ids = {trace.id[:ID_CHARS], trace.trace_id, *(str(choice.id) for choice in trace.choices)}
            if trace.reply_id is not None:
                ids.add(trace.reply_id)
            self.ring.add(Kept(frozenset(ids), orjson.dumps(record)))
        if self._exporter is not None and trace.sampled:
            self._exporter.offer(record)


def _take(choice: ChoiceTrace, timing: Timing) -> None:
    """What the engine has noted of the choice."""
    choice.preemptions = timing.preemptions
    choice.preempted_s = timing.preempted_s
    choice.chunks = timing.chunks
    choice.chunks_left_out = timing.chunks_left_out
    if timing.chunks:
        choice.scheduled_s = timing.scheduled_s


class _TracedSink:
    """Notes when tokens come, and hands them on."""

    __slots__ = ("_choice", "_clock", "_sink")

    def __init__(self, sink: TokenSink, choice: ChoiceTrace, clock: Callable[[], float]) -> None:
        self._sink = sink
        self._choice = choice
        self._clock = clock

    def push(self, emit: Emit) -> None:
        choice, ids = self._choice, emit.ids
        if ids:
            now_s = self._clock()
            if choice.last_s is None:
                choice.first_token_s = now_s
                choice.cached_tokens = emit.cached_tokens
            else:
                choice.gaps.add(now_s - choice.last_s)
            choice.last_s = now_s
            choice.tokens += len(ids)
        self._sink.push(emit)

    def fail(self, error: EngineDied) -> None:
        self._sink.fail(error)
