"""The grammar of a request's head: request line, target and fields as a RequestHead, or the ApiError that refuses it.

Pure functions on bytes; owns every rule about what a head may say, and nothing of buffers or framing of bodies.
Sections named here are those of RFC 9112 (HTTP/1.1) unless another RFC is given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from vserve.errors import BadRequest, ExpectationFailed, HeadersTooLarge, HttpVersionNotSupported, NotImplementedMethod
from vserve.http.events import Headers, RequestHead

METHOD_LIMIT = 32
"""Longest method name; the longest registered one has 17 letters."""

_TOKEN_CHARS = r"!#$%&'*+\-.^_`|~0-9A-Za-z"
TOKEN = re.compile(rf"[{_TOKEN_CHARS}]+")  # RFC 9110 5.6.2

# RFC 9110 5.5: field-vchar is VCHAR or obs-text, with SP and HTAB between; CR and LF are counted separately.
_FIELD_BYTES = bytes([0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0x100)])

# RFC 3986 3.3: pchar and "/"; a "%" only before two hex digits.
_PCHARS = r"A-Za-z0-9\-._~!$&'()*+,;=:@/"
_PATH = re.compile(rf"/[{_PCHARS}]*(?:%[0-9A-Fa-f]{{2}}[{_PCHARS}]*)*")
# Browsers send some characters raw that RFC 3986 3.4 wants escaped; they are harmless in a query, "#" is not.
_QUERY = re.compile(r"[!-\"$-~]*")
_ABSOLUTE = re.compile(r"[Hh][Tt][Tt][Pp][Ss]?://([^/?#]*)([^?#]*)(\?[^#]*)?")
# RFC 9110 7.2 and RFC 3986 3.2: reg-name, IPv4 or bracketed IPv6, then an optional port.
_AUTHORITY = re.compile(
    r"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9\-._~!$&'()*+,;=]*(?:%[0-9A-Fa-f]{2}[A-Za-z0-9\-._~!$&'()*+,;=]*)*)"
    r"(?::[0-9]{0,5})?"
)
_DIGITS = frozenset("0123456789")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_VERSION = re.compile(r"HTTP/([0-9])\.([0-9])")


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A request line, checked; fields as in RequestHead."""

    method: str
    target: str
    path: str
    query: str
    version: tuple[int, int]


def parse_request_line(line: bytes) -> RequestLine:
    """The request line without its CRLF.  Raises BadRequest, NotImplementedMethod or HttpVersionNotSupported."""
    # 3: method SP request-target SP HTTP-version.  Exactly one SP each: 3 allows lenient splitting on whitespace, and
    # names it as a way to smuggle.
    parts = line.decode("latin-1").split(" ")
    if len(parts) != 3:
        raise BadRequest("The request line is not 'method target version' with single spaces.")
    method, target, version = parts
    if not TOKEN.fullmatch(method):  # 3.1 and RFC 9110 9.1: the method is a token, and case matters
        raise BadRequest("The method is not a token.")
    if len(method) > METHOD_LIMIT:  # 3: a method longer than any implemented is answered with 501
        raise NotImplementedMethod("The method is longer than any this server knows.")
    number = _parse_version(version)
    path, query = _parse_target(method, target)
    return RequestLine(method, target, path, query, number)


def _parse_version(version: str) -> tuple[int, int]:
    if version == "HTTP/1.1":
        return 1, 1
    match = _VERSION.fullmatch(version)
    if match is None:  # 2.3: case-sensitive, one digit each
        raise BadRequest("The HTTP version is malformed.")
    if match[1] != "1":  # RFC 9110 15.6.6: another major version
        raise HttpVersionNotSupported("Only HTTP/1.0 and HTTP/1.1 are spoken here.")
    return (1, 0) if match[2] == "0" else (1, 1)  # RFC 9110 2.5: a higher minor is read as the highest known


def _parse_target(method: str, target: str) -> tuple[str, str]:
    """The decoded path and the raw query of a request-target (3.2)."""
    if method == "CONNECT":  # 3.2.3: authority-form; this is no proxy
        raise NotImplementedMethod("CONNECT is not implemented.")
    if target.startswith("/"):  # 3.2.1: origin-form
        raw_path, _, query = target.partition("?")
        return _decode_path(raw_path), _check_query(query)
    if target == "*":  # 3.2.4: asterisk-form, for OPTIONS only
        if method != "OPTIONS":
            raise BadRequest("The target * is for OPTIONS only.")
        return "*", ""
    match = _ABSOLUTE.fullmatch(target)  # 3.2.2: absolute-form must be accepted, and its host beats the Host field
    # RFC 9110 4.2.4: userinfo in a target is an error ("@" is not in the grammar); 4.2.1: an empty host is one too.
    if match is None or not match[1] or match[1].startswith(":") or not _AUTHORITY.fullmatch(match[1]):
        raise BadRequest("The request target is malformed.")
    return _decode_path(match[2] or "/"), _check_query((match[3] or "?")[1:])


def _check_query(query: str) -> str:
    if not _QUERY.fullmatch(query):
        raise BadRequest("The query holds a character that must be percent-encoded.")
    return query


