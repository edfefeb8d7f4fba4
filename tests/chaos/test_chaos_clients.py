"""Overload, vanished, slow and broken clients: refused early, freed soon, and nobody else notices."""

from __future__ import annotations

import contextlib
import random
import resource
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.stack import (
    COMPLETE,
    PATIENCE_S,
    Hang,
    Stack,
    answer,
    post,
    reset,
    running,
    says,
)
from vserve.http.limits import Limits

ENDLESS: dict[str, Any] = {"prompt": [1, 2], "max_tokens": 200, "temperature": 0}
NO_BODY = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode()
"""A request whose body never comes: whoever answers it has not read the body."""


def hold(stack: Stack) -> Hang:
    """Stop the engine in a step with one request in it; the next ones wait."""
    hang = Hang()
    stack.faults.armed["launch"] = hang
    return hang


def release(stack: Stack, hang: Hang) -> None:
    stack.faults.armed.clear()
    hang.over.set()


@pytest.mark.parametrize(
    ("bounds", "waiting"),
    [({"max_queue": 3}, 3), ({"max_queued_tokens": 90}, 3)],
    ids=["requests", "prompt tokens"],
)
@pytest.mark.promise("R3", "fault: full inbox")
def test_overload_is_refused_before_the_body_is_read_and_probes_still_answer(
    bounds: dict[str, Any], waiting: int
) -> None:
    prompts = [[n] * 30 for n in range(waiting + 1)]
    with running(rows=1, **bounds) as stack:
        hang = hold(stack)
        peers = [stack.send({**ENDLESS, "prompt": prompts[0]})]
        assert hang.entered.wait(PATIENCE_S)
        peers += [stack.send({**ENDLESS, "prompt": prompt}) for prompt in prompts[1:]]
        stack.until(lambda: stack.inbox.size == waiting)
        for _ in range(20):
            peer = stack.connect()
            peer.sendall(NO_BODY)
            peer.shutdown(socket.SHUT_WR)
            reply = answer(peer)
            assert reply.status == 429
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.headers["connection"] == "close"  # the body is unread
            assert reply.error is not None
            assert reply.error["type"] == "RateLimitError"
            assert stack.get("/ping").status == stack.get("/health").status == 200
        release(stack, hang)
        assert [answer(peer).text for peer in peers] == [says(prompt, 200) for prompt in prompts]
        stack.right()


@pytest.mark.promise("R3", "fault: full inbox")
def test_a_prompt_beyond_the_bound_on_queued_tokens_is_refused_while_others_wait_and_served_when_none_does() -> None:
    long = [5] * 100
    with running(rows=1, max_queued_tokens=50) as stack:
        hang = hold(stack)
        first = stack.send(ENDLESS)
        assert hang.entered.wait(PATIENCE_S)
        second = stack.send(ENDLESS)
        stack.until(lambda: stack.inbox.size == 1)
        reply = stack.ask({**ENDLESS, "prompt": long, "max_tokens": 5})
        assert reply.status == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert "50" in (reply.error or {})["message"]
        release(stack, hang)
        assert answer(first).text == answer(second).text == says([1, 2], 200)
        stack.settled()
        assert stack.ask({**ENDLESS, "prompt": long, "max_tokens": 5}).text == says(long, 5)


@pytest.mark.promise("R3")
def test_ping_is_answered_at_once_and_whoever_is_let_in_gets_his_text_under_many_times_the_load() -> None:
    with running(rows=2, max_queue=4) as stack, ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(stack.ask, {**ENDLESS, "max_tokens": 50}) for _ in range(200)]
        slowest_s = 0.0
        while not all(future.done() for future in futures):
            begun_s = time.perf_counter()
            assert stack.get("/ping").status == 200
            slowest_s = max(slowest_s, time.perf_counter() - begun_s)
        statuses = [future.result().status for future in futures]
        assert set(statuses) <= {200, 429}
        assert 200 in statuses
        assert 429 in statuses
        assert all(future.result().text == says([1, 2], 50) for future in futures if future.result().status == 200)
        assert slowest_s < 2.0  # loose: the machine that runs the tests may be busy
        stack.settled()
        stack.right()


