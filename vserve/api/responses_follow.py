"""Events of a response on their way to one client: live, or told again from what was stored.

Owns where in the response one client is, back-pressure and keep-alive comments.  The events are worded by a Telling of
its own, so a slow client holds nothing but its place.  Event-loop thread only; no coroutine wakes for a token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson

from vserve.api.keepalive import KeepAlive
from vserve.api.reply import Headers
from vserve.api.responses_events import Document, Step, Telling, unpack
from vserve.api.responses_job import Follows
from vserve.http import sse
from vserve.http.exchange import Exchange
from vserve.store.record import Record

log = logging.getLogger(__name__)

SLICE = 64
"""Steps told in one callback of the loop before other callbacks get a turn (keeps a callback near 1 ms)."""


class Source(Protocol):
    """A response, finished or not."""

    @property
    def document(self) -> Document:
        """It at any time."""

    @property
    def steps(self) -> Sequence[Step]:
        """Its steps so far; they only become more."""

    @property
    def final(self) -> Document | None:
        """It in the end; None while it runs."""

    def follow(self, follower: Follows) -> None:
        """Call follower.advance at every change."""

    def unfollow(self, follower: Follows) -> None:
        """Stop that."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A finished response from the store, as a Source."""

    document: Document
    steps: Sequence[Step]

    @classmethod
    def of(cls, record: Record) -> Stored:
        return cls(orjson.loads(record.document), unpack(record.trace))

    @property
    def final(self) -> Document:
        return self.document

    def follow(self, follower: Follows) -> None:
        """Nothing changes any more."""

    def unfollow(self, follower: Follows) -> None:
        """Nothing changes any more."""


class Follower:
    """One client that reads the events of one response."""

    def __init__(
        self,
        exchange: Exchange,
        keep_alive: KeepAlive,
        source: Source,
        *,
        after: int = -1,
        headers: Headers = (),
        on_gone: Callable[[], None] | None = None,
        timing: Callable[[], Headers] | None = None,
    ) -> None:
        """after: the sequence number of the last event that the client has.  on_gone: the client left early.

        timing: the Server-Timing of the finished response, for a client that takes trailers.
        """
        self._exchange = exchange
        self._keep_alive = keep_alive
        self._source = source
        self._after = after
        self._headers = headers
        self._on_gone = on_gone
        self._timing = timing if exchange.takes_trailers else None
        self._telling = Telling(source.document)
        self._place = -1  # steps told; -1: nothing yet
        self._spoke = True
        self._due = False  # an advance is queued on the loop
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Send all events, those that are still to come included; returns when the client has them or is gone."""
        exchange = self._exchange
        exchange.on_gone, exchange.on_writable = self._gone, self.advance
        trailer = () if self._timing is None else (("trailer", "server-timing"),)
        exchange.start_stream(200, sse.CONTENT_TYPE, (*sse.HEADERS, *self._headers, *trailer))
        self._keep_alive.add(self)
        self._source.follow(self)
        try:
            self.advance()
            await self._done
        finally:
            self._leave()

    def advance(self) -> None:
        """Send what there is, as long as the client takes it."""
        if self._done.done():
            return
        try:
            self._send()
        except Exception:  # the client would wait for ever, and the response must not suffer
            log.exception("the events of a response could not be sent")
            self._gone()
            self._exchange.abort()

    def tick(self) -> None:
        """See keepalive.Quiet."""
        if self._spoke:
            self._spoke = False
        elif self._exchange.writable:  # a full buffer is not silence
            self._exchange.write(sse.COMMENT)

    def _send(self) -> None:
        exchange = self._exchange
        for _ in range(SLICE):
            if not exchange.writable:
                return
            number = self._telling.seen
            events, last = self._next()
            if not events:
                return
            self._spoke = True
            exchange.write(b"".join(events[max(0, self._after + 1 - number) :]))
            if last:
                self._leave()
                exchange.end(() if self._timing is None else self._timing())
                return
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _next(self) -> tuple[list[bytes], bool]:
        """The next events, none when there are none yet, and whether they are the last."""
        source, place = self._source, self._place
        if place < 0:
            self._place = 0
            return self._telling.begin(), False
        if place < len(source.steps):
            self._place += 1
            return self._telling.step(source.steps[place]), False
        if source.final is not None:
            return self._telling.end(source.final), True
        return [], False

    def _go_on(self) -> None:
        self._due = False
        self.advance()

    def _gone(self) -> None:
        self._leave()
        if self._on_gone is not None:
            self._on_gone()

    def _leave(self) -> None:
        self._source.unfollow(self)
        self._keep_alive.discard(self)
        self._exchange.on_gone = None
        self._exchange.on_writable = None
        if not self._done.done():
            self._done.set_result(None)
