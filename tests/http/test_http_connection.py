"""A connection from accept to close, on a transport in memory and a clock set by hand."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes_http import Edge, MemoryTransport, answers, field, run, turns
from vserve.errors import RateLimited, Unauthorized, Unavailable
from vserve.http.events import RequestHead
from vserve.http.exchange import Exchange, Response
from vserve.http.limits import Limits
from vserve.http.router import Route
from vserve.http.site import FLUSH_SLICE

PING = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"
HOLD = b"GET /hold HTTP/1.1\r\nHost: a\r\n\r\n"
WAIT = b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n"
ECHO = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
HELLO = (200, b"hello")


def read(client: MemoryTransport, *methods: str) -> list[tuple[int, bytes]]:
    found = answers(bytes(client.received), methods=methods, closed=client.ended or client.lost)
    return [(response.status_code, body) for response, body in found]


def head_of(client: MemoryTransport, number: int = 0) -> dict[str, str]:
    response, _ = answers(bytes(client.received), closed=client.ended or client.lost)[number]
    return {name.decode(): value.decode() for name, value in response.headers}


async def over(client: MemoryTransport, edge: Edge) -> None:
    """End the connection and check that nothing is left of it."""
    client.vanish()
    await turns()
    site = edge.server.site
    assert (edge.server.connections, edge.server.active, site.bodies_bytes) == (0, 0, 0)
    site.stop_sweeping()


# Requests and replies


def test_a_simple_route_is_answered_within_the_read() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        for number in range(1, 4):  # parsed, remembered, known
            client.send(PING)
            assert (len(read(client)), client.writes) == (number, number)
        assert edge.gated == ["/ping"] * 3
        ids = {head_of(client, number)["x-request-id"] for number in range(3)}
        assert len(ids) == 3
        assert [(entry.method, entry.route, entry.status) for entry in edge.log] == [("GET", "ping", 200)] * 3
        await over(client, edge)

    run(main)


def test_requests_are_served_in_turn_on_one_connection() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        for data in (ECHO, PING, ECHO, PING + ECHO, ECHO[:20], ECHO[20:]):
            client.send(data)
        assert read(client) == [HELLO, (200, b""), HELLO, (200, b""), HELLO, HELLO]
        await over(client, edge)

    run(main)


@pytest.mark.parametrize("cut", range(1, len(PING + ECHO)))
def test_requests_are_answered_the_same_wherever_they_are_cut(cut: int) -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        data = PING + ECHO
        client.send(data[:cut])
        client.send(data[cut:])
        assert read(client) == [(200, b""), HELLO]
        await over(client, edge)

    run(main)


@pytest.mark.promise("R10")
def test_pipelined_answers_keep_their_order_errors_too() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        missing = PING.replace(b"/ping", b"/none")
        client.send(HOLD + PING + missing + WAIT + ECHO + b"BAD\r\n\r\n" + PING)
        assert read(client) == []
        edge.held.last.respond(Response(200, b"first"))
        await turns()
        assert [status for status, _ in read(client)] == [200, 200, 404]
        assert edge.waiter.answer is not None
        edge.waiter.answer.set_result(Response(201, b"fourth"))
        await turns()
        assert [status for status, _ in read(client)] == [200, 200, 404, 201, 200, 400]
        assert client.ended
        assert (read(client)[0][1], read(client)[3][1]) == (b"first", b"fourth")
        await over(client, edge)

    run(main)


def test_replies_made_in_one_read_are_one_write() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(PING * 10)
        assert (len(read(client)), client.writes) == (10, 1)
        await over(client, edge)

    run(main)


def test_many_pipelined_requests_leave_the_loop_its_turns() -> None:
    async def main() -> None:
        edge = Edge(Limits(turn_events=8))
        client = edge.connect()
        client.send(PING * 20)
        assert len(read(client)) == 4
        await turns(1)
        assert len(read(client)) == 8
        client.finish()  # complete requests are still answered
        await turns(8)
        assert len(read(client)) == 20
        assert client.lost
        await over(client, edge)

    run(main)


@pytest.mark.promise("R8")
def test_what_is_read_ahead_is_bounded() -> None:
    async def main() -> None:
        edge = Edge(Limits(pipeline_bytes=1000))
        client = edge.connect()
        client.send(HOLD)
        for _ in range(100):
            client.send(PING)
        assert not client.is_reading()
        assert client.protocol._parser.buffered <= 1000 + len(PING)
        edge.held.last.respond(Response(200))
        await turns(20)
        assert client.is_reading()
        assert len(read(client)) == 101
        await over(client, edge)

    run(main)


def test_a_client_that_pipelines_and_does_not_read_is_not_served_further() -> None:
    async def main() -> None:
        edge = Edge(Limits(pipeline_bytes=1000, write_high_bytes=500, write_low_bytes=100, turn_events=4))
        client = edge.connect()
        client.peer_reads = False
        for _ in range(200):
            client.send(PING)
            await turns(1)
        assert not client.is_reading()
        assert client.get_write_buffer_size() < 1000
        served = len(edge.log)
        assert served < 10
        while client.get_write_buffer_size():
            client.read(200)
            await turns(4)
        assert len(answers(bytes(client.received))) == 200
        await over(client, edge)

    run(main)


def test_a_route_without_content_throws_it_away() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(ECHO.replace(b"/echo", b"/deaf") + PING)
        assert read(client) == [(200, b""), (200, b"")]
        await over(client, edge)

    run(main)


def test_head_gets_the_fields_of_get() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(PING.replace(b"GET /ping", b"HEAD /items/abc") + PING)
        assert read(client, "HEAD") == [(200, b""), (200, b"")]
        assert b"content-length: 3\r\n" in client.received
        await over(client, edge)

    run(main)


def test_a_streamed_reply_to_head_has_no_content() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(HOLD.replace(b"GET", b"HEAD"))
        exchange = edge.held.last
        exchange.start_stream(200, "text/plain")
        exchange.write(b"x")
        exchange.end()
        await turns()
        client.send(PING)
        assert read(client, "HEAD") == [(200, b""), (200, b"")]
        await over(client, edge)

    run(main)


@pytest.mark.parametrize(
    ("target", "status", "allow"),
    [
        (b"/ping", 204, "GET, HEAD, OPTIONS"),
        (b"/hold", 204, "GET, HEAD, OPTIONS, POST"),
        (b"*", 204, "GET, HEAD, OPTIONS, POST"),
        (b"/x", 404, None),
    ],
)
def test_options_is_answered_with_allow(target: bytes, status: int, allow: str | None) -> None:
    async def main() -> None:
        edge = Edge()
        edge.refusal = Unauthorized("no")
        client = edge.connect()
        client.send(b"OPTIONS " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        ((response, _),) = answers(bytes(client.received))
        assert response.status_code == status
        assert allow is None or field(response, "allow") == allow
        await over(client, edge)

    run(main)


def test_a_route_of_its_own_for_options_comes_first() -> None:
    async def main() -> None:
        edge = Edge(extra=[Route("OPTIONS", "/ping", lambda _: Response(200, b"mine"), "preflight")])
        client = edge.connect()
        client.send(PING.replace(b"GET", b"OPTIONS"))
        assert read(client) == [(200, b"mine")]
        await over(client, edge)

    run(main)


@pytest.mark.parametrize(
    ("given", "echoed"),
    [(b"abc-1", True), (b"!" * 128, True), (b"!" * 129, False), (b"", False), (b"a b", False), (b"\xe9", False)],
)
@pytest.mark.promise("input: ids chosen by clients", "input: control characters")
def test_a_request_id_is_echoed_only_if_it_is_short_and_visible(given: bytes, echoed: bool) -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        for _ in range(2):
            client.send(PING.replace(b"\r\n\r\n", b"\r\nX-Request-Id: " + given + b"\r\n\r\n"))
        for number in range(2):
            assert (head_of(client, number)["x-request-id"] == given.decode("latin-1")) == echoed
        await over(client, edge)

    run(main)


def test_reply_headers_are_on_every_reply_to_a_parsed_head() -> None:
    def cors(head: RequestHead) -> tuple[tuple[str, str], ...]:
        origin = head.headers.get("origin")
        return (("access-control-allow-origin", origin),) if origin is not None else ()

    async def main() -> None:
        edge = Edge(reply_headers=cors)
        client = edge.connect()
        for path in (b"/ping", b"/ping", b"/none", b"/hold"):
            client.send(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\nOrigin: http://o\r\n\r\n")
        edge.held.last.start_stream(200, "text/plain")
        edge.held.last.end()
        await turns()
        assert [head_of(client, number)["access-control-allow-origin"] for number in range(4)] == ["http://o"] * 4
        await over(client, edge)

    run(main)


# Refusals


@pytest.mark.parametrize(
    ("error", "status", "extra"),
    [
        (Unauthorized("no key"), 401, ("www-authenticate", "Bearer")),
        (RateLimited("busy", retry_after_s=7), 429, ("retry-after", "7")),
        (Unavailable("draining", retry_after_s=1, close=True), 503, ("connection", "close")),
    ],
)
def test_the_gate_refuses_before_the_body_is_read(error: Unauthorized, status: int, extra: tuple[str, str]) -> None:
    async def main() -> None:
        edge = Edge()
        edge.refusal = error
        client = edge.connect()
        client.send(ECHO[:-5])
        ((response, _),) = answers(bytes(client.received), closed=True)
        assert response.status_code == status
        assert field(response, extra[0]) == extra[1]
        assert field(response, "connection") == "close"
        assert client.ended, "the content is unread, so the connection cannot go on"
        assert edge.gated == ["/echo"]
        client.send(b"hello")
        client.finish()
        await turns()
        assert client.lost
        await over(client, edge)

    run(main)


def test_a_refused_request_whose_content_is_here_keeps_the_connection() -> None:
    async def main() -> None:
        edge = Edge()
        edge.refusal = RateLimited("busy")
        client = edge.connect()
        client.send(ECHO)
        edge.refusal = None
        client.send(ECHO)
        assert [status for status, _ in read(client)] == [429, 200]
        await over(client, edge)

    run(main)


def test_a_known_head_still_passes_the_gate() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(PING)
        client.send(PING)
        edge.refusal = Unavailable("draining", close=True)
        client.send(PING)
        await turns()
        assert [status for status, _ in read(client)] == [200, 200, 503]
        assert client.lost
        await over(client, edge)

    run(main)


def test_a_read_of_several_requests_is_not_remembered_as_one() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(PING * 2)
        client.send(PING * 2)
        client.send(PING + ECHO[:10])
        client.send(ECHO[10:])
        client.send(PING + ECHO[:10])
        assert len(read(client)) == 7
        await over(client, edge)

    run(main)


def test_heads_that_differ_or_hold_a_key_are_not_remembered() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        for number in range(1000):
            client.send(PING.replace(b"Host: a", b"Host: a%d" % number))
        client.send(PING.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer k\r\n\r\n"))
        client.send(PING.replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 2000 + b"\r\n\r\n"))
        known = edge.server.site.known
        assert len(known) <= 256
        assert not any(b"Bearer" in data or len(data) > 1024 for data in known)
        await over(client, edge)

    run(main)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"\x16\x03\x01", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 33554433\r\n\r\n", 413),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\nContent-Length: 1\r\n\r\n", 417),
    ],
)
@pytest.mark.promise("R10")
def test_what_the_parser_refuses_closes_the_connection(data: bytes, status: int) -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(PING + data)
        client.send(PING)
        assert [code for code, _ in read(client)] == [200, status]
        assert head_of(client, 1)["connection"] == "close"
        assert client.ended
        assert edge.log[-1].status == status
        await over(client, edge)

    run(main)


def test_a_refused_client_has_time_to_read_but_not_for_ever() -> None:
    async def main() -> None:
        edge = Edge(Limits(linger_bytes=1000))
        idle, noisy = edge.connect(), edge.connect()
        idle.send(b"BAD\r\n\r\n")
        idle.send(b"x" * 900)
        noisy.send(b"BAD\r\n\r\n")
        noisy.send(b"x" * 1001)
        assert (idle.aborted, noisy.aborted) == (False, True)
        edge.pass_time(4.9)
        assert not idle.aborted
        edge.pass_time(0.2)
        await turns()
        assert (idle.aborted, idle.lost) == (True, True)
        await over(noisy, edge)

    run(main)


def test_a_client_that_waits_for_it_is_told_to_continue_once() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(ECHO[:-9] + b"\r\nExpect: 100-continue\r\n\r\n")
        assert bytes(client.received) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"hel")
        client.send(b"lo")
        assert bytes(client.received).count(b"100 Continue") == 1
        assert read(client)[-1] == HELLO
        await over(client, edge)

    run(main)


@pytest.mark.parametrize("content", [b"h", b"hello"])
def test_a_client_that_does_not_wait_is_not_told_to_continue(content: bytes) -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(ECHO[:-9] + b"\r\nExpect: 100-continue\r\n\r\n" + content)
        client.send(b"hello"[len(content) :])
        assert read(client) == [HELLO]
        await over(client, edge)

    run(main)


def test_a_client_that_has_begun_a_chunk_is_not_told_to_continue() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        head = b"POST /echo HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.send(head + b"5\r")
        client.send(b"\nhello\r\n0\r\n\r\n")
        assert read(client) == [HELLO]
        await over(client, edge)

    run(main)


def test_a_client_that_waits_is_refused_without_continue() -> None:
    async def main() -> None:
        edge = Edge(Limits(body_bytes=4))
        client = edge.connect()
        client.send(ECHO[:-9] + b"\r\nExpect: 100-continue\r\n\r\n")
        assert [status for status, _ in read(client)] == [413]
        await over(client, edge)

    run(main)


@pytest.mark.promise("R8")
def test_all_bodies_together_are_bounded() -> None:
    async def main() -> None:
        edge = Edge(Limits(in_flight_bytes=8))
        first, second = edge.connect(), edge.connect()
        first.send(ECHO[:-1])
        second.send(ECHO.replace(b"/echo", b"/hold"))
        assert [status for status, _ in read(second)] == [503]
        first.send(b"o")
        assert read(first) == [HELLO]
        assert edge.server.site.bodies_bytes == 0
        second.vanish()
        await over(first, edge)

    run(main)


def test_one_connection_too_many_gets_vital_routes_only() -> None:
    async def main() -> None:
        edge = Edge(Limits(connections=1, spare_connections=2))
        first, second, third, fourth = (edge.connect() for _ in range(4))
        await turns()
        assert fourth.lost
        second.send(PING)
        third.send(HOLD)
        await turns()
        assert ([status for status, _ in read(second)], [status for status, _ in read(third)]) == ([200], [503])
        assert head_of(third)["retry-after"] == "1"
        assert (second.lost, third.lost) == (True, True)
        first.send(PING)
        assert [status for status, _ in read(first)] == [200]
        await over(first, edge)

    run(main)


def test_connections_of_one_address_are_bounded() -> None:
    async def main() -> None:
        edge = Edge(Limits(connections_per_address=1))
        first, other = edge.connect(("192.0.2.1", 1)), edge.connect(("192.0.2.2", 1))
        second = edge.connect(("192.0.2.1", 2))
        for client, status in ((first, 404), (other, 404), (second, 404)):
            client.send(b"GET /none HTTP/1.1\r\nHost: a\r\n\r\n")
            assert [code for code, _ in read(client)] == [status]
        third = edge.connect(("192.0.2.1", 3))
        third.send(ECHO)
        assert [code for code, _ in read(third)] == [429]
        for client in (first, other, second, third):
            client.vanish()
        assert edge.server.site._per_address == {}
        edge.server.site.stop_sweeping()

    run(main)


# Handlers


def test_an_async_handler_runs_as_one_task() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(WAIT)
        await turns()
        assert edge.server.active == 1
        assert edge.waiter.answer is not None
        edge.waiter.answer.set_result(Response(200, b"late"))
        await turns()
        assert read(client) == [(200, b"late")]
        await over(client, edge)

    run(main)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_bug_in_a_handler_is_a_500_with_the_request_id(asynchronous: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def fail_later(_: Exchange) -> Response:
        await asyncio.sleep(0)
        raise ZeroDivisionError("a secret detail")

    async def main() -> None:
        edge = Edge(extra=[Route("GET", "/later", fail_later, "later")])
        client = edge.connect()
        path = b"/later" if asynchronous else b"/fail"
        client.send(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\nX-Request-Id: my-id\r\n\r\n" + PING)
        await turns()
        (status, body), (after, _) = read(client)
        assert (status, after) == (500, 200)
        assert b"my-id" in body
        assert b"secret" not in body
        await over(client, edge)

    with caplog.at_level(logging.ERROR, "vserve.http"):
        run(main)
    assert "ZeroDivisionError" in caplog.text


def test_an_api_error_of_a_handler_is_rendered() -> None:
    def refuse(_: Exchange) -> Response:
        raise RateLimited("full", retry_after_s=3)

    async def main() -> None:
        edge = Edge(extra=[Route("GET", "/full", refuse, "full")])
        client = edge.connect()
        client.send(b"GET /full HTTP/1.1\r\nHost: a\r\n\r\n" + PING)
        assert [status for status, _ in read(client)] == [429, 200]
        assert head_of(client)["retry-after"] == "3"
        await over(client, edge)

    run(main)


@pytest.mark.parametrize("headers", [(("x", "a\r\nb: c"),), (("x", "…"),), (("no name", "x"),)])
def test_a_reply_with_a_bad_header_is_a_500(headers: tuple[tuple[str, str], ...]) -> None:
    async def main() -> None:
        edge = Edge(extra=[Route("GET", "/bad", lambda _: Response(200, b"x", headers=headers), "bad")])
        client = edge.connect()
        client.send(b"GET /bad HTTP/1.1\r\nHost: a\r\n\r\n" + PING)
        assert [status for status, _ in read(client)] == [500, 200]
        await over(client, edge)

    run(main)


def test_a_stream_with_a_bad_header_is_a_500() -> None:
    def bad(exchange: Exchange) -> None:
        exchange.start_stream(200, "text/plain", (("x", "\n"),))

    async def main() -> None:
        edge = Edge(extra=[Route("GET", "/bad", bad, "bad")])
        client = edge.connect()
        client.send(b"GET /bad HTTP/1.1\r\nHost: a\r\n\r\n" + PING)
        assert [status for status, _ in read(client)] == [500, 200]
        await over(client, edge)

    run(main)


def test_a_second_reply_is_an_error_and_does_not_reach_the_client() -> None:
    def twice(exchange: Exchange) -> Response:
        exchange.respond(Response(200, b"first"))
        return Response(200, b"second")

    async def main() -> None:
        edge = Edge(extra=[Route("GET", "/twice", twice, "twice")])
        client = edge.connect()
        client.send(b"GET /twice HTTP/1.1\r\nHost: a\r\n\r\n" + PING)
        assert read(client) == [(200, b"first"), (200, b"")]
        client.send(HOLD)
        exchange = edge.held.last
        with pytest.raises(RuntimeError, match="stream"):
            exchange.write(b"x")
        with pytest.raises(RuntimeError, match="stream"):
            exchange.end()
        exchange.start_stream(200, "text/plain")
        with pytest.raises(RuntimeError, match="stream"):
            exchange.start_stream(200, "text/plain")
        with pytest.raises(RuntimeError, match="stream"):
            exchange.respond(Response(200))
        exchange.end()
        with pytest.raises(RuntimeError, match="ended"):
            exchange.write(b"x")
        await over(client, edge)

    run(main)


# Streams


def test_a_stream_is_chunked_and_joined_within_one_pass_of_the_loop() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(HOLD)
        exchange = edge.held.last
        exchange.start_stream(200, "text/event-stream", (("cache-control", "no-cache"),))
        exchange.write(b"a")
        exchange.write(b"")
        exchange.write(b"b")
        assert client.writes == 0
        await turns(1)
        assert client.writes == 1
        assert bytes(client.received).endswith(b"\r\n\r\n2\r\nab\r\n")
        exchange.write(b"c")
        exchange.end()
        await turns(1)
        assert client.writes == 2
        assert read(client) == [(200, b"abc")]
        assert "connection" not in head_of(client)
        client.send(PING)
        assert read(client) == [(200, b"abc"), (200, b"")]
        assert (edge.log[0].body_bytes, edge.log[0].status) == (3, 200)
        await over(client, edge)

    run(main)


def test_many_streams_are_flushed_in_slices() -> None:
    async def main() -> None:
        edge = Edge()
        clients = [edge.connect() for _ in range(100)]
        for client in clients:
            client.send(HOLD)
        for exchange in edge.held.exchanges:
            exchange.start_stream(200, "text/plain")
            exchange.write(b"x")
        written = [0]
        while written[-1] < 100:
            await turns(1)
            written.append(sum(client.writes for client in clients))
        assert written == [*range(0, 100, FLUSH_SLICE), 100]
        assert [client.writes for client in clients] == [1] * 100
        await edge.server.close(0)
        assert (edge.server.connections, edge.held.gone) == (0, 100)

    run(main)


@pytest.mark.parametrize("fields", [b"", b"Connection: keep-alive\r\n"])
def test_a_stream_to_a_1_0_client_ends_with_the_connection(fields: bytes) -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(b"GET /hold HTTP/1.0\r\n" + fields + b"\r\n")
        exchange = edge.held.last
        exchange.start_stream(200, "text/plain")
        exchange.write(b"abc")
        exchange.end()
        await turns()
        head, _, body = bytes(client.received).partition(b"\r\n\r\n")
        assert body == b"abc"
        assert b"chunked" not in head
        assert b"connection: close" in head
        assert client.lost
        await over(client, edge)

    run(main)


def test_a_1_0_client_may_keep_its_connection() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        request = b"GET /ping HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
        client.send(request)
        client.send(request)
        assert head_of(client)["connection"] == "keep-alive"
        client.send(b"GET /ping HTTP/1.0\r\n\r\n")
        await turns()
        assert len(read(client)) == 3
        assert client.lost
        await over(client, edge)

    run(main)


def test_close_is_obeyed() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(PING.replace(b"Host: a", b"Host: a\r\nConnection: close") + PING)
        await turns()
        assert len(read(client)) == 1
        assert head_of(client)["connection"] == "close"
        assert client.lost
        await over(client, edge)

    run(main)


def test_a_stream_stops_at_the_high_mark_and_goes_on_at_the_low_one() -> None:
    async def main() -> None:
        edge = Edge(Limits(write_high_bytes=100, write_low_bytes=20))
        client = edge.connect()
        client.peer_reads = False
        client.send(HOLD)
        exchange = edge.held.last
        calls: list[bool] = []
        exchange.on_writable = lambda: calls.append(exchange.writable)
        exchange.start_stream(200, "text/plain")
        exchange.write(b"x" * 200)
        await turns(1)
        assert not exchange.writable
        client.read(10_000)
        assert calls == [True]
        exchange.end()
        await turns()
        client.read(10_000)
        assert read(client) == [(200, b"x" * 200)]
        await over(client, edge)

    run(main)


@pytest.mark.promise("R8", "R9")
def test_a_stream_that_is_written_to_regardless_is_cut_at_its_bound() -> None:
    async def main() -> None:
        edge = Edge(Limits(write_high_bytes=100, stream_buffer_bytes=1000))
        client = edge.connect()
        client.peer_reads = False
        client.send(HOLD)
        exchange = edge.held.last
        exchange.start_stream(200, "text/plain")
        exchange.write(b"x" * 5000)  # one large piece is fine: the stream was writable
        await turns(1)
        pieces = 0
        while not client.aborted and pieces < 100:
            exchange.write(b"x" * 99)
            pieces += 1
        assert pieces == 11
        await turns()
        assert (exchange.gone, edge.held.gone) == (True, 1)
        exchange.write(b"x")  # accepted, and nothing happens
        exchange.end()
        await over(client, edge)

    run(main)


@pytest.mark.parametrize(("version", "aborted"), [(b"1.1", False), (b"1.0", True)])
def test_a_stream_whose_handler_fails_is_seen_to_be_cut(version: bytes, aborted: bool) -> None:
    async def broken(exchange: Exchange) -> None:
        exchange.start_stream(200, "text/plain")
        exchange.write(b"half")
        await asyncio.sleep(0)
        raise ZeroDivisionError

    async def main() -> None:
        edge = Edge(extra=[Route("GET", "/broken", broken, "broken")])
        client = edge.connect()
        client.send(b"GET /broken HTTP/" + version + b"\r\nHost: a\r\n\r\n")
        await turns()
        assert client.received.endswith(b"\r\n\r\n4\r\nhalf\r\n" if version == b"1.1" else b"\r\n\r\nhalf")
        assert client.lost
        assert client.aborted == aborted
        await over(client, edge)

    run(main)


def test_an_aborted_exchange_cuts_the_connection() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(HOLD)
        edge.held.last.abort()
        await turns()
        assert (client.aborted, edge.held.gone, edge.server.active) == (True, 0, 0)
        await over(client, edge)

    run(main)


# The client goes away


@pytest.mark.parametrize("how", ["vanish", "finish"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_vanished_client_is_told_to_its_exchange_once(how: str, streaming: bool) -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(HOLD + PING)
        exchange = edge.held.last
        if streaming:
            exchange.start_stream(200, "text/plain")
            await turns()
        getattr(client, how)()
        assert (exchange.gone, edge.held.gone, edge.server.active) == (True, 1, 0)
        await turns()
        assert client.lost
        assert edge.held.gone == 1
        exchange.respond(Response(200))
        assert not exchange.writable
        entry = edge.log[-1]
        assert (entry.gone, entry.status) == (True, 200 if streaming else 0)
        await over(client, edge)

    run(main)


@pytest.mark.parametrize("how", ["vanish", "finish"])
@pytest.mark.parametrize("passes", [0, 3])
def test_the_task_of_a_vanished_client_is_cancelled(how: str, passes: int) -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(WAIT)
        await turns(passes)
        getattr(client, how)()
        await turns()
        assert edge.waiter.cancelled == edge.waiter.started == 1
        await over(client, edge)

    run(main)


@pytest.mark.parametrize("part", [0, 1, 20, len(ECHO) - 5, len(ECHO) - 1])
@pytest.mark.parametrize("how", ["vanish", "finish"])
def test_a_client_that_goes_in_the_middle_of_a_request_leaves_nothing(part: int, how: str) -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(ECHO[:part])
        getattr(client, how)()
        await turns()
        assert client.lost
        assert client.received == b""
        await over(client, edge)

    run(main)


def test_a_client_that_ends_its_half_after_a_request_gets_the_answer() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(PING + ECHO)
        client.finish()
        await turns()
        assert read(client) == [(200, b""), HELLO]
        assert client.lost
        await over(client, edge)

    run(main)


def test_a_reply_on_its_way_reaches_a_client_that_ends_its_half() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(HOLD)
        edge.held.last.respond(Response(200, b"just in time"))
        client.finish()
        await turns()
        assert read(client) == [(200, b"just in time")]
        assert edge.held.gone == 0
        await over(client, edge)

    run(main)


def test_a_failing_callback_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(HOLD)
        edge.held.last.on_gone = broken
        await over(client, edge)

    run(main)
    assert "ZeroDivisionError" in caplog.text


# Time


def test_an_idle_connection_is_closed_silently() -> None:
    async def main() -> None:
        edge = Edge()
        fresh, used = edge.connect(), edge.connect()
        edge.pass_time(50)
        used.send(PING)
        edge.pass_time(26)
        await turns()
        assert (fresh.lost, bytes(fresh.received), used.lost) == (True, b"", False)
        edge.pass_time(50)
        await turns()
        assert used.lost
        assert len(read(used)) == 1
        await over(used, edge)

    run(main)


@pytest.mark.promise("R9")
def test_a_head_that_drips_gets_ten_seconds_in_all() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        for byte in range(11):
            client.send(PING[byte : byte + 1])
            edge.pass_time(0.95)
            await turns(1)
        await turns()
        assert [status for status, _ in read(client)] == [408]
        assert client.ended
        edge.pass_time(6)
        await turns()
        assert client.lost
        await over(client, edge)

    run(main)


def test_an_empty_line_and_silence_is_closed_without_a_word() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(b"\r\n")
        edge.pass_time(11)
        await turns()
        assert (client.lost, bytes(client.received)) == (True, b"")
        await over(client, edge)

    run(main)


@pytest.mark.parametrize(("pause_s", "bytes_sent"), [(31.0, 1), (29.0, 11)])
@pytest.mark.promise("R9", "fault: slow writers")
def test_a_body_has_a_bound_on_silence_and_on_its_whole_time(pause_s: float, bytes_sent: int) -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n")
        sent = 0
        while not client.received:
            client.send(b"x")
            sent += 1
            edge.pass_time(pause_s)
            await turns(2)
        assert sent == bytes_sent
        assert [status for status, _ in read(client)] == [408]
        assert client.ended
        await over(client, edge)

    run(main)


def test_a_handler_may_take_its_time() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(HOLD)
        for _ in range(100):
            edge.pass_time(60)
        edge.held.last.respond(Response(200, b"at last"))
        await turns()
        assert read(client) == [(200, b"at last")]
        await over(client, edge)

    run(main)


@pytest.mark.parametrize("rate", [0, 1])
@pytest.mark.promise("R9")
def test_a_reader_that_stalls_is_dropped(rate: int) -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.peer_reads = False
        client.send(HOLD)
        exchange = edge.held.last
        exchange.start_stream(200, "text/plain")
        exchange.write(b"x" * 100_000)
        await turns(1)
        seconds = 0
        while not client.aborted and seconds < 300:
            client.read(rate)  # a byte a second is no reading
            edge.pass_time(1)
            seconds += 1
        assert 60 <= seconds <= 75
        await turns()
        assert edge.held.gone == 1
        await over(client, edge)

    run(main)


def test_a_slow_reader_that_reads_is_kept() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.peer_reads = False
        client.send(b"GET /items/" + b"y" * 50 + b" HTTP/1.1\r\nHost: a\r\n\r\n" + HOLD)
        edge.held.last.respond(Response(200, b"x" * 1_000_000))
        await turns(1)
        for _ in range(400):
            client.read(2500)
            edge.pass_time(1)
            await turns(1)
            assert not client.aborted
        client.read(10_000)
        assert [len(body) for _, body in read(client)] == [50, 1_000_000]
        await over(client, edge)

    run(main)


def test_a_closing_connection_whose_peer_does_not_read_ends_too() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.peer_reads = False
        client.send(b"GET /hold HTTP/1.0\r\n\r\n")
        edge.held.last.respond(Response(200, b"x" * 1_000_000))
        await turns()
        for _ in range(100):
            edge.pass_time(1)
        await turns()
        assert client.aborted
        await over(client, edge)

    run(main)


# Drain and close


def test_drain_closes_idle_connections_and_ends_the_others_with_their_reply() -> None:
    async def main() -> None:
        edge = Edge()
        idle, busy, streaming, partial = (edge.connect() for _ in range(4))
        idle.send(PING)
        busy.send(HOLD)
        streaming.send(HOLD)
        edge.held.last.start_stream(200, "text/plain")
        partial.send(PING[:5])
        edge.server.drain()
        await turns()
        assert (idle.lost, busy.lost, streaming.lost, partial.lost) == (True, False, False, False)
        partial.send(PING[5:])
        edge.held.exchanges[0].respond(Response(200, b"done"))
        edge.held.exchanges[1].end()
        await turns()
        assert head_of(busy)["connection"] == head_of(partial)["connection"] == "close"
        assert (busy.lost, streaming.lost, partial.lost) == (True, True, True)
        edge.server.site.stop_sweeping()

    run(main)


def test_a_connection_whose_first_request_is_on_its_way_is_still_answered_while_draining() -> None:
    async def main() -> None:
        edge = Edge()
        early, silent = edge.connect(), edge.connect()
        edge.server.drain()
        await turns()
        assert not early.lost
        early.send(PING)
        await turns()
        assert head_of(early)["connection"] == "close"
        assert early.lost
        assert not silent.lost
        edge.clock.now_s += Limits().header_s + 0.1
        edge.server.site.sweep(edge.clock())
        await turns()
        assert silent.lost
        edge.server.site.stop_sweeping()

    run(main)


def test_close_waits_for_what_is_in_flight() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(HOLD)
        closing = asyncio.create_task(edge.server.close(30))
        await turns()
        assert not closing.done()
        edge.held.last.respond(Response(200, b"done"))
        await closing
        assert read(client) == [(200, b"done")]
        assert edge.server.connections == 0

    run(main)


def test_close_cuts_what_is_left_after_its_grace() -> None:
    async def main() -> None:
        edge = Edge()
        held, waiting, partial = (edge.connect() for _ in range(3))
        held.send(HOLD)
        waiting.send(WAIT)
        partial.send(ECHO[:-1])
        await turns()
        await edge.server.close(0)
        assert (edge.held.gone, edge.waiter.cancelled) == (1, 1)
        assert (held.lost, waiting.lost, partial.lost) == (True, True, True)
        assert (edge.server.connections, edge.server.active) == (0, 0)

    run(main)


# Anything at all

SENT = [PING, HOLD, WAIT, ECHO, ECHO[:-2], b"lo", b"\r\n", b"BAD\r\n\r\n", PING[:9], PING[9:], PING * 3]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.sampled_from(SENT)),
        st.tuples(st.just("time"), st.sampled_from([0.5, 9.0, 31.0, 76.0])),
        st.tuples(st.just("answer"), st.sampled_from([b"", b"x" * 10, b"y" * 3000])),
        st.tuples(st.just("stream"), st.sampled_from([b"", b"z", b"z" * 700])),
        st.tuples(st.just("read"), st.sampled_from([1, 100, 10_000])),
        st.tuples(st.just("turn"), st.just(1)),
        st.tuples(st.just("finish"), st.just(1)),
    ),
    max_size=25,
)


@settings(max_examples=400, deadline=None)
@given(steps=STEPS, reads=st.booleans())
def test_whatever_happens_nothing_is_left_and_every_exchange_ends_once(
    steps: list[tuple[str, bytes | float]], reads: bool
) -> None:
    async def main() -> None:
        edge = Edge(
            Limits(
                write_high_bytes=1000, write_low_bytes=100, pipeline_bytes=200, turn_events=4, stream_buffer_bytes=2000
            )
        )
        client = edge.connect()
        client.peer_reads = reads
        for kind, value in steps:
            open_ones = [exchange for exchange in edge.held.exchanges if not exchange.ended]
            if kind == "send" and isinstance(value, bytes):
                client.send(value)
            elif kind == "time":
                edge.pass_time(float(value))
            elif kind == "answer" and isinstance(value, bytes) and open_ones and not open_ones[0].status:
                open_ones[0].respond(Response(200, value))
            elif kind == "stream" and isinstance(value, bytes) and open_ones:
                if not open_ones[0].status:
                    open_ones[0].start_stream(200, "text/plain")
                open_ones[0].write(value)
                if len(value) == 1:
                    open_ones[0].end()
            elif kind == "read" and not client.lost:
                client.read(int(value))
            elif kind == "finish":
                client.finish()
            else:
                await turns(1)
            assert client.get_write_buffer_size() < 12_000
        await edge.server.close(0)
        assert all(exchange.ended for exchange in edge.held.exchanges)
        assert (edge.server.connections, edge.server.active, edge.server.site.bodies_bytes) == (0, 0, 0)
        parsed = [entry for entry in edge.log if entry.method is not None]
        assert sum(entry.route == "hold" for entry in parsed) == len(edge.held.exchanges)

    run(main)