def vanish(stack: Stack, rng: random.Random) -> None:
    """Send some or all of a request, read some or none of its answer, and go by FIN or RST."""
    body = {
        "prompt": [rng.randrange(48) for _ in range(rng.randint(1, 60))],
        "max_tokens": rng.randint(1, 100),
        "n": rng.choice((1, 1, 1, 4)),
        "stream": rng.random() < 0.5,
        "temperature": rng.choice((0, 1)),
        **({"timeout_ms": rng.randint(1, 50)} if rng.random() < 0.1 else {}),
    }
    message = post(body)
    whole = rng.random() < 0.8
    peer = stack.connect()
    peer.sendall(message if whole else message[: rng.randrange(len(message))])
    if whole and rng.random() < 0.6:
        with contextlib.suppress(ConnectionResetError):
            peer.recv(rng.randint(1, 3000))
    if rng.random() < 0.5:
        reset(peer)
    else:
        peer.close()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.promise("R1", "R2", "fault: disconnect anywhere")
def test_clients_that_vanish_at_any_byte_free_all_they_held_and_every_other_gets_its_answer(depth: int) -> None:
    with running(num_blocks=64, rows=6, depth=depth, max_queue=50) as stack, ThreadPoolExecutor(8) as pool:

        def one(seed: int) -> None:
            rng = random.Random(seed)
            if seed % 10:
                vanish(stack, rng)
                return
            prompt = [seed % 48, 9]
            reply = stack.ask({"prompt": prompt, "max_tokens": 20, "temperature": 0, "stream": seed % 20 == 0})
            assert reply.status == 429 or reply.text == says(prompt, 20)

        list(pool.map(one, range(depth * 10_000, depth * 10_000 + 400)))
        stack.settled()
        assert stack.bridge.stats.aborted_total > 0
        stack.right()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by", ["FIN", "RST"])
@pytest.mark.promise("R2")
def test_a_client_that_vanishes_while_queued_is_freed_before_its_turn(stream: bool, by: str) -> None:
    with running(rows=1, max_queue=8) as stack:
        hang = hold(stack)
        first = stack.send(ENDLESS)
        assert hang.entered.wait(PATIENCE_S)
        queued = [stack.send({**ENDLESS, "stream": stream}) for _ in range(5)]
        stack.until(lambda: stack.bridge.live == 6)
        for peer in queued:
            if by == "RST":
                reset(peer)
            else:
                peer.close()
        stack.until(lambda: stack.bridge.live == 1)
        release(stack, hang)
        assert answer(first).text == says([1, 2], 200)
        stack.settled()
        stack.until(lambda: stack.bridge.stats.aborted_total == 5)
        assert stack.bridge.stats.generated_tokens_total == 200
        stack.right()


SMALL = Limits(write_high_bytes=4096, write_low_bytes=1024, write_stall_s=0.2, header_s=0.2, body_idle_s=0.2)


@pytest.mark.promise("R9")
def test_a_reader_that_stops_is_dropped_and_costs_the_others_nothing() -> None:
    wide = {**ENDLESS, "n": 16, "stream": True, "logprobs": 5}
    with running(limits=SMALL, send_buffer=4096, num_blocks=1024, rows=40) as stack:
        slow = [stack.send(wide, receive_buffer=4096) for _ in range(2)]
        stack.until(lambda: stack.bridge.live > 0)
        assert stack.ask(ENDLESS).text == says([1, 2], 200)
        stack.until(lambda: stack.server.connections == 0)  # it is the server that ends them
        for peer in slow:
            peer.close()
        stack.settled()
        stack.right()


