"""Connection: one client, from accept to close: requests in order, one reply each, timers, flow control, the end.

Owns the walk along the state table and the promises of the wire: what is refused closes the connection, replies keep
their order, a vanished client frees what its request holds.  Parsing is parser.py's, bytes out are outbox.py's.
L only.  Sections named here are those of RFC 9112 unless another RFC is given.
"""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import Awaitable, Callable
from typing import cast

from vserve.errors import ApiError, RequestTimeout, Unavailable
from vserve.http.events import BodyPart, RequestHead
from vserve.http.exchange import Exchange, Fields, Response
from vserve.http.outbox import Outbox
from vserve.http.parser import Parser
from vserve.http.router import Route
from vserve.http.site import AccessEntry, KnownHead, Site, log
from vserve.http.state import NEXT, Cause, State
from vserve.http.writer import CLOSE, CONTINUE, KEEP, KEEP_1_0

STALL_LOOKS = 4
"""How often within write_stall_s a connection that writes is looked at."""


class Ending(enum.Enum):
    """How a CLOSING connection goes."""

    FLUSH = "close once everything is written"
    LINGER = "end our half once everything is written, then read and drop until the peer ends its own"
    WAITING = "our half has ended; reading and dropping"
    CLOSED = "transport.close() was called"


class Connection(asyncio.Protocol):
    """The protocol of one transport; also the Channel of its current exchange."""

    __slots__ = (
        "_ahead",
        "_behind_bytes",
        "_body",
        "_body_until_s",
        "_dropped_bytes",
        "_ending",
        "_eof",
        "_exchange",
        "_fresh",
        "_held_bytes",
        "_keep",
        "_outbox",
        "_owes_continue",
        "_parser",
        "_reading",
        "_refusal",
        "_serving",
        "_site",
        "_spoken",
        "_state",
        "_task",
        "_transport",
        "_turn",
        "address",
        "deadline_s",
        "dirty",
        "peer",
    )

    def __init__(self, site: Site) -> None:
        self._site = site
        self._parser = Parser(site.limits)
        self._state = State.IDLE
        self._exchange: Exchange | None = None
        self._task: asyncio.Future[Response | None] | None = None
        self._ahead = 0  # requests that wait behind the one in hand, at most: ends of heads in what was read
        self._behind_bytes = 0  # counted in site.behind_bytes
        self._body = bytearray()
        self._body_until_s = math.inf
        self._dropped_bytes = 0
        self._held_bytes = 0  # content counted in site.bodies_bytes
        self._keep = False  # the connection persists after the stream that is open
        self._owes_continue = False  # the client waits for a 100 before it sends its content
        self._ending = Ending.FLUSH
        self._eof = False  # the peer has ended its half while complete requests of it still wait
        self._fresh: bytes | None = None  # a read that began at a request's first byte: it may be a head to remember
        self._reading = True
        self._refusal: ApiError | None = None  # this connection is one too many
        self._serving = False  # inside _advance, which flushes at its end
        self._spoken = False  # the peer has sent something
        self._turn: asyncio.Handle | None = None  # _advance goes on in the next pass of the loop
        self.address = self.peer = ""
        self.deadline_s = math.inf
        self.dirty = False

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        site = self._site
        self._outbox = Outbox(self._transport, site.limits)
        name = transport.get_extra_info("peername")
        if isinstance(name, tuple):
            self.address, self.peer = str(name[0]), f"{name[0]}:{name[1]}"
        else:
            self.address = self.peer = "unix"
        if site.overfull:
            self._transport.abort()
            return
        self._refusal = site.admit(self)
        # One connection too many may not idle in the place of others.
        self.deadline_s = site.clock() + (site.limits.keep_alive_s if self._refusal is None else site.limits.header_s)

    def data_received(self, data: bytes) -> None:
        self._spoken = True
        state, parser = self._state, self._parser
        if state is State.IDLE and parser.clean:
            known = self._site.known.get(data)
            if known is not None and self._refusal is None and self._outbox.writable:
                self._serve_known(known)
                return
            self._fresh = data
        if state >= State.CLOSING:
            self._drop(len(data))
            return
        if state is not State.BODY:
            self._ahead += data.count(b"\r\n\r\n")
        parser.feed(data)
        if state < State.HANDLING and self._turn is None:
            if state is State.BODY:
                self.deadline_s = min(self._site.clock() + self._site.limits.body_idle_s, self._body_until_s)
            self._advance()
        else:
            self._bound_reading()

    def eof_received(self) -> bool | None:
        # RFC 9112 9.6 lets a peer half-close and still read, but a FIN is all that a vanished client sends too, and
        # work for nobody must stop at once: an unanswered request is given up.  Requests that are complete and wait
        # only for a turn or for room in the buffer are still answered.
        if self._exchange is not None:
            self._give_up()
        elif self._state < State.HANDLING and self._parser.buffered:
            self._eof = True
            self._advance()
            if self._state is not State.CLOSING:
                return True
        if self._state < State.CLOSING:
            self._last(Ending.FLUSH)
        self._outbox.flush()
        self._ending = Ending.CLOSED
        return False  # the transport flushes and closes

    def pause_writing(self) -> None:
        self._outbox.pause(self._site.clock())
        self._fall_behind(self._transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._outbox.resume()
        self._fall_behind(-self._behind_bytes)
        exchange = self._exchange
        if exchange is not None and exchange.on_writable is not None:
            self._call(exchange.on_writable)
        elif self._state < State.BODY and self._parser.buffered:
            self._take_turn()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._state is State.CLOSED:
            return
        self._move(Cause.LOST)
        self._fall_behind(-self._behind_bytes)
        self.deadline_s = math.inf
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        self._give_up()
        self._site.forget(self)

    # Requests

    def _serve_known(self, known: KnownHead) -> None:
        """A whole head as parsed and routed before: the way of probes, a third of the work."""
        site = self._site
        self._serving = True
        head, route = known.head, known.route
        exchange = self._exchange = Exchange(self, head, site.request_id(None), site.clock(), route)
        site.active += 1
        self._move(Cause.WHOLE)
        gate = site.hooks.gate
        refusal = gate(head, route) if gate is not None else None
        if refusal is None:
            self._handle(exchange, route)
        else:
            self.reply(exchange, site.render(refusal, exchange))
        self._serving = False
        self._outbox.flush()
        if self._state is State.CLOSING:
            self._close()

    def _advance(self) -> None:
        """Serve what is buffered, in order, until bytes run out, a reply has to be waited for or the turn is over."""
        self._serving, self._turn = True, None
        starved = False
        try:
            for _ in range(self._site.limits.turn_events):
                # Not writable: the peer pipelines but does not read; its next request waits.
                if self._state >= State.HANDLING or (self._state < State.BODY and not self._outbox.writable):
                    break
                if not self._step():
                    starved = True
                    break
            else:
                self._take_turn()
        except ApiError as error:
            self._refuse(error)
        self._serving, self._fresh = False, None
        self.flush()
        if starved and self._eof and self._state < State.HANDLING:
            self._last(Ending.FLUSH)
            self.flush()
        self._bound_reading(starved=starved)

    def _step(self) -> bool:
        """Take one event from the parser; False when bytes are missing.  Raises the ApiError that refuses them."""
        if self._state is State.IDLE and self._parser.buffered:
            self._move(Cause.BYTES)
            self.deadline_s = self._site.clock() + self._site.limits.header_s
        event = self._parser.next_event()
        if type(event) is RequestHead:
            self._open(event)
        elif type(event) is BodyPart:
            self._collect(event.data)
        elif event is not None:
            self._complete()
        elif self._owes_continue:
            self._owes_continue = False
            if not self._parser.buffered:  # RFC 9110 10.1.1: needless once content has begun to come
                self._outbox.put(CONTINUE)
        return event is not None

    def _open(self, head: RequestHead) -> None:
        """Decide on a request by its head alone, before any of its content is read."""
        site = self._site
        exchange = self._exchange = Exchange(self, head, site.request_id(head), site.clock())
        site.active += 1
        if self._ahead:
            self._ahead -= 1
        fresh, self._fresh = self._fresh, None
        try:
            answer = self._admit(exchange)
        except ApiError as error:
            answer = site.render(error, exchange)
        if answer is not None:
            if self._skip_content():
                self._move(Cause.WHOLE)
            self.reply(exchange, answer)
        elif head.has_body:
            self._move(Cause.ACCEPTED)
            now_s = site.clock()
            self._body_until_s = now_s + site.limits.body_total_s
            self.deadline_s = now_s + min(site.limits.body_idle_s, site.limits.body_total_s)
            self._owes_continue = head.expect_continue
        elif fresh is not None and not self._parser.buffered and exchange.route is not None and not exchange.params:
            site.remember(fresh, head, exchange.route)

    def _admit(self, exchange: Exchange) -> Response | None:
        """Route and gate.  A reply for OPTIONS, None to go on; raises the ApiError that refuses the request."""
        site, head = self._site, exchange.head
        try:
            exchange.route, exchange.params = route, _ = site.router.match(head.method, head.path)
        except ApiError:
            if head.method != "OPTIONS":
                raise
            allow = ", ".join(site.router.allow(head.path))  # RFC 9110 9.3.7
            return Response(204, headers=(("allow", allow),))
        if self._refusal is not None and not route.vital:
            raise self._refusal
        gate = site.hooks.gate
        refusal = gate(head, route) if gate is not None else None
        if refusal is None and not route.vital:
            length = head.content_length or 0
            refusal = site.crowded(length if route.body and length <= site.limits.body_bytes else 0)
        if refusal is not None:
            raise refusal
        return None

    def _skip_content(self) -> bool:
        """Drop the content of a refused request as far as it is here; True if that was all of it."""
        try:
            for _ in range(self._site.limits.turn_events):
                event = self._parser.next_event()
                if event is None:
                    return False
                if type(event) is not BodyPart:
                    return True
        except ApiError:
            return False
        return False

    def _collect(self, data: bytes) -> None:
        site, exchange = self._site, self._exchange
        self._owes_continue = False
        if exchange is None or exchange.route is None or not exchange.route.body:
            return
        self._held_bytes += len(data)
        site.bodies_bytes += len(data)
        if site.in_flight_bytes > site.limits.in_flight_bytes:
            raise Unavailable("The server holds too many bytes of requests.", retry_after_s=1, close=True)
        # One growing buffer, not a list: content that comes byte by byte must not cost an object each.
        self._body += data

    def _complete(self) -> None:
        exchange = self._exchange
        assert exchange is not None
        assert exchange.route is not None
        self._move(Cause.WHOLE)
        if self._body:
            exchange.take_body(bytes(self._body))
            self._body = bytearray()
        self._handle(exchange, exchange.route)

    def _handle(self, exchange: Exchange, route: Route) -> None:
        try:
            result = route.handler(exchange)
            if type(result) is Response:
                if exchange.ended:
                    exchange.respond(result)  # a second reply: nothing if the client is gone, a bug otherwise
                else:
                    self.reply(exchange, result)
                return
        except Exception as error:
            self._fail(exchange, error)
            return
        if result is not None:
            work = cast(Awaitable[Response | None], result)
            self._task = self._site.start(work, lambda task: self._finish_task(exchange, task))

    def _finish_task(self, exchange: Exchange, task: asyncio.Future[Response | None]) -> None:
        """An async handler is done."""
        if task.cancelled():
            if not exchange.ended:  # not because the client went: the server stops
                self.abort(exchange)
            return
        error = task.exception()
        try:
            if error is not None:
                raise error
            response = task.result()
            if response is not None:
                exchange.respond(response)
        except Exception as failure:
            self._fail(exchange, failure)

    def _fail(self, exchange: Exchange, error: Exception) -> None:
        """A handler raised: tell the client as well as can still be done."""
        told = self._site.as_api_error(error, exchange)
        if exchange.ended:
            return
        if self._state is not State.STREAMING:
            self.reply(exchange, self._site.render(told, exchange))
        elif exchange.head.version == (1, 1):
            self._finish(exchange, keep=False)  # 8: no last chunk, so the client knows that the content is cut
        else:
            self.abort(exchange)  # 8: content that ends with the connection is cut only by a reset

    def _refuse(self, error: ApiError) -> None:
        """What came is not, or not in time, a request: say so and close."""
        exchange = self._exchange
        if exchange is not None:
            self.reply(exchange, self._site.render(error, exchange))
            return
        response, request_id = self._site.render(error, None), self._site.request_id(None)
        self._outbox.put(self._serialise(response, request_id, CLOSE))
        self._log(None, response.status, len(response.body), request_id)
        self._last(Ending.LINGER)
        self._flush_soon()

    # Replies: the Channel of the exchange

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
        persistence = KEEP if self._keep else CLOSE
        data = site.writer.stream_head(status, content_type, headers, exchange.id, persistence, chunked=chunked)
        self._move(Cause.STREAMED)
        exchange.status = status
        self._outbox.put(data)
        self._outbox.open_stream(chunked=chunked and head.method != "HEAD")
        self.deadline_s = site.clock() + site.limits.write_stall_s / STALL_LOOKS
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

    def end(self, exchange: Exchange) -> None:
        """Complete the streamed reply."""
        if self._state is not State.STREAMING:
            raise RuntimeError("no streamed reply has begun")
        self._outbox.close_stream()
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
        )
        try:
            site.hooks.access_log(entry)
        except Exception:
            log.exception("the access log failed")

    # Time, flow and the end

    def _move(self, cause: Cause) -> None:
        self._state = NEXT[self._state, cause]

    def _flush_soon(self) -> None:
        if not self._serving:
            self._site.flush_later(self)

    def flush(self) -> None:
        """Write what is queued, then go on: to the next request, or to the end."""
        if self._state is State.CLOSED or self._ending is Ending.CLOSED:
            return
        self._outbox.flush()
        if self._state is State.CLOSING:
            self._close()
        elif self._state is State.IDLE and self._parser.buffered and self._outbox.writable and self._turn is None:
            self._advance()

    def _take_turn(self) -> None:
        if self._turn is None:
            self._turn = self._site.loop.call_soon(self._advance)

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
        elif self._exchange is not None and not self.eof_received():
            self._transport.close()

    def _fall_behind(self, num_bytes: int) -> None:
        self._behind_bytes += num_bytes
        self._site.behind_bytes += num_bytes

    def expire(self, now_s: float) -> None:
        """The deadline of the present state has passed."""
        limits, state = self._site.limits, self._state
        if self._outbox.stalled(now_s):
            self.drop()
            return
        waiting = self._transport.get_write_buffer_size() > 0 or self._turn is not None
        if state in (State.HANDLING, State.STREAMING) or (waiting and state is not State.BODY):
            self.deadline_s = now_s + limits.write_stall_s / STALL_LOOKS
        elif state is State.BODY:
            self._refuse(RequestTimeout("The request body did not come in time."))
        elif state is State.HEAD and not self._parser.clean:
            self._refuse(RequestTimeout("The request head did not come in time."))
        elif state is State.CLOSING:
            self.drop()
        else:
            self.retire()

    def drain(self) -> None:
        """Close unless a request is under way, or a first one may be: its sender is owed a reply, not a reset."""
        if self._spoken:
            self.retire()
        else:
            self.deadline_s = min(self.deadline_s, self._site.clock() + self._site.limits.header_s)

    def retire(self) -> None:
        """Close unless a request is under way: keep-alive has run out, or the server drains."""
        if self._state is State.IDLE or (self._state is State.HEAD and self._parser.clean):
            self._last(Ending.FLUSH)
            self.flush()

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

    def _give_up(self) -> None:
        """The client is gone: whatever works for it stops."""
        exchange, task = self._exchange, self._task
        if exchange is None:
            return
        self._exchange = self._task = None
        exchange.detach(gone=True)
        self._settle(exchange)
        if exchange.on_gone is not None:
            self._call(exchange.on_gone)
        if task is not None:
            task.cancel()

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            log.exception("a callback of an exchange failed")
