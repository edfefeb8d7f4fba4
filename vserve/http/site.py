"""Site: what all connections of one server share: the table, the hooks, the counts, the flush pass and the sweep.

Owns everything that is counted across connections; knows no listening socket and no byte of the wire.  L only.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import select
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from vserve.errors import ApiError, InternalError, RateLimited, Unavailable
from vserve.http.events import RequestHead
from vserve.http.exchange import Exchange, Fields, Response
from vserve.http.limits import Limits
from vserve.http.router import Route, Router
from vserve.http.turns import Turns
from vserve.http.writer import Writer

log = logging.getLogger("vserve.http")

SWEEP_S = 0.5
"""How often deadlines are looked at: every timeout is late by at most this."""

FLUSH_SLICE = 32
FLUSH_S = 0.00015
"""Most connections flushed in one turn of the loop, and the seconds after which it takes no further one."""

KNOWN_HEADS = 256
KNOWN_HEAD_BYTES = 1024
"""Bounds of the memory of whole heads: probes and simple clients send the same bytes again and again."""

NEW_WORK_SHARE = 0.9
"""Share of the bytes in flight up to which new work is let in; the rest is for what has begun."""

_UNIQUE_FIELDS = ("authorization", "cookie", "x-api-key", "x-request-id")


@dataclass(frozen=True, slots=True)
class AccessEntry:
    """One finished, refused or broken-off exchange.

    method and route are None when no head could be parsed or no route matched; method is the client's own word.
    status 0: the client vanished before a reply began.  body_bytes: content sent, without transfer coding.
    note: the exchange's.
    """

    method: str | None
    route: str | None
    status: int
    duration_s: float
    body_bytes: int
    request_id: str
    peer: str
    gone: bool
    note: object = None


RenderError = Callable[[ApiError, Exchange | None], Response]
Gate = Callable[[RequestHead, Route], ApiError | None]
ReplyHeaders = Callable[[RequestHead], Fields]
AccessLog = Callable[[AccessEntry], None]


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the application decides.  All are called on L and must be quick.

    render_error: an error as a reply; exchange is None when no head could be parsed.  gate: called when the route is
    known and before any content is read; an error refuses the request.  reply_headers: fields added to every reply to
    a parsed head (CORS).  access_log: called once for each exchange.
    """

    render_error: RenderError
    gate: Gate | None = None
    reply_headers: ReplyHeaders | None = None
    access_log: AccessLog | None = None


@dataclass(frozen=True, slots=True)
class KnownHead:
    """A head without content that was parsed and routed before."""

    head: RequestHead
    route: Route


class Carrier(Protocol):
    """What the site does with the transport of a connection."""

    dirty: bool

    @property
    def descriptor(self) -> int | None: ...
    def hung_up(self, broken: bool) -> None: ...
    def flush(self) -> None: ...


class Peer(Carrier, Protocol):
    """What the site does with a connection."""

    address: str
    deadline_s: float

    def expire(self, now_s: float) -> None: ...
    def drain(self) -> None: ...
    def retire(self) -> None: ...
    def drop(self) -> None: ...


