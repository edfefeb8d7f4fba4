"""Replies: the way out of one connection, as the Channel of its current exchange: whole and streamed replies.

Owns how a reply begins and ends, whether the connection persists behind it, and the access log's entry; knows nothing
of how requests come in.  L only.  Sections named here are those of RFC 9112 unless another RFC is given.
"""

from __future__ import annotations

import asyncio

from vserve.errors import ApiError
from vserve.http.events import RequestHead
from vserve.http.exchange import Exchange, Fields, Response
from vserve.http.link import Ending, Link
from vserve.http.site import AccessEntry, Site, log
from vserve.http.state import Cause, State
from vserve.http.writer import CLOSE, KEEP, KEEP_1_0, format_fields, server_timing

STALL_LOOKS = 4
"""How often within write_stall_s a connection that writes is looked at."""


class Replies(Link):
    """A Link that replies."""

    __slots__ = ("_ahead", "_body", "_exchange", "_held_bytes", "_keep", "_refusal", "_task")

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._ahead = 0  # requests that wait behind the one in hand, at most: ends of heads in what was read
        self._body = bytearray()
        self._exchange: Exchange | None = None
        self._held_bytes = 0  # content counted in site.bodies_bytes
        self._keep = False  # the connection persists after the stream that is open
        self._refusal: ApiError | None = None  # this connection is one too many
        self._task: asyncio.Future[Response | None] | None = None

    @property
    def writable(self) -> bool:
        """False while the transport's buffer is above its high-water mark."""
        return self._outbox.writable

    def reply(self, exchange: Exchange, response: Response) -> None:
        """Give a whole reply and end the exchange."""
        if self._state is State.STREAMING:
            raise RuntimeError("a streamed reply has begun")
        head = exchange.head
        if self._site.hooks.reply_headers is not None:
            response = self._decorate(head, response)
        # 9.3 and 9.6: with content unread the next request could not be found, so the connection ends.
        keep = self._state is State.HANDLING and self._may_keep(head, response.headers)
        persistence = CLOSE if not keep else KEEP if head.version == (1, 1) else KEEP_1_0
        persistence += server_timing(self._site.clock() - exchange.received_s)
        head_only = head.method == "HEAD"
        self._outbox.put(self._serialise(response, exchange.id, persistence, head_only))
        exchange.status = response.status
        exchange.body_bytes_sent = 0 if head_only else len(response.body)
        self._finish(exchange, keep=keep)

    def start_stream(self, exchange: Exchange, status: int, content_type: str, headers: Fields) -> None:
        """Begin a streamed reply."""
        if self._state is not State.HANDLING:
            raise RuntimeError("a streamed reply has begun already")
        head, site = exchange.head, self._site
        if site.hooks.reply_headers is not None:
            headers = (*headers, *site.hooks.reply_headers(head))
        chunked = head.version == (1, 1)  # 6.1: no transfer coding to a 1.0 client; 6.3 (8): the close ends it
        self._keep = chunked and self._may_keep(head, headers)
        now_s = site.clock()
        persistence = (KEEP if self._keep else CLOSE) + server_timing(now_s - exchange.received_s)
        data = site.writer.stream_head(status, content_type, headers, exchange.id, persistence, chunked=chunked)
        self._move(Cause.STREAMED)
        exchange.status = status
        self._outbox.put(data)
        self._outbox.open_stream(chunked=chunked and head.method != "HEAD")
        self.deadline_s = now_s + site.limits.write_stall_s / STALL_LOOKS
        self._flush_soon()

    def write(self, exchange: Exchange, data: bytes) -> None:
        """Add content to the streamed reply."""
        if self._state is not State.STREAMING:
            raise RuntimeError("no streamed reply has begun")
        if not data or exchange.head.method == "HEAD":  # RFC 9110 9.3.2
            return
        exchange.body_bytes_sent += len(data)
        outbox = self._outbox
        taken = outbox.put_stream(data)
        if not outbox.writable:
            self._fall_behind(len(data))
            taken = taken and self._site.in_flight_bytes <= self._site.limits.in_flight_bytes
        if taken:
            self._flush_soon()
        else:
            self._transport.abort()

    def end(self, exchange: Exchange, trailers: Fields = ()) -> None:
        """Complete the streamed reply."""
        if self._state is not State.STREAMING:
            raise RuntimeError("no streamed reply has begun")
        lines = format_fields(trailers).encode("latin-1") if trailers and exchange.takes_trailers else b""
        self._outbox.close_stream(lines)
        # Asked again: the server may have begun to drain since, and the client learns it by the close.
        self._finish(exchange, keep=self._keep and not self._site.draining)

    def abort(self, exchange: Exchange) -> None:
        """Cut the connection in the middle of the reply."""
        self._finish(exchange, keep=False)
        self.drop()

    def _may_keep(self, head: RequestHead, headers: Fields) -> bool:
        site = self._site
        if not head.keep_alive or site.draining or self._refusal is not None:
            return False
        if self._ahead > site.limits.pipelined_requests:
            return False  # 9.3.2: a client has to cope with answers that do not come, and ask again
        if not headers:
            return True
        return not any(name.lower() == "connection" and value.lower() == "close" for name, value in headers)

    def _decorate(self, head: RequestHead, response: Response) -> Response:
        extra = self._site.hooks.reply_headers
        headers = (*response.headers, *extra(head)) if extra is not None else response.headers
        return Response(response.status, response.body, response.content_type, headers)

    def _serialise(self, response: Response, request_id: str, persistence: str, head_only: bool = False) -> bytes:
        writer = self._site.writer
        try:
            return writer.reply(response, request_id, persistence, head_only)
        except ValueError:  # a handler's header that is none: our bug, which must not leave the client without a reply
            log.exception("request %s: the reply has an invalid header", request_id)
            plain = Response(500, b"Internal error; the request id is " + request_id.encode(), "text/plain")
            return writer.reply(plain, request_id, persistence, head_only)

    def _finish(self, exchange: Exchange, *, keep: bool) -> None:
        """The reply is complete, or never will be: back to IDLE, or on to the end."""
        site = self._site
        head, whole = exchange.head, self._state >= State.HANDLING
        self._exchange = self._task = None
        exchange.detach()
        self._settle(exchange)
        if keep:
            if not self._parser.buffered:
                self._ahead = 0
            self._move(Cause.ANSWERED)
            self.deadline_s = site.clock() + site.limits.keep_alive_s
        else:
            # 9.6: closing with bytes unread would reset the connection and may take the reply with it.
            unread = not whole or (self._parser.buffered and head.keep_alive)
            self._last(Ending.LINGER if unread else Ending.FLUSH)
        if not self._serving:
            self._flush_soon()

    def _settle(self, exchange: Exchange) -> None:
        """Give back what the exchange held, and log it."""
        site = self._site
        site.active -= 1
        if self._held_bytes:
            site.bodies_bytes -= self._held_bytes
            self._held_bytes = 0
            self._body = bytearray()
        if site.hooks.access_log is not None:
            self._log(exchange, exchange.status, exchange.body_bytes_sent, exchange.id)
        if site.watched:
            site.tell_quiet()

    def _log(self, exchange: Exchange | None, status: int, body_bytes: int, request_id: str) -> None:
        site = self._site
        if site.hooks.access_log is None:
            return
        entry = AccessEntry(
            method=exchange.head.method if exchange is not None else None,
            route=exchange.route.name if exchange is not None and exchange.route is not None else None,
            status=status,
            duration_s=site.clock() - exchange.received_s if exchange is not None else 0.0,
            body_bytes=body_bytes,
            request_id=request_id,
            peer=self.peer,
            gone=exchange is not None and exchange.gone,
            note=None if exchange is None else exchange.note,
        )
        try:
            site.hooks.access_log(entry)
        except Exception:
            log.exception("the access log failed")
