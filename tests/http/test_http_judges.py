"""h11 and llhttp judge the parser: what both take is read alike; where one is stricter, the reason is written down."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.judges import Verdict, disagreement, h11_verdict, httptools_verdict
from tests.http.test_http_parser import INVALID, PIECES, VALID, parse
from vserve.http.limits import Limits

Judge = Callable[[bytes], Verdict]
JUDGES: dict[str, Judge] = {"h11": h11_verdict, "llhttp": httptools_verdict}
ROOMY = Limits()

JUDGE_IS_STRICTER: dict[str, dict[str, str]] = {
    "h11": {
        "one empty line before": "RFC 9112 2.2 asks for it to be ignored",
        "trailers that look like framing": "RFC 9110 6.5.1: we drop every trailer, so that none can frame anything",
    },
    "llhttp": {
        "an odd method": "RFC 9110 9.1: any token is a method; the router answers 405",
        "a lower case method": "the same",
        "a higher minor version": "RFC 9110 2.5: read as the highest minor version known",
        "chunk extensions": "RFC 9112 7.1.1 allows whitespace around ; and =",
        "trailers that look like framing": "RFC 9110 6.5.1: we drop every trailer, so that none can frame anything",
    },
}
"""Valid cases that a judge refuses, and why we take them."""

OUR_POLICY = frozenset(
    {
        # Limits.
        "method too long", "line too long", "fields too long", "too many fields", "chunk line too long",
        "extensions too long", "too many trailers", "trailers too long",
        # What a request may ask of this server: no proxy, no other expectation or coding.
        "CONNECT", "asterisk for GET", "another scheme", "userinfo", "expectation", "expectation and more",
        "an empty expectation", "authority form", "chunked in 1.0", "relative target",
        # The grammar of the target (RFC 3986), which both judges leave to the application.
        "no host in the target", "only a port in the target", "fragment", "fragment in the query", "backslash",
        "half an escape", "no hex", "encoded NUL", "encoded line end", "encoded non-utf-8", "overlong utf-8",
        "dot segments", "encoded dot segments", "asterisk with a query", "two asterisks",
        "one slash behind the scheme", "port of six digits", "open bracket", "dot segments in absolute form",
        "a fragment in absolute form", "a path that ends with a dot segment", "half an encoded dot segment",
        "an encoded slash before dots", "a lone percent", "a %u escape", "an encoded surrogate",
        "half an encoded character", "encoded DEL", "braces in the path", "quotes in the path", "only a query",
        # The grammar of Host (RFC 9112 3.2), the same.
        "a host list", "path in the host", "userinfo in the host", "bad port", "obs-text in the host",
        "space in the host", "query in the host",
    }
)  # fmt: skip
"""Invalid cases that a judge may take: rules it leaves to whoever uses it, and bounds of our own."""

WE_ARE_STRICTER: dict[str, dict[str, str]] = {
    "h11": {
        "folded line": "obs-fold, which RFC 9112 5.2 lets a server refuse",
        "folded with a tab": "the same",
        "trailer folded": "the same",
        "DEL": "no field-vchar (RFC 9110 5.5)",
        "bare LF": "RFC 9112 2.2 may take it, and proxies differ",
        "only bare LF": "the same",
        "bare LF at the end": "the same",
        "bare LF behind the line": "the same",
        "bare LF behind a trailer": "the same",
        "the same length twice": "RFC 9110 8.6 may take equal lengths, and proxies differ",
        "the same length in two cases": "the same",
        "a length list": "the same",
        "length and chunked": "RFC 9112 6.3 (3): ought to be handled as an error",
        "space behind the chunk size": "whitespace where RFC 9112 7.1 has none",
        "CR in an extension": "RFC 9112 2.2: a bare CR",
        "extension without name": "no chunk-ext (RFC 9112 7.1.1)",
        "extension not closed": "the same",
        "bare LF at the end of chunks": "RFC 9112 2.2, as above",
        "HTTP/2 preface": "RFC 9110 15.6.6: 505 for another major version",
        "version 3.0": "the same",
        "version 0.9 by name": "the same",
    },
    "llhttp": {
        "two empty lines before": "RFC 9112 2.2 says at least one; more are a way to keep a parser busy",
        "bare CR before": "RFC 9112 2.2: a bare CR",
        "bare LF before": "RFC 9112 2.2 may take it, and proxies differ",
        "two spaces": "RFC 9112 3: lenient splitting of the line is how requests are smuggled",
        "version 0.9": "HTTP/0.9 has no fields",
        "version 0.9 by name": "the same",
        "no host": "RFC 9112 3.2: 400",
        "no fields": "the same",
        "no host beside an absolute target": "the same",
        "two hosts": "the same",
        "the same host twice": "the same",
        "two hosts in 1.0": "the same",
        "a second host without value": "the same",
        "another coding": "RFC 9112 6.1: 501 for a coding that is not understood",
        "ICY": "not HTTP",
    },
}
"""Invalid cases that a judge takes although RFC 9112 or 9110 would let it refuse, and why we refuse them."""


def ours(data: bytes) -> tuple[list[tuple[bytes, bytes, bytes]], bool]:
    outcome = parse(data, limits=ROOMY)
    return [
        (head.method.encode(), head.target.encode("latin-1"), body) for head, body in outcome.requests
    ], outcome.status is not None


@pytest.mark.parametrize("judge", JUDGES)
def test_a_judge_reads_every_valid_request_as_we_do_or_is_known_to_be_stricter(judge: str) -> None:
    refused = set()
    for name, (data, *_) in VALID.items():
        verdict = JUDGES[judge](data)
        read, refusal = ours(data)
        assert not refusal
        assert disagreement(read, refusal, verdict) is None, name
        if verdict.refused:
            refused.add(name)
    assert refused == set(JUDGE_IS_STRICTER[judge])


@pytest.mark.parametrize("judge", JUDGES)
def test_what_we_refuse_a_judge_refuses_too_or_the_reason_is_written_down(judge: str) -> None:
    taken = {name for name, (data, _) in INVALID.items() if JUDGES[judge](data).requests}
    assert taken - OUR_POLICY == set(WE_ARE_STRICTER[judge])


def test_every_reason_is_about_a_case_of_the_table() -> None:
    assert set(INVALID) >= OUR_POLICY


STREAM = st.lists(
    st.one_of(
        st.sampled_from([data for data, *_ in VALID.values()]),
        st.sampled_from([data for data, _ in INVALID.values()]),
        PIECES,
    ),
    min_size=1,
    max_size=4,
).map(b"".join)
EDIT = st.tuples(st.integers(0, 400), st.integers(0, 3), st.one_of(st.binary(max_size=2), PIECES))


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """data with some bytes at each place replaced."""
    for place, length, new in edits:
        place %= len(data) + 1
        data = data[:place] + new + data[place + length :]
    return data


@pytest.mark.parametrize("judge", JUDGES)
@settings(max_examples=1200, deadline=None)
@given(stream=STREAM, edits=st.lists(EDIT, max_size=3))
@pytest.mark.promise("R10")
def test_what_we_and_a_judge_both_take_we_read_alike(
    judge: str, stream: bytes, edits: list[tuple[int, int, bytes]]
) -> None:
    data = edited(stream, edits)
    verdict = JUDGES[judge](data)
    assert disagreement(*ours(data), verdict) is None
