"""Replies as bytes, read back by h11."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes_http import answers, field
from vserve.http.exchange import Response
from vserve.http.writer import CLOSE, KEEP, KEEP_1_0, Writer, chunk, format_fields

DATE = "Sun, 06 Nov 1994 08:49:37 GMT"


def writer() -> Writer:
    return Writer((("server", "vserve"),), lambda: 784111777.9)


def read(data: bytes, method: str = "GET") -> tuple[h11.Response, bytes]:
    ((response, body),) = answers(data, methods=[method])
    return response, body


def test_a_reply_carries_its_content_and_the_fields_of_the_server() -> None:
    response, body = read(writer().reply(Response(200, b"{}"), "req-1", KEEP))
    assert (response.status_code, response.reason, body) == (200, b"OK", b"{}")
    assert {name: field(response, name) for name in ("date", "server", "content-type", "content-length")} == {
        "date": DATE,
        "server": "vserve",
        "content-type": "application/json",
        "content-length": "2",
    }
    assert (field(response, "x-request-id"), field(response, "connection")) == ("req-1", None)


def test_an_empty_reply_says_so_and_has_no_type() -> None:
    response, body = read(writer().reply(Response(200), "r", KEEP))
    assert (field(response, "content-length"), field(response, "content-type"), body) == ("0", None, b"")


def test_a_reply_to_head_has_the_length_but_not_the_content() -> None:
    response, body = read(writer().reply(Response(200, b"12345"), "r", KEEP, True), "HEAD")
    assert (field(response, "content-length"), body) == ("5", b"")


@pytest.mark.parametrize("status", [204, 304])
def test_a_status_without_content_has_neither_length_nor_content(status: int) -> None:
    response, body = read(writer().reply(Response(status, b"x"), "r", KEEP))
    assert (field(response, "content-length"), body) == (None, b"")


@pytest.mark.parametrize(("persistence", "value"), [(CLOSE, "close"), (KEEP_1_0, "keep-alive"), (KEEP, None)])
def test_persistence_is_told(persistence: str, value: str | None) -> None:
    assert field(read(writer().reply(Response(200), "r", persistence))[0], "connection") == value


def test_own_fields_of_a_handler_do_not_double_those_of_the_server() -> None:
    headers = (
        ("Connection", "close"),
        ("Content-Length", "9"),
        ("X-Request-Id", "z"),
        ("x-more", "1"),
        ("x-more", "2"),
    )
    response, _ = read(writer().reply(Response(200, b"x", headers=headers), "r", KEEP))
    assert [value for name, value in response.headers if name == b"x-more"] == [b"1", b"2"]
    assert (field(response, "content-length"), field(response, "x-request-id")) == ("1", "r")


def test_an_unknown_status_has_no_reason() -> None:
    assert writer().reply(Response(299), "r", KEEP).startswith(b"HTTP/1.1 299 \r\n")


def test_the_date_follows_the_clock_by_the_second() -> None:
    now = [0.0]
    dated = Writer((), lambda: now[0])
    first = dated.reply(Response(200), "r", KEEP)
    now[0] = 0.9
    assert dated.reply(Response(200), "r", KEEP) == first
    now[0] = 1.0
    assert b"Thu, 01 Jan 1970 00:00:01 GMT" in dated.reply(Response(200), "r", KEEP)


def test_content_types_that_never_repeat_do_not_pile_up() -> None:
    many = writer()
    for number in range(1000):
        many.reply(Response(200, b"x", f"text/x-{number}"), "r", KEEP)
    assert len(many._starts) <= 65


@pytest.mark.parametrize(
    "pair",
    [("x", "a\r\nb: c"), ("x", "a\nb"), ("x", "a\0"), ("x", "…"), ("x y", "a"), ("", "a"), ("x:", "a"), ("x\r\n", "a")],
)
def test_a_field_that_is_none_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="header"):
        format_fields([pair])


@given(name=st.text(max_size=5), value=st.text(max_size=10))
def test_no_field_can_write_another(name: str, value: str) -> None:
    try:
        line = format_fields([(name, value)])
    except ValueError:
        return
    assert line == "" or (line.count("\r\n") == 1 and "\r" not in line[:-2] and "\n" not in line[:-2])


@given(parts=st.lists(st.binary(min_size=1, max_size=50), max_size=5))
def test_a_chunked_stream_is_read_as_what_was_written(parts: list[bytes]) -> None:
    head = writer().stream_head(200, "text/plain", (("a", "b"),), "r", KEEP, chunked=True)
    response, body = read(head + b"".join(map(chunk, parts)) + b"0\r\n\r\n")
    assert (body, field(response, "a"), field(response, "transfer-encoding")) == (b"".join(parts), "b", "chunked")
