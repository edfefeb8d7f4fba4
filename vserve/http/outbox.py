"""Outbox: the way out of one connection.  Joins what is written in one pass of the loop into one transport.write,
frames the chunks of a stream, and knows when the peer takes too little.

Owns flow control towards the transport; knows nothing of requests.  L only.
"""

from __future__ import annotations

import asyncio

from vserve.http.limits import Limits
from vserve.http.writer import LAST_CHUNK, chunk


class Outbox:
    """Bytes on their way to one transport."""

    __slots__ = (
        "_chunked",
        "_limits",
        "_parts",
        "_stalled_s",
        "_stream",
        "_surplus",
        "_target",
        "_total",
        "_transport",
        "writable",
    )

    def __init__(self, transport: asyncio.Transport, limits: Limits) -> None:
        transport.set_write_buffer_limits(limits.write_high_bytes, limits.write_low_bytes)
        self._transport = transport
        self._limits = limits
        self._parts: list[bytes] = []  # ready for the wire
        self._stream: list[bytes] = []  # content of the open stream, not framed yet
        self._chunked = False
        self._surplus = 0  # bytes written to a stream while it was not writable
        self._total = 0  # bytes ever given to the transport
        self._stalled_s: float | None = None  # when the peer was last seen taking enough, while bytes wait
        self._target = 0  # bytes it has to have taken to be seen doing so again
        self.writable = True

    def put(self, data: bytes) -> None:
        """Queue bytes as they are, behind all that was queued before."""
        self._parts.append(data)

    def open_stream(self, *, chunked: bool) -> None:
        """What put_stream gets from now on is framed as chunks, or not at all."""
        self._chunked = chunked

    def put_stream(self, data: bytes) -> bool:
        """Queue content of the stream; False when the stream has outgrown its bound because nobody reads."""
        self._stream.append(data)
        if self.writable:
            return True
        self._surplus += len(data)
        return self._surplus <= self._limits.stream_buffer_bytes

    def close_stream(self, trailers: bytes = b"") -> None:
        """The stream is complete.  trailers: field lines that follow it, where it is framed as chunks."""
        self._seal()
        if self._chunked:
            self._parts.append(LAST_CHUNK if not trailers else b"0\r\n%b\r\n" % trailers)
        self._chunked = False

    def flush(self) -> None:
        """Hand everything to the transport in one write."""
        if self._stream:
            self._seal()
        parts = self._parts
        if parts:
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            self._total += len(data)
            self._transport.write(data)

    def _seal(self) -> None:
        if self._stream:
            data = self._stream[0] if len(self._stream) == 1 else b"".join(self._stream)
            self._stream.clear()
            self._parts.append(chunk(data) if self._chunked else data)

    def pause(self, now_s: float) -> None:
        """The transport's buffer is above its high-water mark."""
        self.writable = False
        self._surplus = 0
        self._watch(now_s)

    def resume(self) -> None:
        """The transport's buffer is below its low-water mark."""
        self.writable = True
        self._stalled_s = None

    def stalled(self, now_s: float) -> bool:
        """True when the peer has taken too little for write_stall_s: less than the high-water mark, or than waited.

        A rate, not mere progress: one byte now and then must not hold a stream for ever.
        """
        waiting = self._transport.get_write_buffer_size()
        if not waiting:
            self._stalled_s = None
            return False
        if self._stalled_s is None or self._total - waiting >= self._target:
            self._watch(now_s)
            return False
        return now_s - self._stalled_s >= self._limits.write_stall_s

    def _watch(self, now_s: float) -> None:
        waiting = self._transport.get_write_buffer_size()
        self._stalled_s = now_s
        self._target = self._total - waiting + min(waiting, self._limits.write_high_bytes)
