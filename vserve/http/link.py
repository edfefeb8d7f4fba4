"""Link: the transport under the requests of one connection: reading and writing by bounds, and the stages of its end.

Owns flow control both ways and how a connection closes; knows no request and no reply.  L only.
Sections named here are those of RFC 9112.
"""

from __future__ import annotations

import asyncio
import enum
import math
from abc import abstractmethod

from vserve.http.outbox import Outbox
from vserve.http.parser import Parser
from vserve.http.site import Site
from vserve.http.state import NEXT, Cause, State


class Ending(enum.Enum):
    """How a CLOSING connection goes."""

    FLUSH = "close once everything is written"
    LINGER = "end our half once everything is written, then read and drop until the peer ends its own"
    WAITING = "our half has ended; reading and dropping"
    CLOSED = "transport.close() was called"


class Link(asyncio.Protocol):
    """Where a connection stands on the state table, and its transport."""

    __slots__ = (
        "_behind_bytes",
        "_dropped_bytes",
        "_ending",
        "_outbox",
        "_parser",
        "_reading",
        "_serving",
        "_site",
        "_state",
        "_transport",
        "address",
        "deadline_s",
        "dirty",
        "peer",
    )

    _outbox: Outbox
    _transport: asyncio.Transport

    def __init__(self, site: Site) -> None:
        self._site = site
        self._parser = Parser(site.limits)
        self._state = State.IDLE
        self._behind_bytes = 0  # counted in site.behind_bytes
        self._dropped_bytes = 0
        self._ending = Ending.FLUSH
        self._reading = True
        self._serving = False  # inside a pass over what is buffered, which flushes at its end
        self.address = self.peer = ""
        self.deadline_s = math.inf
        self.dirty = False

    @abstractmethod
    def flush(self) -> None:
        """Write what is queued, then go on: to the next request, or to the end."""

    def _move(self, cause: Cause) -> None:
        self._state = NEXT[self._state, cause]

    def _flush_soon(self) -> None:
        if not self._serving:
            self._site.flush_later(self)

    def name(self, address: object) -> None:
        """Say whose connection this is: a socket's address of its peer."""
        if isinstance(address, tuple):
            self.address, self.peer = str(address[0]), f"{address[0]}:{address[1]}"
        else:
            self.address = self.peer = "unix"

    @property
    def descriptor(self) -> int | None:
        """The socket's, None when there is none (any more)."""
        sock = self._transport.get_extra_info("socket")
        number = sock.fileno() if sock is not None else -1
        return number if number >= 0 else None

    def hung_up(self, broken: bool) -> None:
        """The peer has ended its half while nothing is read from it; broken: both halves."""
        if broken:
            self.drop()
        # Without a request in hand complete ones wait for room: reading goes on behind them and finds the end itself.
        elif State.HEAD < self._state < State.CLOSING and not self.eof_received():
            self._transport.close()

    def _fall_behind(self, num_bytes: int) -> None:
        self._behind_bytes += num_bytes
        self._site.behind_bytes += num_bytes

    def _bound_reading(self, *, starved: bool = False) -> None:
        """Read on while what has been read ahead is bounded, and always when a request is incomplete without more."""
        reading = starved or self._state >= State.CLOSING or self._parser.buffered <= self._site.limits.pipeline_bytes
        if reading == self._reading or self._transport.is_closing():
            return
        self._reading = reading
        if reading:
            self._site.deaf.discard(self)
            self._transport.resume_reading()
        else:
            self._site.deaf.add(self)
            self._transport.pause_reading()

    def drop(self) -> None:
        """End at once; the exchange is told by connection_lost."""
        self._transport.abort()

    def _last(self, ending: Ending) -> None:
        self._move(Cause.LAST)
        self._ending = ending
        self.deadline_s = self._site.clock() + self._site.limits.linger_s

    def _close(self) -> None:
        """9.6: closing in stages, so that the peer can read the last reply."""
        if self._ending is Ending.LINGER:
            self._ending = Ending.WAITING
            if self._transport.can_write_eof():
                self._transport.write_eof()
            self._bound_reading()
        elif self._ending is Ending.FLUSH:
            self._ending = Ending.CLOSED
            self._transport.close()

    def _drop(self, num_bytes: int) -> None:
        self._dropped_bytes += num_bytes
        if self._dropped_bytes > self._site.limits.linger_bytes:
            self.drop()
