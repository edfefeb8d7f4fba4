"""Every reply says how long it took, and a stream has fields behind it for a client that asks for them."""

from __future__ import annotations

import h11
import pytest

from tests.fakes_http import Edge, answers, field, run, turns
from vserve.http.exchange import Exchange, Response

TRAILERS = (("server-timing", "decode;dur=1.5"),)


def ask(path: str, *lines: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/{version}", "Host: a", *lines, "", "")).encode()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (ask("/ping"), 200),
        (ask("/ping", method="HEAD"), 200),
        (ask("/nowhere"), 404),
        (ask("/echo"), 405),
        (ask("/fail"), 500),
        (ask("/ping", version="1.0"), 200),
    ],
)
def test_every_reply_to_a_request_says_how_long_it_took(sent: bytes, status: int) -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(sent)
        await turns()
        method = sent.split(b" ", 1)[0].decode()
        ((response, _),) = answers(bytes(client.received), methods=[method], closed=client.ended)
        assert (response.status_code, field(response, "server-timing")) == (status, "total;dur=0.00")

    run(main)


def test_a_late_reply_and_the_head_of_a_stream_have_the_time_until_then() -> None:
    async def main() -> None:
        for streamed in (False, True):
            edge = Edge()
            client = edge.connect()
            client.send(ask("/hold"))
            (exchange,) = edge.held.exchanges
            edge.clock.now_s += 1.5
            if streamed:
                exchange.start_stream(200, "text/plain")
                exchange.end()
            else:
                exchange.respond(Response(200))
            await turns()
            ((response, _),) = answers(bytes(client.received))
            assert field(response, "server-timing") == "total;dur=1500.00"

    run(main)


def stream(*lines: str, version: str = "1.1", method: str = "GET") -> tuple[bytes, bool]:
    """What a client gets of a stream with trailers, and whether the exchange says that it takes them."""
    got: list[tuple[bytes, bool]] = []

    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(ask("/hold", *lines, version=version, method=method))
        exchange: Exchange = edge.held.exchanges[0]
        takes = exchange.takes_trailers
        exchange.start_stream(200, "text/plain")
        exchange.write(b"abc")
        exchange.end(TRAILERS)
        await turns()
        got.append((bytes(client.received), takes))

    run(main)
    return got[0]


@pytest.mark.parametrize("value", ["trailers", "deflate, Trailers", "gzip;q=0.5,trailers"])
def test_a_client_that_takes_trailers_gets_them_behind_the_stream(value: str) -> None:
    data, takes = stream(f"TE: {value}", "Connection: TE")
    assert takes
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    events = []
    while not events or not isinstance(events[-1], h11.EndOfMessage):
        event = client.next_event()
        assert event is not h11.NEED_DATA
        events.append(event)
    assert b"".join(bytes(event.data) for event in events if isinstance(event, h11.Data)) == b"abc"
    assert list(events[-1].headers) == [(b"server-timing", b"decode;dur=1.5")]
    assert client.trailing_data[0] == b""


@pytest.mark.parametrize(("lines", "version"), [((), "1.1"), (("TE: gzip",), "1.1"), (("TE: trailers",), "1.0")])
def test_any_other_client_gets_none(lines: tuple[str, ...], version: str) -> None:
    data, takes = stream(*lines, version=version)
    assert not takes
    assert b"decode" not in data
    assert data.endswith(b"3\r\nabc\r\n0\r\n\r\n" if version == "1.1" else b"\r\n\r\nabc")


def test_the_exchanges_note_comes_with_its_entry() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(ask("/hold"))
        (exchange,) = edge.held.exchanges
        exchange.note = mine = object()
        exchange.respond(Response(200))
        client.send(ask("/ping"))
        await turns()
        assert [entry.note for entry in edge.log] == [mine, None]

    run(main)
