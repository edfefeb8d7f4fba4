"""Server-sent events: bytes of one event, as the HTML Standard 9.2.6 reads them.  Pure; knows no connection."""

from __future__ import annotations

CONTENT_TYPE = "text/event-stream; charset=utf-8"
HEADERS: tuple[tuple[str, str], ...] = (("cache-control", "no-cache"), ("x-accel-buffering", "no"))
"""Fields of a streamed reply: nothing on the way may store or hold back events."""

COMMENT = b":\n\n"
"""Keeps an idle stream alive; clients ignore it."""

DONE = b"data: [DONE]\n\n"
"""Ends a stream of the OpenAI dialect."""


def frame(data: bytes, event: str | None = None, id: str | None = None) -> bytes:
    """One event.  data: UTF-8; each of its lines becomes a data line.  ValueError if event or id holds a line end."""
    if b"\n" in data or b"\r" in data:
        data = b"\ndata: ".join(data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"))
    if event is None and id is None:
        return b"data: %b\n\n" % data
    return b"%b%bdata: %b\n\n" % (_field("event", event), _field("id", id), data)


def _field(name: str, value: str | None) -> bytes:
    if value is None:
        return b""
    # An id with NUL is ignored by clients (9.2.6), which would break resumption silently.
    if any(char in value for char in "\r\n\0"):
        raise ValueError(f"an SSE {name} holds a line end or NUL")
    return f"{name}: {value}\n".encode()
