"""A reply as a stream of server-sent events.

Owns when bytes are sent: the first event, back-pressure, keep-alive comments, the last event.  What the JSON looks like
is the dialect's.  Event-loop thread only; no coroutine wakes for a token.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence

import orjson

from vserve.api.app import App
from vserve.api.choice import Choice
from vserve.api.reply import OPENAI, Dialect, Framing, Headers, Reply
from vserve.api.shapes import server_timing
from vserve.api.trail import ENDING, FINISHED, OPENING, Trail
from vserve.bridge import Bridge
from vserve.engine.request import FinishReason
from vserve.errors import ApiError, InternalError
from vserve.http import sse
from vserve.http.exchange import Exchange

log = logging.getLogger(__name__)

TIMING = "server-timing"


class Flow(enum.Enum):
    """How far a stream is: WAITING → STARTED (headers, perhaps comments) → FLOWING (events) → ENDED."""

    WAITING = enum.auto()
    STARTED = enum.auto()
    FLOWING = enum.auto()
    ENDED = enum.auto()


class StreamReply(Reply):
    """A reply sent as server-sent events.

    Headers go out with the first event or the first keep-alive comment, so that a failure before then still has its
    own status.  While the client reads too slowly, each choice gathers its text and sends it as one event afterwards.
    """

    def __init__(
        self,
        app: App,
        bridge: Bridge,
        exchange: Exchange,
        dialect: Dialect,
        choices: Sequence[Choice],
        headers: Headers,
        framing: Framing = OPENAI,
        trail: Trail | None = None,
    ) -> None:
        """trail: where events get their ids, None: they have none."""
        super().__init__(app, bridge, exchange, dialect, choices, headers)
        self._framing = framing
        self._trail = trail
        self._flow = Flow.WAITING
        self._spoke = True
        self._held: dict[Choice, None] = {}  # a set in order: choices that have something to send
        for choice in choices:
            choice.prefix, choice.suffix = dialect.affixes(choice.index)

    def _enter(self) -> None:
        super()._enter()
        self.exchange.on_writable = self._resume
        self._app.keep_alive.add(self)
        if self._trail is not None:
            self._app.trails.begin(self._trail, self)

    def text(self, choice: Choice, text: str) -> None:
        if self._flow is Flow.FLOWING and not self._held and self.exchange.writable:
            self._spoke = True
            event, trail = choice.prefix + orjson.dumps(text) + choice.suffix, self._trail
            if trail is not None:
                event = trail.stamp(choice.index << 32 | choice.num_tokens, event)
            self.exchange.write(event)
        else:
            choice.keep(text)
            self.more(choice)

    def more(self, choice: Choice) -> None:
        self._open()
        self._held[choice] = None
        self._catch_up()

    def finished(self, choice: Choice) -> None:
        self.more(choice)

    def end(self) -> None:
        self._say(ENDING, self._dialect.ending(self.counts) + self._framing.done)
        self.close()
        self._leave()

    def _leave(self) -> None:
        """The last event is written; only the times follow, for a client that takes them there."""
        self._flow = Flow.ENDED
        exchange = self.exchange
        exchange.end(self._timing(decoded=True) if exchange.takes_trailers else ())
        self._wake()

    def report(self, error: ApiError) -> None:
        if self._flow is Flow.WAITING:
            super().report(error)
            return
        if self._trail is not None:
            self._trail.error = error
        self._say(ENDING, self._framing.failure(error, self.exchange.id) + self._framing.done)
        self._leave()

    def close(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        self._app.keep_alive.discard(self)
        super().close(reason)
        if self._trail is not None:
            self._app.trails.park(self._trail, self)

    def hand_over(self) -> None:
        """See trail.Live."""
        exchange = self.exchange
        self.close()
        self._flow = Flow.ENDED
        exchange.abort()
        self._wake()

    def tick(self) -> None:
        """See keepalive.Quiet."""
        if self._spoke:
            self._spoke = False
        elif self.exchange.writable:  # a full buffer is not silence
            self._start()
            self.exchange.write(self._framing.quiet)

    def _start(self) -> None:
        if self._flow is Flow.WAITING:
            self._flow = Flow.STARTED
            headers = (*sse.HEADERS, *self._headers, *self._timing(decoded=False))
            if self.exchange.takes_trailers:
                headers = (*headers, ("trailer", TIMING))
            self.exchange.start_stream(200, sse.CONTENT_TYPE, headers)

    def _timing(self, decoded: bool) -> Headers:
        """What is known of the times of those choices that have begun."""
        timings = [choice.timing for choice in self._choices if choice.timing is not None]
        return ((TIMING, server_timing(timings, decoded)),) if timings else ()

    def _open(self) -> None:
        if self._flow is Flow.FLOWING:
            return
        self._start()
        self._flow = Flow.FLOWING
        opening = b"".join(self._dialect.opening(choice, self.counts) for choice in self._choices)
        if opening:
            self._say(OPENING, opening)

    def _say(self, mark: int, data: bytes) -> None:
        """Write one or several events."""
        self.exchange.write(data if self._trail is None else self._trail.stamp(mark, data))

    def _resume(self) -> None:
        try:
            self._catch_up()
        except Exception:  # the client would wait for ever: nothing is pushed after the last token
            log.exception("a stream could not go on")
            self.fail(InternalError("The server failed while sending the answer."))

    def _catch_up(self) -> None:
        """Send what is held, oldest first, as long as the client takes it."""
        held, exchange = self._held, self.exchange
        while held and exchange.writable:
            choice = next(iter(held))
            del held[choice]
            self._spoke = True
            through = choice.finish is not None
            said = FINISHED if through else choice.num_tokens
            self._say(choice.index << 32 | said, self._dialect.chunk(choice, choice.take(), self.counts))
            if through:
                super().finished(choice)
