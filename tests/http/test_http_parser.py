"""The parser: what it takes, what it refuses and how, whole, byte by byte and with bytes behind."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vserve.errors import ApiError
from vserve.http.events import BodyPart, RequestHead
from vserve.http.limits import Limits
from vserve.http.parser import Parser

SMALL = Limits(
    request_line_bytes=80,
    header_bytes=200,
    header_count=8,
    body_bytes=64,
    chunk_line_bytes=32,
    chunk_extension_bytes=40,
)
H = b"Host: a\r\n"
LENGTH = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
DIGITS = b"0123456789abcdefghijk"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Outcome:
    """What a run of the parser said: complete requests, the head and content of an incomplete one, the refusal."""

    requests: tuple[tuple[RequestHead, bytes], ...]
    pending: tuple[RequestHead, bytes] | None
    status: int | None
    message: str | None


def parse(*pieces: bytes, limits: Limits = SMALL) -> Outcome:
    parser = Parser(limits)
    requests: list[tuple[RequestHead, bytes]] = []
    head: RequestHead | None = None
    body = b""
    refusals: list[ApiError] = []
    for piece in pieces:
        parser.feed(piece)
        try:
            while (event := parser.next_event()) is not None:
                if isinstance(event, RequestHead):
                    assert head is None
                    head, body = event, b""
                elif isinstance(event, BodyPart):
                    assert event.data
                    body += event.data
                else:
                    assert head is not None
                    requests.append((head, body))
                    head = None
        except ApiError as refusal:
            refusals.append(refusal)
        assert parser.buffered <= len(piece) + limits.header_bytes + limits.request_line_bytes + 4
    error = refusals[0] if refusals else None
    assert all(refusal is error for refusal in refusals), "a refusal is final"
    assert error is None or parser.buffered == 0
    pending = (head, body) if head is not None else None
    return Outcome(tuple(requests), pending, error.status if error else None, error.message if error else None)


def by_bytes(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


# name: bytes, method, path, query, content
VALID: dict[str, tuple[bytes, str, str, str, bytes]] = {
    "the least": (b"GET / HTTP/1.1\r\n" + H + b"\r\n", "GET", "/", "", b""),
    "query": (b"GET /a?b=c&d HTTP/1.1\r\n" + H + b"\r\n", "GET", "/a", "b=c&d", b""),
    "two question marks": (b"GET /a?b?c HTTP/1.1\r\n" + H + b"\r\n", "GET", "/a", "b?c", b""),
    "raw braces in the query": (b"GET /?a={|} HTTP/1.1\r\n" + H + b"\r\n", "GET", "/", "a={|}", b""),
    "percent-decoded once": (b"GET /a%2520b HTTP/1.1\r\n" + H + b"\r\n", "GET", "/a%20b", "", b""),
    "encoded slash": (b"GET /a%2Fb HTTP/1.1\r\n" + H + b"\r\n", "GET", "/a/b", "", b""),
    "encoded utf-8": (b"GET /%C3%A9 HTTP/1.1\r\n" + H + b"\r\n", "GET", "/é", "", b""),
    "dots inside segments": (b"GET /.a/b../...c HTTP/1.1\r\n" + H + b"\r\n", "GET", "/.a/b../...c", "", b""),
    "absolute form": (b"GET http://x.org:80/p?q HTTP/1.1\r\n" + H + b"\r\n", "GET", "/p", "q", b""),
    "absolute form, no path": (b"GET HTTPS://x.org HTTP/1.1\r\n" + H + b"\r\n", "GET", "/", "", b""),
    "absolute form, query only": (b"GET http://[::1]?q HTTP/1.1\r\n" + H + b"\r\n", "GET", "/", "q", b""),
    "asterisk form": (b"OPTIONS * HTTP/1.1\r\n" + H + b"\r\n", "OPTIONS", "*", "", b""),
    "an odd method": (b"M-SEARCH! / HTTP/1.1\r\n" + H + b"\r\n", "M-SEARCH!", "/", "", b""),
    "a lower case method": (b"get / HTTP/1.1\r\n" + H + b"\r\n", "get", "/", "", b""),
    "one empty line before": (b"\r\nGET / HTTP/1.1\r\n" + H + b"\r\n", "GET", "/", "", b""),
    "a higher minor version": (b"GET / HTTP/1.9\r\n" + H + b"\r\n", "GET", "/", "", b""),
    "1.0 without fields": (b"GET / HTTP/1.0\r\n\r\n", "GET", "/", "", b""),
    "1.0 with an expectation": (b"GET / HTTP/1.0\r\nExpect: 100-continue\r\n\r\n", "GET", "/", "", b""),
    "empty host": (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", "GET", "/", "", b""),
    "host and port": (b"GET / HTTP/1.1\r\nHost: a-b.c_d:8000\r\n\r\n", "GET", "/", "", b""),
    "host in brackets": (b"GET / HTTP/1.1\r\nHost: [::1]:8000\r\n\r\n", "GET", "/", "", b""),
    "space around values": (b"GET / HTTP/1.1\r\nHost: \t a \t \r\n\r\n", "GET", "/", "", b""),
    "empty value": (b"GET / HTTP/1.1\r\n" + H + b"X:\r\n\r\n", "GET", "/", "", b""),
    "obs-text": (b"GET / HTTP/1.1\r\n" + H + b"X: \xe9\xff\r\n\r\n", "GET", "/", "", b""),
    "upgrade ignored": (b"GET / HTTP/1.1\r\n" + H + b"Upgrade: h2c\r\n\r\n", "GET", "/", "", b""),
    "length": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 5\r\n\r\nhello", "POST", "/", "", b"hello"),
    "length zero": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 0\r\n\r\n", "POST", "/", "", b""),
    "leading zeros": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 0005\r\n\r\nhello", "POST", "/", "", b"hello"),
    "content with line ends": (LENGTH % 4 + b"\r\n\r\n", "POST", "/", "", b"\r\n\r\n"),
    "the largest body": (LENGTH % 64 + b"x" * 64, "POST", "/", "", b"x" * 64),
    "chunked": (CHUNKED + b"5\r\nhello\r\n1\r\n \r\n0\r\n\r\n", "POST", "/", "", b"hello "),
    "chunked in capitals": (CHUNKED.replace(b"chunked", b"Chunked") + b"0\r\n\r\n", "POST", "/", "", b""),
    "hex sizes": (CHUNKED + b"0A\r\n0123456789\r\nb\r\nabcdefghijk\r\n000\r\n\r\n", "POST", "/", "", DIGITS),
    "chunk extensions": (CHUNKED + b'5;a=b ; c="d\\"e;"\r\nhello\r\n0;x\r\n\r\n', "POST", "/", "", b"hello"),
    "trailers": (CHUNKED + b"2\r\nhi\r\n0\r\nX-Sum: 1\r\nHost: b\r\n\r\n", "POST", "/", "", b"hi"),
    "the longest line": (b"GET /" + b"a" * 66 + b" HTTP/1.1\r\n" + H + b"\r\n", "GET", "/" + "a" * 66, "", b""),
    "the longest fields": (b"GET / HTTP/1.1\r\n" + H + b"X: " + b"a" * 186 + b"\r\n\r\n", "GET", "/", "", b""),
    "the most fields": (b"GET / HTTP/1.1\r\n" + H + b"X: a\r\n" * 7 + b"\r\n", "GET", "/", "", b""),
    "HEAD": (b"HEAD /a HTTP/1.1\r\n" + H + b"\r\n", "HEAD", "/a", "", b""),
    "OPTIONS of a path": (b"OPTIONS /a HTTP/1.1\r\n" + H + b"\r\n", "OPTIONS", "/a", "", b""),
    "OPTIONS in absolute form": (b"OPTIONS http://x HTTP/1.1\r\n" + H + b"\r\n", "OPTIONS", "/", "", b""),
    "OPTIONS * of 1.0": (b"OPTIONS * HTTP/1.0\r\n\r\n", "OPTIONS", "*", "", b""),
    "GET with content": (LENGTH.replace(b"POST", b"GET") % 2 + b"hi", "GET", "/", "", b"hi"),
    "HEAD with chunks": (CHUNKED.replace(b"POST", b"HEAD") + b"2\r\nhi\r\n0\r\n\r\n", "HEAD", "/", "", b"hi"),
    "encoded delimiters": (b"GET /a%3Fb%23c%25 HTTP/1.1\r\n" + H + b"\r\n", "GET", "/a?b#c%", "", b""),
    "a query is not decoded": (b"GET /?%41=%zz HTTP/1.1\r\n" + H + b"\r\n", "GET", "/", "%41=%zz", b""),
    "an empty query": (b"GET /a? HTTP/1.1\r\n" + H + b"\r\n", "GET", "/a", "", b""),
    "two slashes": (b"GET //a//b HTTP/1.1\r\n" + H + b"\r\n", "GET", "//a//b", "", b""),
    "dots in the query": (b"GET /?../.. HTTP/1.1\r\n" + H + b"\r\n", "GET", "/", "../..", b""),
    "absolute form, another host": (b"GET http://x/ HTTP/1.1\r\nHost: y\r\n\r\n", "GET", "/", "", b""),
    "1.0 with host": (b"GET / HTTP/1.0\r\n" + H + b"\r\n", "GET", "/", "", b""),
    "1.0 with length": (b"POST / HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi", "POST", "/", "", b"hi"),
    "1.0 without length": (b"POST / HTTP/1.0\r\n\r\n", "POST", "/", "", b""),
    "1.1 without length": (b"POST / HTTP/1.1\r\n" + H + b"\r\n", "POST", "/", "", b""),
    "host, port empty": (b"GET / HTTP/1.1\r\nHost: a:\r\n\r\n", "GET", "/", "", b""),
    "host escaped": (b"GET / HTTP/1.1\r\nHost: a%20b\r\n\r\n", "GET", "/", "", b""),
    "host in another case": (b"GET / HTTP/1.1\r\nhOsT: A\r\n\r\n", "GET", "/", "", b""),
    "colons in a value": (b"GET / HTTP/1.1\r\n" + H + b"X: a: b::\r\n\r\n", "GET", "/", "", b""),
    "every mark in a name": (b"GET / HTTP/1.1\r\n" + H + b"!#$%&'*+-.^_`|~9: x\r\n\r\n", "GET", "/", "", b""),
    "a field twice": (b"GET / HTTP/1.1\r\n" + H + b"X: a\r\nX: b\r\n\r\n", "GET", "/", "", b""),
    "websocket ignored": (
        b"GET / HTTP/1.1\r\n" + H + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", "GET", "/", "", b""
    ),
    "h2c with content ignored": (
        (LENGTH % 2).replace(b"\r\n\r\n", b"\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n") + b"hi",
        "POST", "/", "", b"hi",
    ),
    "space around the length": (
        b"POST / HTTP/1.1\r\n" + H + b"Content-Length: \t 2 \t\r\n\r\nhi", "POST", "/", "", b"hi"
    ),
    "length with expectation": (
        b"POST / HTTP/1.1\r\n" + H + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\nhi", "POST", "/", "", b"hi"
    ),
    "content like a request": (LENGTH % 18 + b"GET / HTTP/1.1\r\n\r\n", "POST", "/", "", b"GET / HTTP/1.1\r\n\r\n"),
    "content like chunks": (LENGTH % 5 + b"0\r\n\r\n", "POST", "/", "", b"0\r\n\r\n"),
    "chunks like chunks": (CHUNKED + b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", "POST", "/", "", b"0\r\n\r\n"),
    "trailers that look like framing": (
        CHUNKED + b"0\r\nContent-Length: 5\r\nTransfer-Encoding: gzip\r\n\r\n", "POST", "/", "", b""
    ),
    "the most chunk extensions": (
        CHUNKED + b"1;" + b"a" * 19 + b"\r\nx\r\n0;" + b"b" * 19 + b"\r\n\r\n", "POST", "/", "", b"x"
    ),
}  # fmt: skip
INVALID: dict[str, tuple[bytes, int]] = {
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "leading space": (b" GET / HTTP/1.1\r\n" + H + b"\r\n", 400),
    "two empty lines before": (b"\r\n\r\nGET / HTTP/1.1\r\n" + H + b"\r\n", 400),
    "bare CR before": (b"\rGET / HTTP/1.1\r\n" + H + b"\r\n", 400),
    "bare LF before": (b"\nGET / HTTP/1.1\r\n" + H + b"\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\n" + H + b"\r\n", 400),
    "tab for space": (b"GET\t/ HTTP/1.1\r\n" + H + b"\r\n", 400),
    "trailing space": (b"GET / HTTP/1.1 \r\n" + H + b"\r\n", 400),
    "version 0.9": (b"GET /\r\n\r\n", 400),
    "method is no token": (b"G(T / HTTP/1.1\r\n" + H + b"\r\n", 400),
    "method too long": (b"A" * 33 + b" / HTTP/1.1\r\n" + H + b"\r\n", 501),
    "CONNECT": (b"CONNECT a:443 HTTP/1.1\r\n" + H + b"\r\n", 501),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "version in lower case": (b"GET / http/1.1\r\n" + H + b"\r\n", 400),
    "version with two digits": (b"GET / HTTP/1.10\r\n" + H + b"\r\n", 400),
    "version with another digit": ("GET / HTTP/1.¹\r\n".encode("latin-1") + H + b"\r\n", 400),
    "empty target": (b"GET  HTTP/1.1\r\n" + H + b"\r\n", 400),
    "relative target": (b"GET a/b HTTP/1.1\r\n" + H + b"\r\n", 400),
    "asterisk for GET": (b"GET * HTTP/1.1\r\n" + H + b"\r\n", 400),
    "another scheme": (b"GET ftp://a/ HTTP/1.1\r\n" + H + b"\r\n", 400),
    "userinfo": (b"GET http://u:p@a/ HTTP/1.1\r\n" + H + b"\r\n", 400),
    "no host in the target": (b"GET http:///p HTTP/1.1\r\n" + H + b"\r\n", 400),
    "only a port in the target": (b"GET http://:80/p HTTP/1.1\r\n" + H + b"\r\n", 400),
    "fragment": (b"GET /a#b HTTP/1.1\r\n" + H + b"\r\n", 400),
    "fragment in the query": (b"GET /a?b#c HTTP/1.1\r\n" + H + b"\r\n", 400),
    "backslash": (b"GET /a\\b HTTP/1.1\r\n" + H + b"\r\n", 400),
    "raw byte above ASCII": (b"GET /\xc3\xa9 HTTP/1.1\r\n" + H + b"\r\n", 400),
    "control character": (b"GET /\x01 HTTP/1.1\r\n" + H + b"\r\n", 400),
    "CR in the target": (b"GET /\r/ HTTP/1.1\r\n" + H + b"\r\n", 400),
    "half an escape": (b"GET /%2 HTTP/1.1\r\n" + H + b"\r\n", 400),
    "no hex": (b"GET /%zz HTTP/1.1\r\n" + H + b"\r\n", 400),
    "encoded NUL": (b"GET /a%00 HTTP/1.1\r\n" + H + b"\r\n", 400),
    "encoded line end": (b"GET /a%0d%0aX:y HTTP/1.1\r\n" + H + b"\r\n", 400),
    "encoded non-utf-8": (b"GET /%ff HTTP/1.1\r\n" + H + b"\r\n", 400),
    "overlong utf-8": (b"GET /%c0%af HTTP/1.1\r\n" + H + b"\r\n", 400),
    "dot segments": (b"GET /a/../b HTTP/1.1\r\n" + H + b"\r\n", 400),
    "encoded dot segments": (b"GET /a/%2e%2E/b HTTP/1.1\r\n" + H + b"\r\n", 400),
    "line too long": (b"GET /" + b"a" * 67 + b" HTTP/1.1\r\n" + H + b"\r\n", 414),
    "line without end": (b"GET /" + b"a" * 500, 414),
    "no host": (b"GET / HTTP/1.1\r\nX: a\r\n\r\n", 400),
    "no fields": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\n" + H + b"Host: b\r\n\r\n", 400),
    "the same host twice": (b"GET / HTTP/1.1\r\n" + H + H + b"\r\n", 400),
    "a host list": (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    "two hosts in 1.0": (b"GET / HTTP/1.0\r\n" + H + b"Host: b\r\n\r\n", 400),
    "path in the host": (b"GET / HTTP/1.1\r\nHost: a/?x=\r\n\r\n", 400),
    "userinfo in the host": (b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
    "bad port": (b"GET / HTTP/1.1\r\nHost: a:8o\r\n\r\n", 400),
    "obs-text in the host": (b"GET / HTTP/1.1\r\nHost: \xe9\r\n\r\n", 400),
    "space before the colon": (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
    "no colon": (b"GET / HTTP/1.1\r\n" + H + b"X\r\n\r\n", 400),
    "no name": (b"GET / HTTP/1.1\r\n" + H + b": a\r\n\r\n", 400),
    "name is no token": (b"GET / HTTP/1.1\r\n" + H + b"X(: a\r\n\r\n", 400),
    "name above ASCII": (b"GET / HTTP/1.1\r\n" + H + b"\xe9: a\r\n\r\n", 400),
    "folded line": (b"GET / HTTP/1.1\r\n" + H + b"X: a\r\n b\r\n\r\n", 400),
    "folded first line": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "NUL": (b"GET / HTTP/1.1\r\n" + H + b"X: a\0b\r\n\r\n", 400),
    "vertical tab": (b"GET / HTTP/1.1\r\n" + H + b"X: a\x0bb\r\n\r\n", 400),
    "DEL": (b"GET / HTTP/1.1\r\n" + H + b"X: a\x7fb\r\n\r\n", 400),
    "bare CR": (b"GET / HTTP/1.1\r\n" + H + b"X: a\rb\r\n\r\n", 400),
    "bare LF": (b"GET / HTTP/1.1\r\n" + H + b"X: a\nY: b\r\n\r\n", 400),
    "only bare LF": (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    "bare LF at the end": (b"GET / HTTP/1.1\r\nHost: a\n\n", 400),
    "CR CR LF": (b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", 400),
    "fields too long": (b"GET / HTTP/1.1\r\n" + H + b"X: " + b"a" * 187 + b"\r\n\r\n", 431),
    "fields without end": (b"GET / HTTP/1.1\r\n" + b"X: aaaa\r\n" * 60, 431),
    "field without end": (b"GET / HTTP/1.1\r\nX: " + b"a" * 500, 431),
    "too many fields": (b"GET / HTTP/1.1\r\n" + H + b"X: a\r\n" * 8 + b"\r\n", 431),
    "expectation": (b"POST / HTTP/1.1\r\n" + H + b"Expect: gold\r\nContent-Length: 1\r\n\r\nx", 417),
    "two lengths": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
    "the same length twice": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
    "a length list": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 1, 1\r\n\r\nx", 400),
    "empty length": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length:\r\n\r\n", 400),
    "length too large": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 65\r\n\r\n", 413),
    "length far too large": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: " + b"9" * 99 + b"\r\n\r\n", 413),
    "length and chunked": (CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n") + b"0\r\n\r\n", 400),
    "chunked in 1.0": (CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n", 400),
    "another coding": (CHUNKED.replace(b"chunked", b"gzip, chunked") + b"0\r\n\r\n", 501),
    "coding without chunked": (CHUNKED.replace(b"chunked", b"gzip"), 400),
    "chunked not last": (CHUNKED.replace(b"chunked", b"chunked, gzip"), 400),
    "chunked twice": (CHUNKED.replace(b"chunked", b"chunked, chunked"), 400),
    "chunked twice in two lines": (CHUNKED.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"), 400),
    "chunked with a parameter": (CHUNKED.replace(b"chunked", b"chunked;a=b"), 400),
    "chunked with a vertical tab": (CHUNKED.replace(b"chunked", b"\x0bchunked"), 400),
    "empty coding": (CHUNKED.replace(b"chunked", b""), 400),
    "no chunk size": (CHUNKED + b"\r\n", 400),
    "chunk size is no hex": (CHUNKED + b"5g\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size with 0x": (CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size with sign": (CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size with underscore": (CHUNKED + b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n", 400),
    "space behind the chunk size": (CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n", 400),
    "space before the chunk size": (CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n", 400),
    "bare LF behind the chunk size": (CHUNKED + b"5\nhello\r\n0\r\n\r\n", 400),
    "CR in an extension": (CHUNKED + b"5;a\rb\r\nhello\r\n0\r\n\r\n", 400),
    "extension without name": (CHUNKED + b"5;\r\nhello\r\n0\r\n\r\n", 400),
    "chunk line too long": (CHUNKED + b"5;" + b"a" * 31 + b"\r\nhello\r\n0\r\n\r\n", 400),
    "chunk line without end": (CHUNKED + b"0" * 99, 400),
    "extensions too long": (CHUNKED + b"1;aaaaaaaaaaaaaaaaaaaa\r\nx\r\n" * 2 + b"0\r\n\r\n", 400),
    "chunk size of 17 digits": (CHUNKED + b"1" + b"0" * 16 + b"\r\n", 400),
    "chunk too large": (CHUNKED + b"41\r\n", 413),
    "chunks too large": (CHUNKED + b"30\r\n" + b"x" * 48 + b"\r\n11\r\n", 413),
    "chunk longer than said": (CHUNKED + b"5\r\nhello!\r\n0\r\n\r\n", 400),
    "chunk ends with LF": (CHUNKED + b"5\r\nhello\n0\r\n\r\n", 400),
    "chunk ends with CR CR": (CHUNKED + b"5\r\nhello\r\r0\r\n\r\n", 400),
    "trailer without colon": (CHUNKED + b"0\r\nX\r\n\r\n", 400),
    "trailer folded": (CHUNKED + b"0\r\nX: a\r\n b\r\n\r\n", 400),
    "trailers too long": (CHUNKED + b"0\r\nX: " + b"a" * 300, 431),
    "NUL in the line": (b"GET /\0 HTTP/1.1\r\n" + H + b"\r\n", 400),
    "obs-text in the method": (b"G\xc9T / HTTP/1.1\r\n" + H + b"\r\n", 400),
    "no method": (b" / HTTP/1.1\r\n" + H + b"\r\n", 400),
    "four words": (b"GET / x HTTP/1.1\r\n" + H + b"\r\n", 400),
    "CR before the version": (b"GET /\rHTTP/1.1\r\n" + H + b"\r\n", 400),
    "CR CR behind the line": (b"GET / HTTP/1.1\r\r\n" + H + b"\r\n", 400),
    "bare LF behind the line": (b"GET / HTTP/1.1\n" + H + b"\r\n", 400),
    "version without minor": (b"GET / HTTP/1\r\n" + H + b"\r\n", 400),
    "version with a zero before": (b"GET / HTTP/01.1\r\n" + H + b"\r\n", 400),
    "version with more behind": (b"GET / HTTP/1.1x\r\n" + H + b"\r\n", 400),
    "another protocol": (b"GET / HTTPS/1.1\r\n" + H + b"\r\n", 400),
    "ICY": (b"SOURCE / ICE/1.0\r\n" + H + b"\r\n", 400),
    "version 0.9 by name": (b"GET / HTTP/0.9\r\n" + H + b"\r\n", 505),
    "version 3.0": (b"GET / HTTP/3.0\r\n" + H + b"\r\n", 505),
    "only a query": (b"GET ?a HTTP/1.1\r\n" + H + b"\r\n", 400),
    "asterisk with a query": (b"OPTIONS *?a HTTP/1.1\r\n" + H + b"\r\n", 400),
    "two asterisks": (b"OPTIONS ** HTTP/1.1\r\n" + H + b"\r\n", 400),
    "authority form": (b"GET a:80 HTTP/1.1\r\n" + H + b"\r\n", 400),
    "one slash behind the scheme": (b"GET http:/a HTTP/1.1\r\n" + H + b"\r\n", 400),
    "port of six digits": (b"GET http://a:123456/ HTTP/1.1\r\n" + H + b"\r\n", 400),
    "open bracket": (b"GET http://[::1/ HTTP/1.1\r\n" + H + b"\r\n", 400),
    "dot segments in absolute form": (b"GET http://a/../b HTTP/1.1\r\n" + H + b"\r\n", 400),
    "a fragment in absolute form": (b"GET http://a/?b#c HTTP/1.1\r\n" + H + b"\r\n", 400),
    "a path that ends with a dot segment": (b"GET /a/. HTTP/1.1\r\n" + H + b"\r\n", 400),
    "half an encoded dot segment": (b"GET /.%2e/b HTTP/1.1\r\n" + H + b"\r\n", 400),
    "an encoded slash before dots": (b"GET /a%2f..%2fb HTTP/1.1\r\n" + H + b"\r\n", 400),
    "a lone percent": (b"GET /a% HTTP/1.1\r\n" + H + b"\r\n", 400),
    "a %u escape": (b"GET /%u0041 HTTP/1.1\r\n" + H + b"\r\n", 400),
    "an encoded surrogate": (b"GET /%ed%a0%80 HTTP/1.1\r\n" + H + b"\r\n", 400),
    "half an encoded character": (b"GET /%e2%80 HTTP/1.1\r\n" + H + b"\r\n", 400),
    "encoded DEL": (b"GET /%7f HTTP/1.1\r\n" + H + b"\r\n", 400),
    "braces in the path": (b"GET /{a} HTTP/1.1\r\n" + H + b"\r\n", 400),
    "quotes in the path": (b'GET /"a" HTTP/1.1\r\n' + H + b"\r\n", 400),
    "space in the host": (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "query in the host": (b"GET / HTTP/1.1\r\nHost: a/?x=\r\n\r\n", 400),
    "NUL in the host": (b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n", 400),
    "a second host without value": (b"GET / HTTP/1.1\r\nHost: a\r\nHost:\r\n\r\n", 400),
    "host with a space before the colon": (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
    "no host beside an absolute target": (b"GET http://a/ HTTP/1.1\r\n\r\n", 400),
    "tab before the colon": (b"GET / HTTP/1.1\r\n" + H + b"X\t: a\r\n\r\n", 400),
    "obs-text in a name": (b"GET / HTTP/1.1\r\n" + H + b"X\xe9: a\r\n\r\n", 400),
    "folded with a tab": (b"GET / HTTP/1.1\r\n" + H + b"X: a\r\n\tb\r\n\r\n", 400),
    "first field folded": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "expectation and more": (
        b"POST / HTTP/1.1\r\n" + H + b"Expect: 100-continue, x\r\nContent-Length: 1\r\n\r\nx", 417
    ),
    "an empty expectation": (b"POST / HTTP/1.1\r\n" + H + b"Expect:\r\nContent-Length: 1\r\n\r\nx", 417),
    "the same length in two cases": (
        b"POST / HTTP/1.1\r\n" + H + b"content-length: 1\r\nCONTENT-LENGTH: 1\r\n\r\nx", 400
    ),
    "an empty length behind another": (
        b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 1\r\nContent-Length:\r\n\r\nx", 400
    ),
    "length and another coding": (
        b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 1\r\nTransfer-Encoding: x\r\n\r\nx", 400
    ),
    "chunked with a space before the colon": (CHUNKED.replace(b"g:", b"g :"), 400),
    "chunked behind an empty line": (CHUNKED.replace(b"Transfer", b"Transfer-Encoding:\r\nTransfer"), 400),
    "chunked behind a comma": (CHUNKED.replace(b"chunked", b", chunked"), 400),
    "chunked before a comma": (CHUNKED.replace(b"chunked", b"chunked,"), 400),
    "chunked in quotes": (CHUNKED.replace(b"chunked", b'"chunked"'), 400),
    "nearly chunked": (CHUNKED.replace(b"chunked", b"xchunked"), 400),
    "identity": (CHUNKED.replace(b"chunked", b"identity"), 400),
    "identity and chunked": (CHUNKED.replace(b"chunked", b"identity, chunked"), 501),
    "chunked folded": (CHUNKED.replace(b" chunked", b"\r\n chunked"), 400),
    "chunked with a no-break space": (CHUNKED.replace(b"chunked", b"\xa0chunked"), 400),
    "negative chunk size": (CHUNKED + b"-1\r\n", 400),
    "only an extension": (CHUNKED + b";a\r\n0\r\n\r\n", 400),
    "extension not closed": (CHUNKED + b'5;a="x\r\nhello\r\n0\r\n\r\n', 400),
    "LF in a quoted extension": (CHUNKED + b'5;a="\n"\r\nhello\r\n0\r\n\r\n', 400),
    "CR CR behind the chunk size": (CHUNKED + b"5\r\r\nhello\r\n0\r\n\r\n", 400),
    "digits of another script": (CHUNKED + b"\xb2\r\nhi\r\n0\r\n\r\n", 400),
    "empty line before the chunk size": (CHUNKED + b"\r\n5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk shorter than said": (CHUNKED + b"5\r\nhel\r\n0\r\n\r\n", 400),
    "bare LF behind a trailer": (CHUNKED + b"0\r\nX: a\n\r\n", 400),
    "bare LF at the end of chunks": (CHUNKED + b"0\r\n\n", 400),
    "NUL in a trailer": (CHUNKED + b"0\r\nX: \0\r\n\r\n", 400),
    "space before the colon of a trailer": (CHUNKED + b"0\r\nX : a\r\n\r\n", 400),
    "too many trailers": (CHUNKED + b"0\r\n" + b"X: a\r\n" * 9 + b"\r\n", 431),
    **{
        f"length {text!r}": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: " + text + b"\r\n\r\nxxxxx", 400)
        for text in b"+5|-1|1_0|5 5|0x5|5.0|5e0|\xb2|\xa05|\xd9\xa5|five|5;".split(b"|")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_a_valid_request_is_read(name: str) -> None:
    data, method, path, query, body = VALID[name]
    outcome = parse(data)
    assert outcome.status is None, outcome.message
    assert outcome.pending is None
    ((head, content),) = outcome.requests
    assert (head.method, head.path, head.query, content) == (method, path, query, body)


@pytest.mark.parametrize("name", VALID)
def test_a_valid_request_reads_the_same_wherever_it_is_cut(name: str) -> None:
    data = VALID[name][0]
    whole = parse(data)
    assert parse(*by_bytes(data)) == whole
    for cut in range(1, len(data)):
        assert parse(data[:cut], data[cut:]) == whole


@pytest.mark.parametrize("name", VALID)
def test_a_valid_request_reads_the_same_with_another_behind_it(name: str) -> None:
    data = VALID[name][0]
    ((head, body),) = parse(data).requests
    behind = b"GET /next HTTP/1.1\r\nHost: b\r\n\r\n"
    for outcome in (parse(data + behind), parse(*by_bytes(data + behind))):
        assert outcome.status is None
        assert outcome.requests[0] == (head, body)
        assert outcome.requests[1][0].path == "/next"


@pytest.mark.parametrize("name", INVALID)
@pytest.mark.promise("R10", "input: odd digits", "input: paths in Host")
def test_what_is_invalid_is_refused_with_its_status(name: str) -> None:
    data, status = INVALID[name]
    outcome = parse(data)
    assert (outcome.status, outcome.requests) == (status, ())


@pytest.mark.parametrize("name", INVALID)
def test_what_is_invalid_is_refused_the_same_wherever_it_is_cut_and_whatever_follows(name: str) -> None:
    data, _ = INVALID[name]
    whole = parse(data)
    assert parse(*by_bytes(data)) == whole
    for cut in range(1, len(data)):
        assert parse(data[:cut], data[cut:]) == whole
    behind = b"\r\n\r\nGET /next HTTP/1.1\r\nHost: b\r\n\r\n"
    assert (parse(data + behind).status, parse(*by_bytes(data), behind).status) == (whole.status, whole.status)


@pytest.mark.parametrize("name", INVALID)
def test_nothing_is_read_behind_a_refusal(name: str) -> None:
    data, status = INVALID[name]
    outcome = parse(data, b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (outcome.status, outcome.requests) == (status, ())


HEADS: dict[str, tuple[bytes, tuple[tuple[int, int], bool, bool]]] = {
    # name: request line's version and fields, then version, keep_alive, expect_continue
    "1.1 persists": (b"1.1\r\n" + H, ((1, 1), True, False)),
    "1.1 with close": (b"1.1\r\n" + H + b"Connection: Close\r\n", ((1, 1), False, False)),
    "close in a list": (b"1.1\r\n" + H + b"Connection: x, ,close\r\n", ((1, 1), False, False)),
    "close in a second line": (b"1.1\r\n" + H + b"Connection: x\r\nConnection: close\r\n", ((1, 1), False, False)),
    "closed is not close": (b"1.1\r\n" + H + b"Connection: closed\r\n", ((1, 1), True, False)),
    "1.0 closes": (b"1.0\r\n", ((1, 0), False, False)),
    "1.0 with keep-alive": (b"1.0\r\nConnection: Keep-Alive\r\n", ((1, 0), True, False)),
    "1.0 with both": (b"1.0\r\nConnection: keep-alive, close\r\n", ((1, 0), False, False)),
    "1.2 is 1.1": (b"1.2\r\n" + H, ((1, 1), True, False)),
    "expectation": (b"1.1\r\n" + H + b"Expect: 100-Continue\r\nContent-Length: 1\r\n", ((1, 1), True, True)),
    "expectation of nothing": (b"1.1\r\n" + H + b"Expect: 100-continue\r\n", ((1, 1), True, False)),
    "expectation in 1.0": (b"1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n", ((1, 0), False, False)),
}


@pytest.mark.parametrize("name", HEADS)
def test_persistence_and_expectation_follow_the_version_and_the_fields(name: str) -> None:
    rest, expected = HEADS[name]
    parser = Parser(SMALL)
    parser.feed(b"POST / HTTP/" + rest + b"\r\n")
    head = parser.next_event()
    assert isinstance(head, RequestHead)
    assert (head.version, head.keep_alive, head.expect_continue) == expected


def test_a_body_that_is_too_large_is_refused_only_after_its_head() -> None:
    parser = Parser(SMALL)
    parser.feed(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 65\r\n\r\n")
    assert isinstance(parser.next_event(), RequestHead)
    with pytest.raises(ApiError) as refusal:
        parser.next_event()
    assert refusal.value.status == 413


def test_content_is_handed_on_as_it_comes() -> None:
    parser = Parser(SMALL)
    parser.feed(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe")
    parser.next_event()
    assert parser.next_event() == BodyPart(b"he")
    assert parser.next_event() is None
    assert not parser.clean


PIECES = st.one_of(
    st.sampled_from(
        [
            b"GET ",
            b"POST ",
            b"OPTIONS ",
            b"/",
            b"/a%20b",
            b"*",
            b"http://a/",
            b" HTTP/1.1",
            b" HTTP/1.0",
            b"\r\n",
            b"\r\n\r\n",
            b"\n",
            b"\r",
            b" ",
            b"\t",
            b":",
            b"Host: a\r\n",
            b"Content-Length: 5\r\n",
            b"Content-Length: ",
            b"Transfer-Encoding: ",
            b"chunked",
            b"chunked\r\n\r\n",
            b"Expect: 100-continue\r\n",
            b"Connection: close\r\n",
            b"5\r\nhello\r\n",
            b"0\r\n\r\n",
            b"0\r\n",
            b"5;a=b\r\n",
            b"hello",
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            CHUNKED,
            b"X: y\r\n",
            b"%",
            b"..",
            b"\0",
            b"\xff",
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
            b"a" * 90,
            b"x: " + b"v" * 70 + b"\r\n",
        ]
    ),
    st.binary(max_size=6),
)


@settings(max_examples=1500, deadline=None)
@given(pieces=st.lists(PIECES, max_size=14), cuts=st.lists(st.integers(0, 400), max_size=8))
@pytest.mark.promise("R8", "R10")
def test_any_bytes_parse_or_are_refused_the_same_however_they_are_cut(pieces: list[bytes], cuts: list[int]) -> None:
    data = b"".join(pieces)
    whole = parse(data)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert parse(*[data[a:b] for a, b in itertools.pairwise(edges)]) == whole
    assert parse(*by_bytes(data)) == whole
    assert whole.status in (None, 400, 413, 414, 417, 431, 501, 505)


@given(chunks=st.lists(st.binary(min_size=1, max_size=20), max_size=3), behind=st.binary(max_size=5))
def test_chunks_are_the_content_they_carry(chunks: list[bytes], behind: bytes) -> None:
    data = CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    assert parse(data + behind).requests[0][1] == b"".join(chunks)
