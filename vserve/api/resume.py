"""Going on with a stream whose connection broke: a POST to its endpoint with the header Last-Event-ID.

What the client missed is worded again from the drawn tokens, as few events; then the sequences go on behind these
tokens under new request ids, queued like any other.  A connection that still receives the stream is cut.
Event-loop thread only.
"""

from __future__ import annotations

import time

from vserve.api.app import App, Served
from vserve.api.choice import Choice
from vserve.api.reply import OPENAI, Framing
from vserve.api.stream import Flow, StreamReply
from vserve.api.tracing import trace_of
from vserve.api.trail import FINISHED, Point, Trail
from vserve.bridge import Bridge
from vserve.engine.request import FinishReason
from vserve.errors import DeadlineExceeded
from vserve.http.exchange import Exchange, Response


async def resume(
    app: App, served: Served, exchange: Exchange, event_id: str, framing: Framing = OPENAI
) -> Response | None:
    """Stream what is behind that event.  Raises NotFound, BadRequest, RateLimited or DeadlineExceeded before it."""
    route = exchange.route
    endpoint = route.name if route is not None else ""
    trail, point = app.trails.find(event_id, endpoint, app.salt(exchange, None), exchange.request.body)
    if trail.reply is not None:
        trail.reply.hand_over()
    reply = ResumedReply(app, served.model.bridge, exchange, trail, point, int(event_id.rpartition(".")[2]), framing)
    reply.caller = app.caller(exchange)
    return await reply.run()


class ResumedReply(StreamReply):
    """The rest of a stream."""

    def __init__(
        self, app: App, bridge: Bridge, exchange: Exchange, trail: Trail, point: Point, event: int, framing: Framing
    ) -> None:
        now_s = time.monotonic()
        self._before = trail.choices
        self._point = point
        self._event = event
        choices = [choice.again(bridge.next_id(), now_s) for choice in trail.choices]
        super().__init__(app, bridge, exchange, trail.renew(), choices, trail.headers, framing, trail)

    def _submit(self) -> None:
        trail, point = self._trail, self._point
        assert trail is not None
        if trail.error is None:
            self._queue_unfinished()  # first: a full queue must leave the stream as it was
        self._queued = True
        self._enter()
        trail.branch(self._event)
        self._start()
        self._flow = Flow.FLOWING
        if point.tail:
            self._say(point.mark, point.tail)
        if point.ended:
            self.close()
            self._leave()
            return
        for choice in self._choices:
            self._dialect.opening(choice, self.counts)
        for choice, before in zip(self._choices, self._before, strict=True):
            self._go_over(choice, before)
        trail.choices = self._choices
        if trail.error is not None and not self._closed:
            self.close()
            self.report(trail.error)
        self._watch_deadline()

    def spent(self) -> int:
        """See Reply: the prompt and what had been drawn before were counted then."""
        return self.counts().completion - sum(before.num_tokens for before in self._before)

    def _queue_unfinished(self) -> None:
        tracing, trace = self._app.tracing, trace_of(self.exchange)
        for choice, before in zip(self._choices, self._before, strict=True):
            request = choice.request
            if request is None or before.complete:
                continue
            if request.deadline_s is not None and request.deadline_s <= time.monotonic():
                raise DeadlineExceeded("The request's deadline passed before its stream was gone on with.")
            if tracing is not None and trace is not None:
                tracing.expect(trace, request.id, len(request.prompt))
            self._queue(choice, request)

    def _go_over(self, choice: Choice, before: Choice) -> None:
        """Bring the choice to where the client stands, and say what is known of the rest."""
        seen = self._point.tokens.get(choice.index)
        piece = choice.catch_up(before, seen if seen is not None else 0, through=seen == FINISHED)
        if seen is not None:  # a dialect may keep count of what it has worded
            self._dialect.chunk(choice, piece, self.counts)
        choice.attach(self)
        if seen == FINISHED:
            self._count_down()
        elif choice.request is None:
            choice.finish = FinishReason.LENGTH
            self.finished(choice)
        else:
            choice.go_on(before)
