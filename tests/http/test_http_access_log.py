"""The access log: one line each, whatever the client sent."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.fakes_http import Edge
from vserve.http.access_log import AccessWriter, access_line
from vserve.http.site import AccessEntry


def test_a_line_is_the_exchange_as_json() -> None:
    line = access_line(AccessEntry("GET", "ping", 200, 0.0012345, 7, "req-1", "192.0.2.1:5", False), 784111777.25)
    assert json.loads(line) == {
        "time": "1994-11-06T08:49:37.250+00:00",
        "method": "GET",
        "route": "ping",
        "status": 200,
        "duration_ms": 1.234,
        "bytes": 7,
        "request_id": "req-1",
        "peer": "192.0.2.1:5",
        "gone": False,
    }


@pytest.mark.parametrize("method", ["A\nB", "\x1b[31m", '"', "\u2028", "\ud800", "M" * 9000])
@pytest.mark.promise("input: control characters")
def test_the_clients_words_are_escaped_and_cut(method: str) -> None:
    line = access_line(AccessEntry(method, None, 0, 0.0, 0, "req-1", "unix", True), 0.0)
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 500
    assert json.loads(line)["method"] == method[:32]


@pytest.mark.promise("R12")
def test_neither_query_nor_key_nor_content_nor_path_is_in_a_line() -> None:
    async def main() -> list[str]:
        edge = Edge()
        lines: list[str] = []
        writer = AccessWriter(lines.append, lambda: 0.0)
        for request in (
            b"POST /echo?hidden HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer hidden\r\nContent-Length: 6\r\n\r\nhidden",
            b"GET /hidden?hidden HTTP/1.1\r\nHost: a\r\nCookie: hidden\r\n\r\n",
            b"GET / hidden HTTP/1.1\r\n\r\n",
        ):
            peer = edge.connect()
            peer.send(request)
            await asyncio.sleep(0)
        for entry in edge.log:
            writer(entry)
        return lines

    lines = asyncio.run(main())
    assert [json.loads(line)["status"] for line in lines] == [200, 404, 400]
    assert [json.loads(line)["route"] for line in lines] == ["echo", None, None]
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
    assert not [line for line in lines if "hidden" in line]
