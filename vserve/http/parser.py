"""Parser: a strict, incremental HTTP/1.1 request parser.  Bytes in, events out; no sockets, no clocks.

Owns the buffer and the framing of requests; the grammar of heads is in head.py.  What it refuses it refuses for good:
after an ApiError nothing more is parsed, so the connection has to close.  The verdict and the events do not depend on
how the bytes were cut.  Time is linear in the bytes, memory is the unread bytes.
Sections named here are those of RFC 9112.
"""

from __future__ import annotations

import enum
import re

from vserve.errors import ApiError, BadRequest, HeadersTooLarge, PayloadTooLarge, UriTooLong
from vserve.http.events import BodyPart, Event, RequestEnd
from vserve.http.head import RequestLine, make_head, parse_fields, parse_request_line
from vserve.http.limits import Limits


class Phase(enum.Enum):
    """What the next byte belongs to."""

    LINE = "request line"
    FIELDS = "header fields"
    FIXED = "content of known length"
    CHUNK_SIZE = "chunk size line"
    CHUNK_DATA = "chunk data"
    CHUNK_END = "CRLF behind chunk data"
    TRAILERS = "trailer fields"
    END = "nothing: the request is complete"


_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# 7.1 and 7.1.1: chunk-size is 1*HEXDIG; 16 digits are more than any limit.  Extensions are token[=token|quoted].
_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[ \t]*" + _TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|"
    rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
    rb"))?)*)"
)
_END = RequestEnd()


