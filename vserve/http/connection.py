"""Connection: one client, from accept to close: requests in order, one reply each, timers, the end.

Owns the walk along the state table and the promises of the wire: what is refused closes the connection, replies keep
their order, a vanished client frees what its request holds.  Parsing is parser.py's, replies are replies.py's, the
transport link.py's.  L only.  Sections named here are those of RFC 9112 unless another RFC is given.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from types import CoroutineType
from typing import Any, cast

from vserve.errors import ApiError, RequestTimeout, Unavailable
from vserve.http.events import BodyPart, RequestHead
from vserve.http.exchange import Exchange, Response
from vserve.http.link import Ending
from vserve.http.outbox import Outbox
from vserve.http.replies import STALL_LOOKS, Replies
from vserve.http.router import Route
from vserve.http.site import KnownHead, Site, log
from vserve.http.state import Cause, State
from vserve.http.work import Rest, begin
from vserve.http.writer import CLOSE, CONTINUE

_AT_ONCE = (b"GET ", b"HEAD ")


class Connection(Replies):
    """The protocol of one transport."""

    __slots__ = ("_body_until_s", "_eof", "_fresh", "_owes_continue", "_spoken", "_turn", "_waits")

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._body_until_s = math.inf
        self._owes_continue = False  # the client waits for a 100 before it sends its content
        self._eof = False  # the peer has ended its half while complete requests of it still wait
        self._fresh: bytes | None = None  # a read that began at a request's first byte: it may be a head to remember
        self._spoken = False  # the peer has sent something
        self._turn: asyncio.Handle | None = None  # _advance goes on in the next pass of the loop
        self._waits = False  # what was read is served when its turn comes

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        site = self._site
        self._outbox = Outbox(self._transport, site.limits)
        self.name(transport.get_extra_info("peername"))
        site.greeted(self)
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
        if state >= State.HANDLING or self._turn is not None:
            self._bound_reading()
            return
        if state is State.BODY:
            self.deadline_s = min(self._site.clock() + self._site.limits.body_idle_s, self._body_until_s)
        # Probes come as GET or HEAD and cost little: they do not wait behind prompts.
        if self._waits:
            self._bound_reading()
        elif (state is State.IDLE and data.startswith(_AT_ONCE)) or self._site.turns.free():
            self._advance()
        else:
            self._waits = True
            self._site.turns.wait(self._take_its_turn)
            self._bound_reading()

    def eof_received(self) -> bool | None:
        # RFC 9112 9.6 lets a peer half-close and still read, but a FIN is all that a vanished client sends too, and
        # work for nobody must stop at once: an unanswered request is given up.  Requests that are complete and wait
        # only for a turn or for room in the buffer are still answered.
        if self._waits:
            self._advance()  # it had not been read in time only because others were
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
        self._waits = False
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
        self._serving, self._turn, self._waits = True, None, False
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
            if type(result) is CoroutineType:
                self._site.turns.next(partial(self._begin, exchange, result))
                return
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

    def _begin(self, exchange: Exchange, work: Coroutine[Any, Any, Response | None]) -> None:
        """Run an async handler up to its first wait, and the rest of it as a task."""
        if exchange.ended:  # the client has gone meanwhile
            work.close()
            return
        try:
            result = begin(work)
            if isinstance(result, Rest):
                self._task = self._site.start(result, lambda task: self._finish_task(exchange, task))
            elif result is not None:
                exchange.respond(result)
        except asyncio.CancelledError:
            if not exchange.ended:
                self.abort(exchange)
        except Exception as error:
            self._fail(exchange, error)

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

    # Time and the end

    def flush(self) -> None:
        """Write what is queued, then go on: to the next request, or to the end."""
        if self._state is State.CLOSED or self._ending is Ending.CLOSED:
            return
        self._outbox.flush()
        if self._state is State.CLOSING:
            self._close()
        elif self._state is State.IDLE and self._parser.buffered and self._outbox.writable and not self._due:
            self._advance()

    @property
    def _due(self) -> bool:
        """Whether _advance will be called without anything more happening."""
        return self._turn is not None or self._waits

    def _take_turn(self) -> None:
        if not self._due:
            self._turn = self._site.loop.call_soon(self._advance)

    def _take_its_turn(self) -> None:
        if self._waits:
            self._advance()

    def expire(self, now_s: float) -> None:
        """The deadline of the present state has passed."""
        limits, state = self._site.limits, self._state
        if self._outbox.stalled(now_s):
            self.drop()
            return
        waiting = self._transport.get_write_buffer_size() > 0 or self._due
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
        if not self._waits and (self._state is State.IDLE or (self._state is State.HEAD and self._parser.clean)):
            self._last(Ending.FLUSH)
            self.flush()

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