def _decode_path(raw: str) -> str:
    if not _PATH.fullmatch(raw):
        raise BadRequest("The path holds a character that must be percent-encoded.")
    path = raw
    if "%" in raw:  # decoded exactly once: RFC 3986 2.4
        try:
            path = unquote_to_bytes(raw).decode("utf-8")
        except UnicodeDecodeError:
            raise BadRequest("The path is not UTF-8 when percent-decoded.") from None
        if _CONTROL.search(path):
            raise BadRequest("The path holds a control character.")
    # RFC 3986 6.2.2.3: clients resolve dot segments; a proxy in front that resolves them would see another path.
    if "/." in path and not {".", ".."}.isdisjoint(path.split("/")):
        raise BadRequest("The path holds a dot segment.")
    return path


def parse_fields(block: bytes, count_limit: int) -> Headers:
    """Field lines joined by CRLF, without the last CRLF; b"" is none.  Raises BadRequest or HeadersTooLarge."""
    if not block:
        return Headers()
    lines = block.decode("latin-1").split("\r\n")
    # 2.2: a bare CR or LF is no line end and never part of a value.  First of all checks: the parser finds a bare LF
    # before the section is complete, and a verdict must not depend on where the bytes were cut.
    if block.count(b"\n") != len(lines) - 1 or block.count(b"\r") != len(lines) - 1:
        raise BadRequest("A line of the header ends without CRLF.")
    if len(lines) > count_limit:  # RFC 6585 5
        raise HeadersTooLarge(f"The request has more than {count_limit} header fields.")
    if block.translate(None, _FIELD_BYTES):  # RFC 9110 5.5: NUL and other controls are refused, not replaced
        raise BadRequest("A header field holds a control character.")
    pairs = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name:
            raise BadRequest("A header line is not 'name: value'.")
        pairs.append((name.lower(), value.strip(" \t")))
    # 5.1: no whitespace before the colon; 5.2: obs-fold is refused (a folded line begins with one).  Both are names
    # that are no token; one look at all names together is faster than one each.
    if not TOKEN.fullmatch("".join([name for name, _ in pairs])):
        raise BadRequest("A header name is not a token; folded lines are not accepted.")
    return Headers(pairs)


def make_head(line: RequestLine, headers: Headers) -> RequestHead:
    """Line and fields as one head: host, framing, persistence, expectation.  Raises the ApiError that refuses it."""
    _check_host(line, headers)
    length, chunked = _parse_framing(line, headers)
    options = _list(headers.find("connection"))
    # 9.3: 1.1 persists unless close is said; 1.0 persists only when it asks to, and close beats keep-alive.
    keep_alive = "close" not in options and (line.version == (1, 1) or "keep-alive" in options)
    expect = headers.find("expect")
    if expect is not None and expect.lower() != "100-continue":  # RFC 9110 10.1.1
        raise ExpectationFailed("Only the expectation 100-continue is understood.")
    return RequestHead(
        method=line.method,
        target=line.target,
        path=line.path,
        query=line.query,
        version=line.version,
        headers=headers,
        content_length=length,
        chunked=chunked,
        keep_alive=keep_alive,
        # RFC 9110 10.1.1: the expectation of a 1.0 client is ignored, it would not understand a 100.
        expect_continue=expect is not None and line.version == (1, 1) and (chunked or bool(length)),
    )


def _check_host(line: RequestLine, headers: Headers) -> None:
    host = headers.find("host")
    if host is None:
        if line.version == (1, 1):  # 3.2: 400 without a Host field
            raise BadRequest("The Host header is missing.")
        return
    # 3.2: 400 for more than one Host (two joined lines hold a space, which no host does) or an invalid one.
    if not _AUTHORITY.fullmatch(host):
        raise BadRequest("The Host header is not one host with an optional port.")


def _parse_framing(line: RequestLine, headers: Headers) -> tuple[int | None, bool]:
    """Content-Length (None without one) and whether the content is chunked."""
    length = headers.find("content-length")
    coding = headers.find("transfer-encoding")
    if coding is not None:
        if length is not None:  # 6.1 and 6.3 (3): the usual way to smuggle
            raise BadRequest("Content-Length and Transfer-Encoding exclude each other.")
        if line.version == (1, 0):  # 6.1: faulty framing
            raise BadRequest("HTTP/1.0 has no Transfer-Encoding.")
        # Not _list: an empty element is refused although RFC 9110 5.6.1.2 lets it pass.  A peer in front that reads
        # only the first of two lines sees another framing than one that joins them.
        codings = [item.strip(" \t") for item in coding.lower().split(",")]
        if codings == ["chunked"]:
            return None, True
        if "" in codings:
            raise BadRequest("Transfer-Encoding has an empty element.")
        if codings.count("chunked") != 1 or codings[-1] != "chunked":  # 6.3 (4): the length cannot be known
            raise BadRequest("Transfer-Encoding must end with one chunked.")
        raise NotImplementedMethod("Of the transfer codings only chunked is implemented.")  # 6.1
    if length is None:
        return None, False  # 6.3 (7): no content
    # RFC 9110 8.6: 1*DIGIT.  ASCII digits only: int() would also take "+5", "1_0" and digits of other scripts.  Two
    # lines, equal or not, are joined by a comma and refused here.
    if not length or not _DIGITS.issuperset(length):
        raise BadRequest("Content-Length is not a number.")
    # Far above any limit, yet short: int() of a long text is quadratic.
    return (int(length) if len(length) <= 18 else 10**18), False


def _list(value: str | None) -> list[str]:
    """The elements of a comma-separated list in lower case (RFC 9110 5.6.1: empty elements are ignored)."""
    if value is None:
        return []
    return [item for part in value.lower().split(",") if (item := part.strip(" \t"))]
