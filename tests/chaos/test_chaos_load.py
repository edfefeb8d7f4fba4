"""Overload, deadlines and scarce descriptors: what is let in is finished, the rest is told so, and it all passes."""

from __future__ import annotations

import json
import math
import os
import resource
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.chaos.stack import COMPLETE, PATIENCE_S, Answer, Hang, Stack, answer, descriptors, running, says
from tests.fakes import ManualClock
from vserve.api.load import RETRY_LIMIT_S, Usage
from vserve.engine.request import EngineStats

BODY: dict[str, Any] = {"prompt": [1, 2], "max_tokens": 40, "temperature": 0}


def ask(stack: Stack, body: dict[str, Any], fields: str = "") -> socket.socket:
    payload = json.dumps(body).encode()
    peer = stack.connect()
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{fields}Content-Length: {len(payload)}\r\n\r\n"
    peer.sendall(head.encode() + payload)
    return peer


def test_under_ten_times_the_load_every_token_drawn_belongs_to_an_answer_and_the_rest_is_told_when_to_come_back() -> (
    None
):
    with running(rows=2, max_queue=2) as stack, ThreadPoolExecutor(40) as pool:
        replies: list[Answer] = list(pool.map(lambda _: stack.ask(BODY), range(400)))
        served = [reply for reply in replies if reply.status == 200]
        refused = [reply for reply in replies if reply.status == 429]
        assert len(served) + len(refused) == 400
        assert served
        assert refused
        assert all(reply.text == says([1, 2], 40) for reply in served)
        assert all(1 <= int(reply.headers["retry-after"]) <= RETRY_LIMIT_S for reply in refused)
        stack.settled()
        stats = stack.scheduler.stats()
        # Nothing was computed for those who were refused, nothing twice, nothing in vain.
        assert stats.generated_tokens_total == 40 * len(served)
        assert (stats.finished_total, stats.aborted_total, stats.preemptions_total) == (len(served), 0, 0)
        stack.right()


def test_retry_after_is_the_time_in_which_so_many_finished_lately() -> None:
    clock = ManualClock()
    usage = Usage(clock)
    for finished in range(1, 41):  # four a second
        clock.now_s += 0.25
        usage.observe(EngineStats(finished_total=finished))
    assert usage.seconds_to_finish(1) == 1
    assert usage.seconds_to_finish(100) == math.ceil(100 / 4)
    assert usage.seconds_to_finish(10_000) == RETRY_LIMIT_S
    for finished in range(41, 81):  # and then two
        clock.now_s += 0.5
        usage.observe(EngineStats(finished_total=finished))
    assert usage.seconds_to_finish(100) == 50


class Nth(Hang):
    """Holds the engine at its nth launch."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self._left = nth

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            super().__call__()


@pytest.mark.parametrize(
    ("how", "where", "stream"),
    [
        *(("timeout_ms", where, stream) for where in ("queue", "prefill", "decode") for stream in (False, True)),
        ("X-Request-Timeout", "queue", False),
        ("X-Request-Timeout", "decode", True),
        ("--request-timeout", "queue", True),
    ],
)
def test_a_deadline_that_passes_anywhere_is_a_504_and_frees_everything(where: str, stream: bool, how: str) -> None:
    body = {"prompt": [7] * 100, "max_tokens": 40, "temperature": 0, "stream": stream}
    fields = "X-Request-Timeout: 1s\r\n" if how == "X-Request-Timeout" else ""
    if how == "timeout_ms":
        body["timeout_ms"] = 1000
    operator = {"request_timeout_s": 1.0} if how == "--request-timeout" else {}
    with running(rows=1 if where == "queue" else 4, **operator) as stack:
        # 100 tokens are two steps of 64; the third is the first that only decodes.
        hang = Nth({"queue": 1, "prefill": 2, "decode": 5}[where])
        stack.faults.armed["launch"] = hang
        first = None
        if where == "queue":
            first = ask(stack, {**BODY, "timeout_ms": 60_000})
            assert hang.entered.wait(PATIENCE_S)
        late = ask(stack, body, fields)
        assert hang.entered.wait(PATIENCE_S)
        reply = answer(late)
        assert reply.error is not None
        assert (reply.error["code"], reply.error["type"]) == (504, "TimeoutError")
        assert reply.status == (200 if stream and where == "decode" else 504)
        assert reply.done == (stream and where == "decode")
        stack.faults.armed.clear()
        hang.over.set()
        if first is not None:
            told = answer(first)
            assert told.status == 504 if operator else told.text == says([1, 2], 40)
        stack.settled()


def test_without_descriptors_newcomers_are_dropped_not_left_waiting_and_all_is_well_when_there_are_some() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running() as stack:
        served = stack.connect()
        served.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert served.recv(1000).startswith(b"HTTP/1.1 200")
        peers = [socket.socket() for _ in range(40)]
        spare = os.open("/dev/null", os.O_RDONLY)
        os.close(spare)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare, descriptors()) + 4, hard))
            for peer in peers:
                peer.settimeout(PATIENCE_S)
                peer.connect(("127.0.0.1", stack.port))
            dropped = 0
            for peer in peers:
                try:
                    peer.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    dropped += not peer.recv(1000)
                except ConnectionError:
                    dropped += 1
            # Whoever could not be accepted has been hung up on: no one waits in the listener, so it does not spin.
            assert dropped > 20
            served.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            assert served.recv(1000).startswith(b"HTTP/1.1 200")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for peer in (served, *peers):
                peer.close()
        stack.right()