class Parser:
    """Parses the requests of one connection, one after the other.  Any thread, one at a time."""

    __slots__ = (
        "_blank_skipped",
        "_buffer",
        "_extension_bytes",
        "_failure",
        "_left",
        "_limits",
        "_line",
        "_phase",
        "_scanned",
        "_taken",
    )

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._phase = Phase.LINE
        self._scanned = 0  # bytes of the buffer known to hold no line end: no byte is searched twice
        self._line: RequestLine | None = None
        self._left = 0  # bytes of content (FIXED) or of the chunk (CHUNK_DATA) still to come
        self._taken = 0  # bytes of content announced so far by chunk sizes
        self._extension_bytes = 0
        self._blank_skipped = False
        self._failure: ApiError | None = None

    @property
    def buffered(self) -> int:
        """Bytes fed and not yet taken."""
        return len(self._buffer)

    @property
    def clean(self) -> bool:
        """True between requests with nothing buffered."""
        return self._phase is Phase.LINE and not self._buffer

    def feed(self, data: bytes) -> None:
        """Add bytes from the wire.  After a refusal they are thrown away."""
        if self._failure is None:
            self._buffer += data

    def next_event(self) -> Event | None:
        """The next event, or None when more bytes are needed.

        Raises ApiError (400, 413, 414, 417, 431, 501, 505) when the bytes are refused, and again on every later call.
        """
        if self._failure is not None:
            raise self._failure
        try:
            return self._read()
        except ApiError as error:
            self._failure = error
            self._buffer.clear()
            raise

    def _read(self) -> Event | None:
        phase = self._phase
        if phase is Phase.LINE:
            if not self._read_line():
                return None
            phase = self._phase
        if phase is Phase.FIELDS:
            return self._read_fields()
        if phase is Phase.FIXED:
            return self._read_fixed()
        if phase is not Phase.END:
            return self._read_chunked()
        self._phase = Phase.LINE
        self._blank_skipped = False
        return _END

    def _take_line(self, limit: int) -> bytes | None:
        """The next line of at most limit bytes without its CRLF; None when it is not complete.

        Raises UriTooLong or BadRequest for a longer line, BadRequest for one that ends with a bare LF (2.2).
        """
        buffer = self._buffer
        end = buffer.find(b"\n", self._scanned, limit + 2)
        if end < 0:
            self._scanned = len(buffer)
            if len(buffer) >= limit + 2:
                if self._phase is Phase.LINE:  # 3: a request-target longer than any wished for is answered with 414
                    raise UriTooLong(f"The request line is longer than {limit} bytes.")
                raise BadRequest(f"A chunk size line is longer than {limit} bytes.")
            return None
        if end == 0 or buffer[end - 1] != 0x0D:
            raise BadRequest("A line ends without CRLF.")
        line = bytes(buffer[: end - 1])
        del buffer[: end + 1]
        self._scanned = 0
        return line

    def _take_fields(self) -> bytes | None:
        """The field lines up to the empty line, without their last CRLF; None when they are not complete."""
        buffer, limit, scanned = self._buffer, self._limits.header_bytes, self._scanned
        if buffer.startswith(b"\r\n"):
            del buffer[:2]
            self._scanned = 0
            return b""
        end = buffer.find(b"\r\n\r\n", max(scanned - 3, 0), limit + 2)
        if end < 0:
            # 2.2: a bare LF would otherwise keep the client waiting for an answer until the timeout.
            breaks = buffer.count(b"\r\n", max(scanned - 1, 0), limit + 2)
            if buffer.count(b"\n", scanned, limit + 2) != breaks:
                raise BadRequest("A line of the header ends without CRLF.")
            if len(buffer) >= limit + 2:
                raise HeadersTooLarge(f"The header fields are longer than {limit} bytes.")
            self._scanned = len(buffer)
            return None
        block = bytes(buffer[:end])
        del buffer[: end + 4]
        self._scanned = 0
        return block

    def _read_line(self) -> bool:
        buffer = self._buffer
        # 2.2: one empty line before a request is ignored, for clients that end their content with one too many.
        if not self._blank_skipped and buffer[:1] == b"\r":
            if len(buffer) < 2:
                return False
            if buffer[1] == 0x0A:
                del buffer[:2]
            self._blank_skipped = True
        # A method begins with a letter or mark: TLS, binary and blank garbage are told so at once, not at the timeout.
        if buffer and not 0x21 <= buffer[0] <= 0x7E:
            raise BadRequest("This is not an HTTP/1.1 request.")
        line = self._take_line(self._limits.request_line_bytes)
        if line is None:
            return False
        self._line = parse_request_line(line)
        self._phase = Phase.FIELDS
        return True

    def _read_fields(self) -> Event | None:
        block = self._take_fields()
        if block is None:
            return None
        assert self._line is not None
        head = make_head(self._line, parse_fields(block, self._limits.header_count))
        self._line = None
        self._taken = self._extension_bytes = 0
        if head.chunked:
            self._phase = Phase.CHUNK_SIZE
        elif head.content_length:
            self._left = head.content_length
            self._phase = Phase.FIXED
        else:
            self._phase = Phase.END
        return head

    def _read_fixed(self) -> Event | None:
        # After the head, not instead of it: the caller may have a better reason to refuse (401, 404).
        if self._left > self._limits.body_bytes:
            raise self._too_large()
        return self._take_content(Phase.END)

    def _take_content(self, after: Phase) -> BodyPart | None:
        """Up to _left bytes of content; when none are left the phase is after."""
        buffer = self._buffer
        if not buffer:
            return None
        data = bytes(buffer[: self._left])
        del buffer[: self._left]
        self._left -= len(data)
        if not self._left:
            self._phase = after
        return BodyPart(data)

    def _read_chunked(self) -> Event | None:
        """7.1: chunks, last-chunk, trailers.  A loop, for most phases yield no event of their own."""
        while True:
            phase = self._phase
            if phase is Phase.CHUNK_DATA:
                return self._take_content(Phase.CHUNK_END)
            if phase is Phase.CHUNK_SIZE:
                if not self._read_chunk_size():
                    return None
            elif phase is Phase.CHUNK_END:
                if not self._read_chunk_end():
                    return None
            else:
                return self._read_trailers()

    def _read_chunk_size(self) -> bool:
        limits = self._limits
        line = self._take_line(limits.chunk_line_bytes)
        if line is None:
            return False
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise BadRequest("A chunk size line is malformed.")
        self._extension_bytes += len(match[2])
        if self._extension_bytes > limits.chunk_extension_bytes:  # 7.1.1: limit the total
            raise BadRequest(f"The chunk extensions are longer than {limits.chunk_extension_bytes} bytes in all.")
        size = int(match[1], 16)
        self._taken += size
        if self._taken > limits.body_bytes:
            raise self._too_large()
        self._left = size
        self._phase = Phase.CHUNK_DATA if size else Phase.TRAILERS
        return True

    def _read_chunk_end(self) -> bool:
        buffer = self._buffer
        if not b"\r\n".startswith(buffer[:2]):  # 7.1: exactly CRLF, or the sizes are not what they claim
            raise BadRequest("A chunk is not followed by CRLF.")
        if len(buffer) < 2:
            return False
        del buffer[:2]
        self._phase = Phase.CHUNK_SIZE
        return True

    def _read_trailers(self) -> Event | None:
        block = self._take_fields()
        if block is None:
            return None
        # 7.1.2 and RFC 9110 6.5.1: checked like any field, then dropped; a trailer may not change framing or access.
        parse_fields(block, self._limits.header_count)
        self._phase = Phase.LINE
        self._blank_skipped = False
        return _END

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"The request body is larger than {self._limits.body_bytes} bytes.")