class Site:
    """Shared by the connections of one server."""

    def __init__(
        self, router: Router, limits: Limits, hooks: Hooks, writer: Writer, clock: Callable[[], float]
    ) -> None:
        self.router = router
        self.limits = limits
        self.hooks = hooks
        self.writer = writer
        self.clock = clock
        self.loop = asyncio.get_running_loop()
        self.turns = Turns(self.loop, clock)
        self.connections: set[Peer] = set()
        self._greeting: set[Peer] = set()  # in their TLS handshakes
        self.active = 0  # exchanges whose reply has not ended
        self.bodies_bytes = 0  # content held for them
        self.behind_bytes = 0  # what waits for clients that read too slowly
        self.deaf: set[Carrier] = set()  # connections from which nothing is read: the end of their peers is looked for
        self.draining = False
        self.known: dict[bytes, KnownHead] = {}
        self._per_address: dict[str, int] = {}
        self._dirty: deque[Carrier] = deque()
        self._flush_due = False
        self._tasks: set[asyncio.Future[Response | None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._id_prefix = f"req-{secrets.token_hex(6)}-"
        self._ids = itertools.count(1)
        self.watched: list[asyncio.Future[None]] = []  # who waits in quiet()

    # Counting

    def greet(self, peer: Peer) -> None:
        """Count a connection whose TLS handshake begins."""
        self._greeting.add(peer)
        self._per_address[peer.address] = self._per_address.get(peer.address, 0) + 1

    def greeted(self, peer: Peer) -> None:
        """The handshake has ended: it counts no longer."""
        if peer in self._greeting:
            self._greeting.remove(peer)
            self._uncount(peer.address)
            self.tell_quiet()

    def admit(self, peer: Peer) -> ApiError | None:
        """Count a new connection; an error means that it may only ask for vital routes."""
        self.connections.add(peer)
        held = self._per_address[peer.address] = self._per_address.get(peer.address, 0) + 1
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)
        limits = self.limits
        if self.open > limits.connections:
            return Unavailable("The server has too many open connections.", retry_after_s=1, close=True)
        if limits.connections_per_address is not None and held > limits.connections_per_address:
            return RateLimited("This address has too many open connections.", retry_after_s=1, close=True)
        return None

    @property
    def overfull(self) -> bool:
        """True when there are so many connections that another is not even told so."""
        return self.open >= self.limits.connections + self.limits.spare_connections

    @property
    def open(self) -> int:
        """Connections, idle ones and those in their TLS handshake too."""
        return len(self.connections) + len(self._greeting)

    def forget(self, peer: Peer) -> None:
        """A connection is gone; one that was never admitted is ignored."""
        if peer not in self.connections:
            return
        self.connections.remove(peer)
        self.deaf.discard(peer)
        self._uncount(peer.address)
        self.tell_quiet()

    def _uncount(self, address: str) -> None:
        left = self._per_address[address] - 1
        if left:
            self._per_address[address] = left
        else:
            del self._per_address[address]

    def tell_quiet(self) -> None:
        """Wake who waits in quiet(); called whenever a count falls."""
        if self.watched:
            for future in self.watched:
                if not future.done():
                    future.set_result(None)
            self.watched.clear()

    async def quiet(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until done() holds, which is asked when counts fall; False if it does not within timeout_s."""
        until_s = self.loop.time() + timeout_s
        while not done():
            left_s = until_s - self.loop.time()
            if left_s <= 0:
                return False
            future: asyncio.Future[None] = self.loop.create_future()
            self.watched.append(future)
            await asyncio.wait([future], timeout=left_s)
        return True

    # Exchanges

    def request_id(self, head: RequestHead | None) -> str:
        """The client's X-Request-Id if it may be echoed, else a fresh one."""
        given = head.headers.find("x-request-id") if head is not None else None
        # Visible ASCII only: the id goes into reply headers and log lines.
        if given is not None and 1 <= len(given) <= 128 and all("!" <= char <= "~" for char in given):
            return given
        return f"{self._id_prefix}{next(self._ids):x}"

    def remember(self, data: bytes, head: RequestHead, route: Route) -> None:
        """Keep a head that was all of one read, unless it is large or bound to one request or caller."""
        if len(data) > KNOWN_HEAD_BYTES or any(name in head.headers for name in _UNIQUE_FIELDS):
            return
        if len(self.known) >= KNOWN_HEADS:
            self.known.clear()  # O(1) each on average, and no order to maintain
        self.known[data] = KnownHead(head, route)

    def render(self, error: ApiError, exchange: Exchange | None) -> Response:
        """The error as a reply, with the header fields that belong to it."""
        try:
            response = self.hooks.render_error(error, exchange)
        except Exception:
            log.exception("render_error failed")
            response = Response(error.status, error.message.encode(), "text/plain; charset=utf-8")
        present = {name.lower() for name, _ in response.headers}
        missing = tuple(field for field in error.headers() if field[0] not in present)
        if not missing:
            return response
        return Response(response.status, response.body, response.content_type, (*response.headers, *missing))

    def as_api_error(self, error: BaseException, exchange: Exchange) -> ApiError:
        """What a handler raised, as the client may see it; a bug is logged with its traceback."""
        if isinstance(error, ApiError):
            return error
        log.error("request %s failed", exchange.id, exc_info=error)
        return InternalError(f"Internal error; the request id is {exchange.id}.")

    def start(
        self, work: Awaitable[Response | None], done: Callable[[asyncio.Future[Response | None]], None]
    ) -> asyncio.Future[Response | None]:
        """Run an async handler as a task, kept until it is done; then done is called with it."""
        task = asyncio.ensure_future(work, loop=self.loop)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(done)
        return task

    async def end_tasks(self) -> None:
        """Cancel and await what handlers are still running."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # The flush pass and the sweep

    def flush_later(self, peer: Carrier) -> None:
        """Flush the connection in a later turn; one serves many."""
        if not peer.dirty:
            peer.dirty = True
            self._dirty.append(peer)
            if not self._flush_due:
                self._flush_due = True
                self.turns.soon(self._flush_dirty)

    def _flush_dirty(self) -> None:
        dirty, until_s = self._dirty, self.clock() + FLUSH_S
        try:
            for _ in range(min(FLUSH_SLICE, len(dirty))):
                peer = dirty.popleft()
                peer.dirty = False
                peer.flush()
                if self.clock() >= until_s:
                    break
        finally:
            self._flush_due = bool(dirty)
            if dirty:
                self.turns.soon(self._flush_dirty)

    def sweep(self, now_s: float) -> None:
        """Let every connection whose deadline has passed act on it."""
        # A float compare each: thousands of connections cost well under a millisecond, and none needs its own timer.
        for peer in [peer for peer in self.connections if peer.deadline_s <= now_s]:
            peer.expire(now_s)

    def look_for_ends(self) -> None:
        """Tell the connections that read nothing for now when their peers have ended or vanished."""
        if not self.deaf:
            return
        poll, peers = select.poll(), {}
        for peer in self.deaf:
            descriptor = peer.descriptor
            if descriptor is not None:
                poll.register(descriptor, select.POLLRDHUP)
                peers[descriptor] = peer
        for descriptor, events in poll.poll(0):
            peers[descriptor].hung_up(broken=bool(events & (select.POLLHUP | select.POLLERR | select.POLLNVAL)))

    @property
    def in_flight_bytes(self) -> int:
        """Bytes held for clients: see Limits."""
        return self.bodies_bytes + self.behind_bytes

    def crowded(self, more_bytes: int) -> Unavailable | None:
        """The 503 for new work that brings so many bytes of content, None while there is room for it."""
        limit = self.limits.in_flight_bytes
        held = self.in_flight_bytes
        if held <= limit * NEW_WORK_SHARE and held + more_bytes <= limit:
            return None
        return Unavailable(
            f"The server holds {held} bytes of requests and replies, the limit is {limit}; try again later.",
            retry_after_s=1,
            close=True,
        )

    def _sweep(self) -> None:
        self._sweeper = None
        self.sweep(self.clock())
        self.look_for_ends()
        if self.connections:
            self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)

    def stop_sweeping(self) -> None:
        """Cancel the timer; the next connection starts it again."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