@pytest.mark.promise("R9", "fault: slow readers")
def test_a_slow_reader_gets_every_token_once() -> None:
    limits = replace(SMALL, write_stall_s=60.0)
    with running(limits=limits, send_buffer=4096, num_blocks=1024, rows=16) as stack:
        peer = stack.send({**ENDLESS, "n": 8, "stream": True}, receive_buffer=4096)
        stack.until(lambda: stack.bridge.stats.finished_total == 8)  # all is computed before a byte is read
        events = answer(peer).events
        said = [""] * 8
        for event in events:
            said[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert said == [says([1, 2], 200)] * 8


@pytest.mark.promise("R9", "fault: half-open sockets")
def test_half_open_connections_are_ended_by_their_timeouts_and_hold_nothing() -> None:
    message = post(ENDLESS)
    with running(limits=replace(SMALL, keep_alive_s=0.2)) as stack:
        cuts = [0, 1, 10, message.index(b"\r\n\r\n"), message.index(b"\r\n\r\n") + 4, len(message) - 1]
        peers = [stack.connect() for _ in range(10) for _ in cuts]
        for peer, cut in zip(peers, cuts * 10, strict=True):
            peer.sendall(message[:cut])
        stack.right()
        for peer, cut in zip(peers, cuts * 10, strict=True):
            if cut:
                reply = answer(peer)
                assert reply.status == 408, cut
            else:
                assert peer.recv(10) == b""  # it said nothing and is told nothing
                peer.close()
        stack.settled()
        stack.right()


@pytest.mark.promise("R9", "fault: idle connections")
def test_2000_idle_connections_leave_room_for_probes_and_work() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # both ends are in this process
    try:
        with running() as stack:
            peers = []
            for count in range(1, 2001):
                peers.append(stack.connect())
                if count % 50 == 0:  # no more at once than the listen queue takes
                    stack.until(lambda count=count: stack.server.connections == count)  # type: ignore[misc]
            stack.right()
            assert stack.get("/ping").status == 200
            for peer in peers:
                peer.close()
            stack.settled()
            stack.right()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.promise("R9", "fault: slow writers")
def test_headers_that_drip_are_ended_with_408_although_bytes_keep_coming() -> None:
    message = b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Drip: " + b"a" * 60_000
    with running(limits=replace(SMALL, header_s=0.5)) as stack:
        peers = [stack.connect() for _ in range(20)]
        ended: set[socket.socket] = set()
        for place in range(len(message)):
            for peer in peers:
                if peer not in ended and select.select([peer], [], [], 0)[0]:
                    ended.add(peer)
                    assert peer.recv(12) == b"HTTP/1.1 408"
                elif peer not in ended:
                    peer.sendall(message[place : place + 1])
            if len(ended) == len(peers):
                break
            if place % 50 == 0:
                assert stack.get("/ping").status == 200  # nobody else waits for them
        assert len(ended) == len(peers)
        for peer in peers:
            peer.close()
        stack.settled()
        stack.right()


@pytest.mark.promise("R9", "fault: slow readers")
def test_readers_of_one_byte_at_a_time_hold_up_nobody_and_get_every_byte() -> None:
    limits = replace(SMALL, write_stall_s=60.0)
    body = {**ENDLESS, "n": 4, "stream": True, "max_tokens": 60}
    with running(limits=limits, send_buffer=4096, num_blocks=1024, rows=40) as stack:
        slow = [stack.send(body, receive_buffer=4096) for _ in range(4)]
        got = [b""] * len(slow)
        for number in range(200):  # one byte of each between two answers to others
            got = [data + peer.recv(1) for data, peer in zip(got, slow, strict=True)]
            if number % 20 == 0:
                assert stack.ask({**ENDLESS, "max_tokens": 10}).text == says([1, 2], 10)
        stack.until(lambda: stack.bridge.live == 0)  # all is computed; nothing waits for the readers
        for data, peer in zip(got, slow, strict=True):
            reply = answer(peer, data)
            said = [""] * 4
            for event in reply.events:
                said[event["choices"][0]["index"]] += event["choices"][0]["text"]
            assert said == [says([1, 2], 60)] * 4
            assert reply.done
        stack.settled()
        stack.right()


@pytest.mark.parametrize("by", ["FIN", "RST"])
@pytest.mark.promise("R2", "fault: RST between chunks")
def test_a_client_that_goes_between_two_chunks_frees_all_it_held(by: str) -> None:
    with running(rows=4) as stack:
        for chunks in range(1, 12):
            peer = stack.send({**ENDLESS, "stream": True})
            data = b""
            while data.count(b"\n\n\r\n") < chunks:  # up to the end of a chunk and not a byte more
                data += peer.recv(1)
            if by == "RST":
                reset(peer)
            else:
                peer.close()
            stack.settled()
        stack.until(lambda: stack.bridge.stats.aborted_total > 0)
        stack.right()


@pytest.mark.promise("R3")
def test_beyond_the_limit_of_connections_probes_are_answered_and_others_are_told() -> None:
    with running(limits=Limits(connections=5)) as stack:
        peers = [stack.connect() for _ in range(5)]
        stack.until(lambda: stack.server.connections == 5)
        assert stack.get("/health").status == stack.get("/ping").status == 200
        reply = stack.ask(ENDLESS)
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
        for peer in peers:
            peer.close()
        stack.until(lambda: stack.server.connections == 0)
        stack.right()
