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
from vserve.bridge import Bridge
from vserve.engine.request import FinishReason
from vserve.errors import ApiError, InternalError
from vserve.http import sse
from vserve.http.exchange import Exchange

log = logging.getLogger(__name__)


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
    ) -> None:
        super().__init__(app, bridge, exchange, dialect, choices, headers)
        self._framing = framing
        self._flow = Flow.WAITING
        self._spoke = True
        self._held: dict[Choice, None] = {}  # a set in order: choices that have something to send
        for choice in choices:
            choice.prefix, choice.suffix = dialect.affixes(choice.index)

    def _submit(self) -> None:
        self.exchange.on_writable = self._resume
        self._app.keep_alive.add(self)
        super()._submit()

    def text(self, choice: Choice, text: str) -> None:
        if self._flow is Flow.FLOWING and not self._held and self.exchange.writable:
            self._spoke = True
            self.exchange.write(choice.prefix + orjson.dumps(text) + choice.suffix)
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
        exchange = self.exchange
        exchange.write(self._dialect.ending(self.counts) + self._framing.done)
        self._flow = Flow.ENDED
        super().end()
        exchange.end()

    def report(self, error: ApiError) -> None:
        if self._flow is Flow.WAITING:
            super().report(error)
            return
        self._flow = Flow.ENDED
        self.exchange.write(self._framing.failure(error, self.exchange.id) + self._framing.done)
        self.exchange.end()
        self._wake()

    def close(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        self._app.keep_alive.discard(self)
        super().close(reason)

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
            self.exchange.start_stream(200, sse.CONTENT_TYPE, (*sse.HEADERS, *self._headers))

    def _open(self) -> None:
        if self._flow is Flow.FLOWING:
            return
        self._start()
        self._flow = Flow.FLOWING
        opening = b"".join(self._dialect.opening(choice, self.counts) for choice in self._choices)
        if opening:
            self.exchange.write(opening)

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
            exchange.write(self._dialect.chunk(choice, choice.take(), self.counts))
            if choice.finish is not None:
                super().finished(choice)
