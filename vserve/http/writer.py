"""Writer: replies as bytes.  Owns status lines, the Date field and field syntax; knows no connection.

Sections named here are those of RFC 9110 unless another RFC is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus

from vserve.http.exchange import Fields, Response
from vserve.http.head import TOKEN

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

KEEP = ""
CLOSE = "connection: close\r\n"
KEEP_1_0 = "connection: keep-alive\r\n"  # RFC 9112 9.3: a 1.0 client must be told that its wish is granted

_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_OWN = frozenset({"connection", "content-length", "transfer-encoding", "date", "x-request-id"})
_START_LIMIT = 64  # content types come from the routes; the bound only guards against a handler that makes them up


class Writer:
    """Serialises replies for all connections of a server.  L only."""

    def __init__(self, server_headers: Fields, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._server_fields = format_fields(server_headers)
        self._second = -1
        self._starts: dict[tuple[int, str], str] = {}

    def reply(self, response: Response, request_id: str, persistence: str, head_only: bool = False) -> bytes:
        """A whole reply.  persistence: KEEP, CLOSE or KEEP_1_0, and further lines of fields.

        ValueError for a header that is no header.
        """
        body, status = response.body, response.status
        start = self._start(status, response.content_type if body else "")
        fields = format_fields(response.headers) if response.headers else ""
        # 8.6: no Content-Length with 1xx and 204; 15.4.5: 304 describes what it does not send.
        length = "" if status in (204, 304) else f"content-length: {len(body)}\r\n"
        head = f"{start}{length}x-request-id: {request_id}\r\n{fields}{persistence}\r\n".encode("latin-1")
        # 9.3.2: HEAD gets the fields of GET and no content.
        return head if head_only or not body or not length else head + body

    def stream_head(
        self, status: int, content_type: str, headers: Fields, request_id: str, persistence: str, *, chunked: bool
    ) -> bytes:
        """The head of a streamed reply; without chunked its end is the end of the connection."""
        coding = "transfer-encoding: chunked\r\n" if chunked else ""
        fields = format_fields(headers)
        start = self._start(status, content_type)
        return f"{start}{coding}x-request-id: {request_id}\r\n{fields}{persistence}\r\n".encode("latin-1")

    def _start(self, status: int, content_type: str) -> str:
        """Status line and the fields that replies of one kind share within one second."""
        second = int(self._wall_clock())
        if second != self._second or len(self._starts) > _START_LIMIT:
            self._second = second
            self._starts.clear()
        start = self._starts.get((status, content_type))
        if start is None:
            kind = f"content-type: {_value(content_type)}\r\n" if content_type else ""
            date = formatdate(second, usegmt=True)  # 6.6.1
            start = f"HTTP/1.1 {status} {_reason(status)}\r\ndate: {date}\r\n{self._server_fields}{kind}"
            self._starts[status, content_type] = start
        return start


def format_fields(headers: Fields) -> str:
    """Header lines, without those that are the server's own.  ValueError for a bad name or value."""
    lines = []
    for name, value in headers:
        if not TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is not a header name")
        if name.lower() not in _OWN:
            lines.append(f"{name}: {_value(value)}\r\n")
    return "".join(lines)


def server_timing(total_s: float) -> str:
    """The line that says how long the reply, or its head, took to make (W3C Server Timing)."""
    return f"server-timing: total;dur={total_s * 1e3:.2f}\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk (RFC 9112 7.1).  data is not empty: an empty chunk would end the content."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _value(value: str) -> str:
    if not _VALUE.fullmatch(value):  # 5.5: a line end here would let a value write further fields
        raise ValueError(f"{value[:100]!r} cannot be a header value")
    return value


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
