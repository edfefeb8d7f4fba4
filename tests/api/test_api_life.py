"""How replies end: clients that vanish or dawdle, deadlines, failures, silence."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from tests.fakes_api import LETTERS, Stand, parse_events, raw_post, says, standing
from vserve.engine.request import FinishReason, GenRequest
from vserve.errors import Unavailable
from vserve.http.limits import Limits

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
ENDLESS: dict[str, Any] = {"prompt": "x", "max_tokens": 500, "ignore_eos": True}


def settled(stand: Stand) -> None:
    """Until nothing is under way."""
    stand.until(lambda: len(stand.app.replies) + stand.bridge.live + len(stand.app.keep_alive) == 0)


def whole_stream(peer: socket.socket) -> str:
    """The content of a chunked reply, read to its end."""
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        part = peer.recv(1 << 20)
        assert part, data[-300:]
        data += part
    head, _, rest = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    content = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        content += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return content.decode()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.promise("R2")
def test_a_client_that_vanishes_has_all_its_choices_cancelled(stream: bool, reset: bool, begun: bool) -> None:
    with standing(engine={"step_s": 0.01}) as stand:
        if not begun:
            stand.engine.running.clear()
        peer = raw_post(stand.port, COMPLETE, {**ENDLESS, "n": 3, "stream": stream})
        stand.until(lambda: stand.bridge.live == 3)
        if begun and stream:
            assert peer.recv(10)
        if reset:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        settled(stand)
        stand.engine.running.set()
        cancels = [stand.engine.cancels.get(timeout=10) for _ in range(3)]
        assert {cancel.reason for cancel in cancels} == {FinishReason.CANCELLED}
        assert {cancel.id for cancel in cancels} == {1, 2, 3}
        assert stand.post(COMPLETE, {"prompt": "x"}).json()["choices"][0]["text"] == "Hello, world!"


def test_a_stop_string_tells_the_engine_to_stop() -> None:
    with standing(says("abc"), engine={"step_s": 0.002}) as stand:
        body = stand.post(COMPLETE, {**ENDLESS, "stop": "bca"}).json()
        assert body["choices"][0]["text"] == "a"
        assert stand.engine.cancels.get(timeout=10).reason is FinishReason.STOP
        settled(stand)


def test_a_slow_reader_gets_all_the_text_in_fewer_events_and_little_is_buffered() -> None:
    # Above stream_buffer_bytes of unread events the connection would be cut.
    limits = Limits(write_high_bytes=4096, write_low_bytes=1024, stream_buffer_bytes=65536)
    many: dict[str, Any] = {**ENDLESS, "stream": True, "n": 64}
    with standing(says("0123456789"), limits=limits, engine={"step_s": 0.001}, send_buffer=4096) as stand:
        peer = raw_post(stand.port, COMPLETE, many, receive_buffer=4096)
        # The engine has finished every choice before the client reads its first byte.
        stand.until(lambda: stand.bridge.live == 0 and bool(stand.engine.requests))
        events = parse_events(whole_stream(peer))
        said = [""] * 64
        for event in events[:-1]:
            choice = event["choices"][0]
            said[choice["index"]] += choice["text"]
        assert said == ["0123456789" * 50] * 64
        assert events[-1] == "[DONE]"
        assert max(len(event["choices"][0]["text"]) for event in events[:-1]) > 50
        finishes = [event["choices"][0]["finish_reason"] for event in events[:-1]]
        assert finishes.count("length") == 64
        settled(stand)
        peer.close()


def test_a_slow_reader_that_vanishes_leaves_nothing_behind() -> None:
    limits = Limits(write_high_bytes=4096, write_low_bytes=1024)
    with standing(says("0123456789"), limits=limits, engine={"step_s": 0.001}, send_buffer=4096) as stand:
        peer = raw_post(stand.port, COMPLETE, {**ENDLESS, "stream": True, "n": 64}, receive_buffer=4096)
        stand.until(lambda: stand.bridge.live == 0 and bool(stand.engine.requests))
        peer.close()
        settled(stand)


def test_a_silent_stream_gets_comments_and_then_its_text() -> None:
    with standing(says("abc"), keep_alive_s=0.05) as stand:
        stand.engine.running.clear()
        peer = raw_post(stand.port, CHAT, {"messages": HI, "stream": True, "max_tokens": 3})
        data = b""
        while data.count(b":\n\n") < 2:
            data += peer.recv(4096)
        assert b"data:" not in data
        stand.engine.running.set()
        while not data.endswith(b"0\r\n\r\n"):
            data += peer.recv(4096)
        assert b'"content":"' in data
        assert b"data: [DONE]\n\n" in data
        settled(stand)
        peer.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "header"),
    [({"timeout_ms": 60}, {}), ({}, {"x_request_timeout": "60ms"}), ({}, {"x_request_timeout": "0.06"})],
)
@pytest.mark.promise("R4")
def test_a_deadline_in_the_queue_is_504_and_frees_the_engine(
    stream: bool, field: dict[str, int], header: dict[str, str]
) -> None:
    with standing() as stand:
        stand.engine.running.clear()
        reply = stand.post(COMPLETE, {**ENDLESS, **field, "stream": stream}, **header)
        assert reply.status_code == 504
        assert reply.json()["error"]["type"] == "TimeoutError"
        settled(stand)
        stand.engine.running.set()
        assert stand.engine.cancels.get(timeout=10).reason is FinishReason.TIMEOUT


@pytest.mark.promise("R4")
def test_a_deadline_in_a_stream_is_an_error_event() -> None:
    with standing(engine={"step_s": 0.01}) as stand:
        events = stand.events(COMPLETE, {**ENDLESS, "timeout_ms": 150})
        assert events[-1] == "[DONE]"
        assert events[-2]["error"]["code"] == 504
        assert all(event["choices"][0]["finish_reason"] is None for event in events[:-2])
        settled(stand)


def test_the_servers_own_deadline_holds_where_the_request_names_none() -> None:
    with standing(engine={"step_s": 0.01}, request_timeout_s=0.1) as stand:
        assert stand.post(COMPLETE, ENDLESS).status_code == 504
        assert stand.post(COMPLETE, {"prompt": "x", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("value", ["soon", "-1", "0", "1e3", "999999", "5 m", "nan"])
def test_a_timeout_header_that_is_no_duration_is_400(value: str) -> None:
    with standing() as stand:
        reply = stand.post(COMPLETE, {"prompt": "x"}, x_request_timeout=value)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "x-request-timeout"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.promise("R7")
def test_an_error_of_the_engine_is_500_with_the_request_id_and_harms_no_other(stream: bool) -> None:
    def fail(request: GenRequest) -> str | None:
        return "a NaN at /secret" if request.prompt[0] == 1 else None

    with standing(engine={"fail": fail}) as stand:
        reply = stand.post(COMPLETE, {"prompt": [1], "stream": stream}, x_request_id="who")
        assert reply.status_code == 500
        message = reply.json()["error"]["message"]
        assert "who" in message
        assert "secret" not in message
        assert stand.post(COMPLETE, {"prompt": [2]}).status_code == 200
        # One choice's failure ends the whole reply, and the other's work.
        assert stand.post(COMPLETE, {"prompt": [[2], [1]], "ignore_eos": True, "max_tokens": 500}).status_code == 500
        settled(stand)


def test_the_engines_death_ends_every_open_stream_with_an_error_event() -> None:
    with standing(engine={"dies_on": 0, "step_s": 0.005}) as stand:
        peers = [raw_post(stand.port, COMPLETE, {**ENDLESS, "stream": True}) for _ in range(3)]
        firsts = [peer.recv(1) for peer in peers]
        assert firsts == [b"H"] * 3
        assert stand.post(COMPLETE, {"prompt": [0]}).status_code == 503
        for peer in peers:
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                part = peer.recv(65536)
                assert part
                data += part
            assert b'"code":503' in data
            assert b"data: [DONE]" in data
            peer.close()
        settled(stand)


def test_an_abort_ends_open_replies_with_its_error() -> None:
    with standing(engine={"step_s": 0.005}) as stand:
        stream = raw_post(stand.port, COMPLETE, {**ENDLESS, "stream": True})
        assert stream.recv(1) == b"H"
        whole = raw_post(stand.port, COMPLETE, ENDLESS)
        stand.until(lambda: stand.bridge.live == 2)
        stand.call(lambda: stand.app.abort(Unavailable("The server was told to stop.", close=True)))
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += stream.recv(65536)
        assert b'"The server was told to stop."' in data
        assert whole.recv(65536).startswith(b"HTTP/1.1 503 ")
        stream.close()
        whole.close()
        settled(stand)


def test_a_queue_that_fills_up_half_way_through_a_request_queues_none_of_it() -> None:
    with standing(max_queue=4) as stand:
        stand.engine.running.clear()
        first = raw_post(stand.port, COMPLETE, {"prompt": "x", "n": 2})
        while stand.call(lambda: stand.bridge.live) < 2:
            pass
        reply = stand.post(COMPLETE, {"prompt": "x", "n": 3})
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert stand.call(lambda: stand.bridge.live) == 2
        first.close()
        settled(stand)
        stand.engine.running.set()


def test_a_hundred_replies_leave_nothing_behind() -> None:
    with standing(engine={"tokens_per_step": 4}) as stand:
        for turn in range(100):
            stream = bool(turn % 2)
            reply = stand.post(CHAT, {"messages": HI, "stream": stream, "stop": "wor" if turn % 3 else None})
            assert reply.status_code == 200
        settled(stand)
        assert stand.call(lambda: len(LETTERS.eos_ids)) == 1
