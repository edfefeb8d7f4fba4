"""What all connections hold together, what one may have waiting, and peers that end while nobody reads from them."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from tests.fakes_http import Edge, answers, run, turns
from vserve.http.exchange import Response
from vserve.http.limits import Limits

PING = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"
ITEM = b"GET /items/x HTTP/1.1\r\nHost: a\r\n\r\n"
HOLD = b"GET /hold HTTP/1.1\r\nHost: a\r\n\r\n"


def echo(size: int, sent: int | None = None) -> bytes:
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size
    return head + b"x" * (size if sent is None else sent)


def statuses(data: bytearray, closed: bool = False) -> list[int]:
    return [response.status_code for response, _ in answers(bytes(data), closed=closed)]


def test_new_work_gets_503_above_nine_tenths_of_the_bytes_in_flight_and_probes_do_not() -> None:
    async def main() -> None:
        edge = Edge(Limits(in_flight_bytes=1000))
        first = edge.connect()
        first.send(echo(950, sent=901))
        for data, wanted in ((ITEM, 503), (PING, 200), (echo(5), 503)):
            client = edge.connect()
            client.send(data)
            assert statuses(client.received, closed=client.ended) == [wanted]
            client.vanish()
        first.send(b"x" * 49)  # what has begun may end
        assert statuses(first.received) == [200]
        client = edge.connect()
        client.send(ITEM)
        assert statuses(client.received) == [200]
        first.vanish()
        client.vanish()

    run(main)


def test_a_body_that_has_no_room_is_refused_by_its_announced_length() -> None:
    async def main() -> None:
        edge = Edge(Limits(in_flight_bytes=1000, body_bytes=1000))
        first, second, third = edge.connect(), edge.connect(), edge.connect()
        first.send(echo(600, sent=500))
        second.send(echo(501, sent=0))
        assert statuses(second.received, closed=True) == [503]
        third.send(echo(1001, sent=0))  # would never fit: the better reason
        assert statuses(third.received, closed=True) == [413]
        for client in (first, second, third):
            client.vanish()
        assert edge.server.site.in_flight_bytes == 0

    run(main)


def test_what_waits_for_slow_clients_counts_and_who_passes_the_bound_is_cut_off() -> None:
    async def main() -> None:
        edge = Edge(
            Limits(in_flight_bytes=4000, write_high_bytes=500, write_low_bytes=100, stream_buffer_bytes=100_000)
        )
        site = edge.server.site
        slow = edge.connect()
        slow.peer_reads = False
        slow.send(HOLD)
        edge.held.last.start_stream(200, "text/plain")
        edge.held.last.write(b"x" * 1000)
        await turns()
        assert site.behind_bytes > 1000
        edge.held.last.write(b"x" * 2700)
        other = edge.connect()
        other.send(ITEM)
        assert statuses(other.received, closed=True) == [503]
        slow.read(10_000)
        await turns()
        assert site.behind_bytes < 2800
        slow.read(10_000)
        await turns()
        assert site.behind_bytes == 0
        edge.held.last.write(b"x" * 5000)
        await turns()
        edge.held.last.write(b"x")
        await turns()
        assert slow.aborted
        assert site.behind_bytes == 0
        other.vanish()

    run(main)


@pytest.mark.parametrize("at_once", [True, False])
def test_more_pipelined_requests_than_allowed_end_the_connection_behind_the_reply_in_hand(at_once: bool) -> None:
    async def main() -> None:
        edge = Edge(Limits(pipelined_requests=3))
        fine = edge.connect()
        fine.send(HOLD + PING * 3)
        edge.held.last.respond(Response(200))
        await turns()
        assert statuses(fine.received) == [200] * 4
        fine.send(PING * 4)  # the first is in hand, three wait
        assert len(statuses(fine.received)) == 8
        client = edge.connect()
        if at_once:
            client.send(HOLD + PING * 4)
        else:
            client.send(HOLD)
            for _ in range(4):
                client.send(PING)
        edge.held.last.respond(Response(200))
        await turns()
        assert statuses(client.received, closed=True) == [200]
        assert b"connection: close" in client.received
        assert client.ended
        fine.vanish()
        client.vanish()

    run(main)


@pytest.mark.parametrize("end", ["fin", "rst"])
def test_a_client_that_vanishes_while_nothing_is_read_from_it_is_noticed_by_the_sweep(end: str) -> None:
    async def main() -> None:
        edge = Edge(Limits(pipeline_bytes=1000))
        await edge.server.listen("127.0.0.1", 0)
        _, writer = await asyncio.open_connection("127.0.0.1", edge.server.port)
        writer.write(HOLD + PING * 200)
        gone: list[bool] = []
        while not edge.server.site.deaf:
            await asyncio.sleep(0)
        exchange = edge.held.last
        exchange.on_gone = lambda: gone.append(True)
        edge.server.site.look_for_ends()
        assert not gone
        sock = writer.get_extra_info("socket")
        if end == "rst":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        while not gone:
            edge.server.site.look_for_ends()
            await asyncio.sleep(0)
        while edge.server.connections:
            await asyncio.sleep(0)
        assert (edge.server.active, edge.server.site.deaf) == (0, set())
        await edge.server.close(1.0)

    run(main)


def test_a_client_that_ends_its_half_and_reads_slowly_still_gets_what_it_asked_for() -> None:
    async def main() -> None:
        edge = Edge(Limits(pipeline_bytes=200, write_high_bytes=500, write_low_bytes=100, turn_events=4))
        await edge.server.listen("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.server.port)
        writer.write(PING * 100)
        writer.write_eof()
        data = await asyncio.wait_for(reader.read(), 30)
        assert statuses(bytearray(data), closed=True) == [200] * 100
        writer.close()
        await edge.server.close(1.0)

    run(main)
