"""The values that pass between the parts: fields, requests, the state table."""

from __future__ import annotations

import asyncio

from tests.fakes_http import Edge, run
from vserve.http.events import Headers
from vserve.http.state import NEXT, Cause, State

FIELDS = Headers([("a", "1"), ("b", "2"), ("a", "3")])


def test_names_compare_without_case_and_lines_join() -> None:
    assert (FIELDS.get("A"), FIELDS.get("b"), FIELDS.get("c"), FIELDS.get("c", "d")) == ("1, 3", "2", None, "d")
    assert ("B" in FIELDS, "c" in FIELDS, len(FIELDS)) == (True, False, 3)
    assert list(FIELDS) == [("a", "1"), ("b", "2"), ("a", "3")]


def test_a_repr_shows_no_values() -> None:
    assert "secret" not in repr(Headers([("authorization", "Bearer secret")]))


def test_a_closed_connection_stays_closed() -> None:
    assert not [state for state, _ in NEXT if state is State.CLOSED]


def test_every_live_state_can_end_and_be_lost() -> None:
    for state in State:
        assert ((state, Cause.LOST) in NEXT) == (state is not State.CLOSED)
        assert ((state, Cause.LAST) in NEXT) == (state < State.CLOSING)


def test_nothing_leads_back_from_closing_to_another_request() -> None:
    assert {NEXT[state, cause] for state, cause in NEXT if state is State.CLOSING} == {State.CLOSED}


def test_every_state_but_idle_is_reached() -> None:
    assert set(NEXT.values()) == set(State)


def test_a_request_has_its_parts_and_its_query_as_a_form() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect(("192.0.2.7", 1234))
        client.send(b"POST /hold?a=1&a=%C3%A9&b=&c HTTP/1.1\r\nHost: h\r\nX-Y: z\r\nContent-Length: 2\r\n\r\nhi")
        request = edge.held.last.request
        assert (request.method, request.path, request.body, request.version) == ("POST", "/hold", b"hi", (1, 1))
        assert (request.target, request.peer) == ("/hold?a=1&a=%C3%A9&b=&c", "192.0.2.7:1234")
        assert request.headers.get("x-y") == "z"
        assert request.received_s == edge.clock.now_s
        assert request.query_params() == {"a": ["1", "é"], "b": [""], "c": [""]}
        assert request is edge.held.last.request
        client.vanish()
        await asyncio.sleep(0)
        edge.server.site.stop_sweeping()

    run(main)


def test_a_query_of_very_many_fields_is_cut() -> None:
    async def main() -> None:
        edge = Edge()
        client = edge.connect()
        client.send(b"GET /hold?" + b"&".join(b"a%d" % i for i in range(1000)) + b" HTTP/1.1\r\nHost: h\r\n\r\n")
        assert len(edge.held.last.request.query_params()) == 256
        client.vanish()
        edge.server.site.stop_sweeping()

    run(main)
