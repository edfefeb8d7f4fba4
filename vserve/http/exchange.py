"""Exchange: one request and its reply, as handlers see them.

Owns what a handler may ask and say; knows nothing of bytes on the wire, which are the channel's (connection.py).
Everything here belongs to the event-loop thread (L).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qs

from vserve.http.events import Headers, RequestHead

if TYPE_CHECKING:
    from vserve.http.router import Route

__all__ = ["AsyncHandler", "Channel", "Exchange", "Handler", "Headers", "Request", "Response", "SyncHandler"]

Fields = Sequence[tuple[str, str]]

QUERY_FIELD_LIMIT = 256
"""Most fields query_params splits a query into; the rest is ignored (the request line is bounded already)."""


@dataclass(frozen=True, slots=True)
class Response:
    """A whole reply.  headers: names in lower case; content-length, date and x-request-id are the server's.

    content_type is left out when there is no body.  A header ``connection: close`` ends the connection.
    """

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """A complete request.

    target: as sent; path: percent-decoded once; query: raw.  version: (1, 0) or (1, 1).  peer: address of the other
    end of the connection.  received_s: time.monotonic() when the head was complete.
    """

    method: str
    target: str
    path: str
    query: str
    headers: Headers
    body: bytes
    version: tuple[int, int]
    peer: str
    received_s: float

    def query_params(self) -> dict[str, list[str]]:
        """The query as a form: name -> values, decoded; invalid UTF-8 becomes U+FFFD."""
        if not self.query:
            return {}
        fields = "&".join(self.query.split("&", QUERY_FIELD_LIMIT)[:QUERY_FIELD_LIMIT])
        return parse_qs(fields, keep_blank_values=True)


class Channel(Protocol):
    """What an exchange needs of its connection."""

    @property
    def peer(self) -> str: ...
    @property
    def writable(self) -> bool: ...
    def reply(self, exchange: Exchange, response: Response) -> None: ...
    def start_stream(self, exchange: Exchange, status: int, content_type: str, headers: Fields) -> None: ...
    def write(self, exchange: Exchange, data: bytes) -> None: ...
    def end(self, exchange: Exchange, trailers: Fields = ()) -> None: ...
    def abort(self, exchange: Exchange) -> None: ...


class Exchange:
    """One request and its reply.  L only.

    Replied to exactly once: respond(), or start_stream(), write()..., end().  Once the client is gone every call is
    accepted and does nothing.  After the reply has ended, a second one is a bug and raises RuntimeError.

    route: None when no route matched.  id: the client's X-Request-Id if it is 1..128 visible ASCII characters, else
    made by the server; for logs and echo only, never a key.  params: path parameters, read only.
    gone: the client has vanished; on_gone is called once when that happens before the reply has ended (a task of an
    async handler is cancelled right after it).  on_writable is called when writing may go on.
    received_s: clock of the server when the head was complete.
    note: the application's own, handed on with the AccessEntry; nothing here looks at it.
    """

    __slots__ = (
        "_body",
        "_channel",
        "_request",
        "body_bytes_sent",
        "gone",
        "head",
        "id",
        "note",
        "on_gone",
        "on_writable",
        "params",
        "received_s",
        "route",
        "status",
    )

    def __init__(
        self,
        channel: Channel,
        head: RequestHead,
        id: str,
        received_s: float,
        route: Route | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        self._channel: Channel | None = channel
        self._request: Request | None = None
        self._body = b""
        self.head = head
        self.id = id
        self.received_s = received_s
        self.route = route
        self.params: Mapping[str, str] = params if params is not None else {}
        self.note: object = None
        self.gone = False
        self.on_gone: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None
        self.status = 0  # of the reply, once its head is made
        self.body_bytes_sent = 0  # content handed to the transport, before transfer coding

    @property
    def request(self) -> Request:
        """The request with its content; complete when the handler is called."""
        request = self._request
        if request is None:  # made on demand: most cheap routes never look at it
            head, peer = self.head, self._channel.peer if self._channel is not None else ""
            request = self._request = Request(
                head.method,
                head.target,
                head.path,
                head.query,
                head.headers,
                self._body,
                head.version,
                peer,
                self.received_s,
            )
            self._body = b""
        return request

    @property
    def ended(self) -> bool:
        """True once the reply is complete or can no longer be given."""
        return self._channel is None

    @property
    def writable(self) -> bool:
        """False while the transport holds more than its high-water mark; write() then only adds to a bounded buffer."""
        channel = self._channel
        return channel is not None and channel.writable

    def respond(self, response: Response) -> None:
        """Give the whole reply."""
        channel = self._open()
        if channel is not None:
            channel.reply(self, response)

    def start_stream(self, status: int, content_type: str, headers: Fields = ()) -> None:
        """Begin a streamed reply: chunked for HTTP/1.1, ended by the close of the connection for HTTP/1.0."""
        channel = self._open()
        if channel is not None:
            channel.start_stream(self, status, content_type, headers)

    def write(self, data: bytes) -> None:
        """Add to the streamed reply; what is written in one pass of the loop goes out as one chunk."""
        channel = self._open()
        if channel is not None:
            channel.write(self, data)

    @property
    def takes_trailers(self) -> bool:
        """Whether fields may follow a streamed reply: it is chunked, and the client has said so (RFC 9110 6.5.1)."""
        coding = self.head.headers.find("te")
        return coding is not None and self.head.version == (1, 1) and "trailers" in coding.lower()

    def end(self, trailers: Fields = ()) -> None:
        """Complete the streamed reply.  trailers: fields behind it, where the client takes them."""
        channel = self._open()
        if channel is not None:
            channel.end(self, trailers)

    def abort(self) -> None:
        """Cut the connection: the client sees that the reply is broken.  on_gone is not called."""
        if self._channel is not None:
            self._channel.abort(self)

    def _open(self) -> Channel | None:
        if self._channel is None and not self.gone:
            raise RuntimeError("the reply of this exchange has already ended")
        return self._channel

    # What follows is for the connection only.

    def take_body(self, body: bytes) -> None:
        """Set the content, before the handler runs."""
        self._body = body

    def detach(self, *, gone: bool = False) -> None:
        """The reply has ended, or cannot be given any more (gone)."""
        self._channel = None
        self.gone = gone


SyncHandler = Callable[[Exchange], Response | None]
"""Runs inside data_received; must not block.  None: it answers, or streams, through the exchange, now or later."""

AsyncHandler = Callable[[Exchange], Awaitable[Response | None]]
"""Runs as one task; None as for SyncHandler."""

Handler = Callable[[Exchange], Response | Awaitable[Response | None] | None]
