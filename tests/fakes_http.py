"""Fakes of our own for the wire: a transport in memory, a clock that is set by hand, and a server on both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence

import h11

from vserve.errors import ApiError
from vserve.http.connection import Connection
from vserve.http.events import RequestHead
from vserve.http.exchange import Exchange, Response
from vserve.http.limits import Limits
from vserve.http.router import Route, Router
from vserve.http.server import HttpServer
from vserve.http.site import AccessEntry


class ManualClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class MemoryTransport(asyncio.Transport):
    """The server's side of a connection whose other side is a test.

    What is written arrives at once while reading is True; else it waits in a buffer with high and low marks, as in a
    socket whose peer does not read, until read(n) takes some.
    """

    def __init__(self, protocol: Connection, peername: object = ("192.0.2.1", 50000)) -> None:
        super().__init__({"peername": peername})
        self.protocol = protocol
        self.loop = asyncio.get_running_loop()
        self.received = bytearray()  # what the peer has read
        self.writes = 0
        self.peer_reads = True
        self.ended = False  # the server has ended its half
        self.aborted = False
        self.lost = False
        self._waiting = bytearray()
        self._high, self._low = 65536, 16384
        self._paused = False
        self._closing = False
        self._reading = True
        self._unread: list[bytes] = []
        protocol.connection_made(self)

    # The peer

    def send(self, data: bytes) -> None:
        """The peer sends bytes; they wait while the server does not read."""
        if self._closing or self.lost:
            return
        if self._reading:
            self.protocol.data_received(data)
        else:
            self._unread.append(data)

    def finish(self) -> None:
        """The peer ends its half."""
        if not self.lost and not self.protocol.eof_received():
            self.close()

    def vanish(self) -> None:
        """The connection breaks."""
        self._lose()

    def read(self, num_bytes: int) -> None:
        """The peer takes so many of the bytes that wait for it."""
        self.received += self._waiting[:num_bytes]
        del self._waiting[:num_bytes]
        if self._paused and len(self._waiting) <= self._low:
            self._paused = False
            self.protocol.resume_writing()
        if self._closing and not self._waiting:
            self.loop.call_soon(self._lose)

    # asyncio.Transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.ended, "written behind the end"
        if self._closing or self.lost:
            return
        self.writes += 1
        if self.peer_reads:
            self.received += data
            return
        self._waiting += data
        if len(self._waiting) > self._high and not self._paused:
            self._paused = True
            self.protocol.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high, self._low = high or 0, low or 0

    def get_write_buffer_size(self) -> int:
        return len(self._waiting)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._waiting:
                self.loop.call_soon(self._lose)

    def abort(self) -> None:
        self._closing = self.aborted = True
        self._waiting.clear()
        self.loop.call_soon(self._lose)

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self.loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        while self._unread and self._reading and not self._closing:
            self.protocol.data_received(self._unread.pop(0))

    def _lose(self) -> None:
        if not self.lost:
            self.lost = self._closing = True
            self.protocol.connection_lost(None)


class Held:
    """A handler that keeps its exchanges for the test to answer."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.gone = 0

    def __call__(self, exchange: Exchange) -> None:
        exchange.on_gone = self._count
        self.exchanges.append(exchange)

    def _count(self) -> None:
        self.gone += 1

    @property
    def last(self) -> Exchange:
        return self.exchanges[-1]


class Waiter:
    """An async handler that waits until the test sets the answer, and counts how it ended."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Response] | None = None
        self.started = self.cancelled = 0

    async def __call__(self, exchange: Exchange) -> Response:
        self.started += 1
        self.answer = asyncio.get_running_loop().create_future()
        try:
            return await self.answer
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def render_error(error: ApiError, exchange: Exchange | None) -> Response:
    """The error shape of the API."""
    return Response(error.status, json.dumps(error.body()).encode())


def echo(exchange: Exchange) -> Response:
    """The content, unchanged."""
    return Response(200, exchange.request.body, "application/octet-stream")


def fail(exchange: Exchange) -> Response:
    """A bug in a handler."""
    raise ZeroDivisionError("a secret detail")


class Edge:
    """A server without sockets.  Make it inside a running loop."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        extra: Sequence[Route] = (),
        reply_headers: Callable[[RequestHead], Sequence[tuple[str, str]]] | None = None,
    ) -> None:
        self.clock = ManualClock()
        self.held, self.waiter = Held(), Waiter()
        self.log: list[AccessEntry] = []
        self.refusal: ApiError | None = None
        self.gated: list[str] = []
        routes = (
            Route("GET", "/ping", lambda _: Response(200), "ping", vital=True),
            Route("POST", "/echo", echo, "echo", body=True),
            Route("POST", "/deaf", echo, "deaf"),
            Route("GET", "/hold", self.held, "hold"),
            Route("POST", "/hold", self.held, "hold", body=True),
            Route("GET", "/wait", self.waiter, "wait"),
            Route("GET", "/fail", fail, "fail"),
            Route("GET", "/items/{id}", lambda e: Response(200, e.params["id"].encode(), "text/plain"), "item"),
            *extra,
        )
        self.server = HttpServer(
            Router(routes),
            limits or Limits(),
            render_error,
            self._gate,
            reply_headers=reply_headers,
            access_log=self.log.append,
            clock=self.clock,
            wall_clock=lambda: 784111777.0,
        )

    def _gate(self, head: RequestHead, route: Route) -> ApiError | None:
        self.gated.append(head.path)
        return self.refusal

    def connect(self, peername: object = ("192.0.2.1", 50000)) -> MemoryTransport:
        return MemoryTransport(self.server.protocol(), peername)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and the sweep look at it."""
        self.clock.now_s += seconds
        self.server.site.sweep(self.clock.now_s)

    async def exchange(self, data: bytes) -> list[tuple[h11.Response, bytes]]:
        """What a new client gets for these bytes once the loop has turned a few times."""
        client = self.connect()
        client.send(data)
        await turns()
        return answers(bytes(client.received), closed=client.ended or client.lost)


async def turns(count: int = 8) -> None:
    """Let the loop go round so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine; a task it leaves behind is an error."""

    async def checked() -> None:
        await main()
        await turns()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    asyncio.run(checked())


def answers(data: bytes, *, methods: Sequence[str] = (), closed: bool = False) -> list[tuple[h11.Response, bytes]]:
    """The replies in data as h11, an independent client, reads them; fails on anything it does not accept.

    methods: of the requests they answer, GET where it ends early.  closed: the connection has ended behind data.
    """
    found: list[tuple[h11.Response, bytes]] = []
    while data:
        method = methods[len(found)] if len(found) < len(methods) else "GET"
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=method, target="/", headers=[("host", "a")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        if closed:
            client.receive_data(b"")
        body = b""
        response: h11.Response | None = None
        while True:
            event = client.next_event()
            assert event is not h11.NEED_DATA, f"an incomplete reply: {data!r}"
            if isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
        assert response is not None
        found.append((response, body))
        data = client.trailing_data[0]
    return found


def field(response: h11.Response, name: str) -> str | None:
    """The value of one field of a reply."""
    values = [value.decode("latin-1") for key, value in response.headers if key == name.encode()]
    return values[0] if values else None
