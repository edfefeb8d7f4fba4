"""Server-Timing: queue, prefill and decode on whole replies; on streams what is known at the head, the rest behind."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator

import pytest

from tests.fakes_api import Stand, raw_post, says, standing

HI = [{"role": "user", "content": "hi"}]
CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
WHOLE = r"queue;dur=[\d.]+, prefill;dur=[\d.]+, decode;dur=[\d.]+, total;dur=[\d.]+"
HEAD = r"queue;dur=[\d.]+, prefill;dur=[\d.]+, total;dur=[\d.]+"


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing(engine={"step_s": 0.002}) as running:
        yield running


def durations(value: str) -> dict[str, float]:
    return {name: float(number) for name, number in re.findall(r"(\w+);dur=([\d.]+)", value)}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HI}),
        (CHAT, {"messages": HI, "n": 3}),
        (CHAT, {"messages": HI, "stop": "wor"}),
        (TEXT, {"prompt": ["a", "b"], "max_tokens": 4}),
        (MESSAGES, {"messages": HI, "max_tokens": 4}),
        ("/v1/responses", {"input": "hi"}),
    ],
)
def test_a_whole_reply_says_where_its_time_went(path: str, body: dict[str, object], stand: Stand) -> None:
    reply = stand.post(path, body)
    value = reply.headers["server-timing"]
    assert re.fullmatch(WHOLE, value)
    times = durations(value)
    assert times["queue"] + times["prefill"] + times["decode"] <= times["total"] + 0.2  # they are rounded
    assert times["decode"] > 0.0


@pytest.mark.parametrize("body", [{"messages": HI}, {"messages": HI, "n": 2}, {"messages": HI, "stop": ["wor"]}])
def test_the_head_of_a_stream_has_what_is_known_by_then(body: dict[str, object], stand: Stand) -> None:
    reply = stand.post(CHAT, {**body, "stream": True})
    assert re.fullmatch(HEAD, reply.headers["server-timing"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/ping", 200), ("GET", "/nowhere", 404), ("POST", CHAT, 400), ("POST", "/tokenize", 200)],
)
def test_any_other_reply_has_its_total(method: str, path: str, status: int, stand: Stand) -> None:
    reply = stand.get(path) if method == "GET" else stand.post(path, {"prompt": "x"})
    assert reply.status_code == status
    assert re.fullmatch(r"total;dur=\d+\.\d\d", reply.headers["server-timing"])


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        (CHAT, {"messages": HI}, b"data: [DONE]"),
        (TEXT, {"prompt": "a"}, b"data: [DONE]"),
        (MESSAGES, {"messages": HI, "max_tokens": 5}, b"event: message_stop"),
        ("/v1/responses", {"input": "hi"}, b"event: response.completed"),
    ],
)
def test_a_client_that_takes_trailers_learns_the_rest_at_the_end(
    path: str, body: dict[str, object], end: bytes, stand: Stand
) -> None:
    content = json.dumps({**body, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", stand.port), 10) as peer:
        peer.sendall(
            b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTE: trailers\r\n"
            b"Connection: close, TE\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(content)) + content
        )
        data = b""
        while got := peer.recv(65536):
            data += got
    head, _, rest = data.partition(b"\r\n\r\n")
    assert b"\r\ntrailer: server-timing" in head
    assert end in rest
    found = re.search(rb"\n0\r\nserver-timing: ([^\r]+)\r\n\r\n$", rest)
    assert found
    assert list(durations(found[1].decode())) == ["queue", "prefill", "decode"]


def test_a_head_sent_before_anything_is_known_has_the_total_alone() -> None:
    with standing(says("a"), keep_alive_s=0.05) as stand:
        stand.engine.running.clear()
        peer = raw_post(stand.port, CHAT, {"messages": HI, "stream": True})
        head = peer.recv(4096)  # of the keep-alive comment
        stand.engine.running.set()
        peer.close()
    assert re.search(rb"\r\nserver-timing: total;dur=[\d.]+\r\n", head)
    assert b"queue" not in head
