"""Faults in the engine: whatever breaks, every accepted request ends once and aloud, and health tells the truth."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.chaos.stack import LETTERS, PATIENCE_S, PLACES, QUESTION, Answer, Hang, Stack, answer, boom, running, says
from tests.fakes import FakeModel
from vserve.errors import EngineStalled
from vserve.observe.watchdog import Watchdog
from vserve.text.tokenizer import Tokenizer

ENDLESS: dict[str, Any] = {"prompt": [1, 2], "max_tokens": 200, "temperature": 0}


def open_requests(stack: Stack, hang: Hang) -> list[socket.socket]:
    """Streams that have begun, streams and whole answers that have not, and more than there are rows for."""
    begun = [stack.send({**ENDLESS, "stream": True, "prompt": [n, 7]}) for n in range(3)]
    assert [peer.recv(1, socket.MSG_PEEK) for peer in begun] == [b"H"] * 3
    stack.faults.armed["launch"] = hang
    assert hang.entered.wait(PATIENCE_S)
    others = [stack.send({**ENDLESS, "stream": n % 2 == 0, "n": 2}) for n in range(6)]
    stack.until(lambda: stack.bridge.live == 3 + 6 * 2)
    return begun + others


def all_failed(peers: list[socket.socket]) -> list[Answer]:
    """Each client sees its end: an error event and [DONE] on an open stream, else a 503."""
    replies = []
    for peer in peers:
        reply = answer(peer)
        assert reply.error is not None, reply
        assert reply.error["code"] == 503
        assert reply.status == 503 or reply.done
        replies.append(reply)
    return replies


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.promise("R1", "R5", "fault: exception in the step loop")
def test_a_dead_engine_answers_every_open_request_and_health_says_503(
    place: str, depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    hang = Hang()
    with running(depth=depth) as stack:
        peers = open_requests(stack, hang)
        stack.faults.armed[place] = boom
        hang.over.set()
        all_failed(peers)
        stack.thread.join(PATIENCE_S)
        assert len(stack.deaths) == 1
        assert stack.get("/health").status == 503
        assert stack.get("/livez").status == 503
        assert stack.get("/ping").status == 200
        late = stack.ask(ENDLESS)
        assert (late.status, late.headers["connection"]) == (503, "close")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.promise("R1", "fault: exception in the step loop")
def test_an_engine_that_breaks_on_its_first_request_answers_it(
    place: str, depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    with running(depth=depth) as stack:
        stack.faults.armed[place] = boom
        all_failed([stack.send({**ENDLESS, "stream": True})])
        stack.until_status("/health", 503)
        assert len(stack.deaths) == 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.promise("R5", "fault: hang in the step loop")
def test_a_hang_turns_health_503_dumps_stacks_and_passes_when_it_is_over(
    place: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hang = Hang()
    wanted = says([1, 2], 200)
    with running(stall_timeout_s=0.3) as stack, (tmp_path / "stderr").open("w+") as out:
        dog = Watchdog(stack.heartbeat, 0.3, out)
        stack.call(dog.start)
        peer = stack.send({**ENDLESS, "stream": True})
        assert peer.recv(1, socket.MSG_PEEK) == b"H"
        stack.faults.armed[place] = hang
        assert hang.entered.wait(PATIENCE_S)
        stack.until_status("/health", 503)
        stack.until_status("/livez", 503)
        assert stack.get("/ping").status == 200
        stack.until(lambda: "hangs" in caplog.text)
        stack.faults.armed.clear()
        hang.over.set()
        assert answer(peer).text == wanted  # not one token is lost or said twice
        stack.until_status("/health", 200)
        stack.until(lambda: "goes on" in caplog.text)
        stack.call(dog.stop)
        out.seek(0)
        assert "in __call__" in out.read()  # the very line that hangs
        stack.right()


@pytest.mark.parametrize("place", ["launch", "wait"])
@pytest.mark.promise("R5", "fault: hang in the step loop")
def test_with_exit_on_stall_every_open_request_is_answered_while_the_engine_still_hangs(place: str) -> None:
    hang, stuck = Hang(), Hang()
    with running(stall_timeout_s=0.3) as stack:

        def end(reason: str) -> None:  # what serve.py does with it
            stack.bridge.died(EngineStalled(reason))

        dog = Watchdog(stack.heartbeat, 0.3, sys.__stderr__ or sys.stderr, on_stall=end)
        peers = open_requests(stack, hang)
        stack.faults.armed.clear()
        stack.faults.armed[place] = stuck
        hang.over.set()
        assert stuck.entered.wait(PATIENCE_S)
        stack.call(dog.start)
        all_failed(peers)
        assert stack.get("/health").status == 503
        assert stack.ask(ENDLESS).status == 503
        stack.call(dog.stop)
        stack.faults.armed.clear()
        stack.engine.stop()
        stuck.over.set()
        stack.thread.join(PATIENCE_S)


@pytest.mark.promise("R5")
def test_an_idle_engine_and_a_long_prefill_raise_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    with running(stall_timeout_s=1.0) as stack:
        sights: list[object] = []
        dog = Watchdog(stack.heartbeat, 1.0, sys.__stderr__ or sys.stderr, on_stall=sights.append)
        stack.call(dog.start)
        beats: list[int] = []
        while len(beats) < 2:  # idle beats, one a second
            assert stack.get("/health").status == 200
            beat = id(stack.heartbeat._last)
            if beat not in beats:
                beats.append(beat)
        prompts = [[n % 48] * 240 for n in range(20)]
        with ThreadPoolExecutor(20) as pool:
            replies = list(pool.map(lambda prompt: stack.ask({**ENDLESS, "prompt": prompt, "max_tokens": 2}), prompts))
        assert [reply.text for reply in replies] == [says(prompt, 2) for prompt in prompts]
        stack.call(dog.stop)
        assert sights == []


@pytest.mark.promise("R7", "fault: invalid numbers")
def test_invalid_numbers_in_one_row_end_that_request_only() -> None:
    # An id that neither these prompts nor their answers hold.
    poison = next(n for n, letter in enumerate(LETTERS) if n > 5 and letter not in says(QUESTION, 12))
    others = [[n, n + 1, 5] for n in range(40) if poison not in (n, n + 1)]
    prompts = [prompt for prompt in others if LETTERS[poison] not in says(prompt, 16)][:7]
    assert len(prompts) == 7
    with running(model=FakeModel(poison=poison)) as stack, ThreadPoolExecutor(9) as pool:
        bad = [pool.submit(stack.ask, {**ENDLESS, "prompt": [poison, n], "stream": bool(n)}) for n in range(2)]
        good = [
            pool.submit(stack.ask, {"prompt": prompt, "max_tokens": 16, "temperature": 0, "stream": bool(n % 2)})
            for n, prompt in enumerate(prompts)
        ]
        assert [future.result().status for future in bad] == [500, 500]
        assert [future.result().text for future in good] == [says(prompt, 16) for prompt in prompts]
        stack.right()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.promise("R4")
def test_a_deadline_is_kept_while_a_step_takes_for_ever_and_the_others_text_is_unharmed(stream: bool) -> None:
    hang = Hang()
    with running() as stack:
        stack.faults.armed["launch"] = hang
        neighbour = stack.send(ENDLESS)
        assert hang.entered.wait(PATIENCE_S)
        late = stack.ask({**ENDLESS, "timeout_ms": 50, "stream": stream})  # answered although no step ends
        assert late.status == 504
        stack.faults.armed.clear()
        hang.over.set()
        assert answer(neighbour).text == says([1, 2], 200)
        stack.right()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.promise("R1", "fault: four pages")
def test_with_four_pages_every_request_still_gets_its_own_text_or_an_error(depth: int) -> None:
    # 16 places in all: sequences push each other out again and again.
    cases = [([n % 48, 3], 4 + n % 9) for n in range(40)]
    with running(num_blocks=4, rows=4, depth=depth) as stack, ThreadPoolExecutor(10) as pool:
        replies = list(
            pool.map(
                lambda case: stack.ask({"prompt": case[0], "max_tokens": case[1], "temperature": 0, "stream": True}),
                cases,
            )
        )
        assert [reply.text for reply in replies] == [says(*case) for case in cases]
        assert stack.ask({"prompt": [1] * 12, "max_tokens": 20}).status == 500  # it could never run
        stack.right()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.promise("R7")
def test_concurrent_greedy_requests_equal_their_solo_runs_while_others_cancel(depth: int) -> None:
    with running(num_blocks=48, rows=6, depth=depth) as stack, ThreadPoolExecutor(8) as pool:

        def one(n: int) -> None:
            prompt = [n % 48, n % 7, 3]
            if n % 3 == 0:
                with stack.send({**ENDLESS, "prompt": prompt, "stream": True}) as peer:
                    peer.recv(200)
                return
            tokens = 5 + n % 20
            reply = stack.ask({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": n % 2 == 0})
            assert reply.text == says(prompt, tokens)

        list(pool.map(one, range(150)))
        stack.settled()
        stack.right()


@pytest.mark.promise("R4", "R5", "fault: slow step")
def test_steps_a_hundred_times_as_long_keep_deadlines_and_raise_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    pause = threading.Event()  # never set: waiting for it takes the whole time
    with running(stall_timeout_s=5.0) as stack:
        dog = Watchdog(stack.heartbeat, 5.0, sys.__stderr__ or sys.stderr)
        stack.call(dog.start)
        stack.faults.armed["launch"] = lambda: pause.wait(0.03) and None
        peer = stack.send({**ENDLESS, "max_tokens": 20, "stream": True})
        late = stack.ask({**ENDLESS, "timeout_ms": 200})
        assert late.status == 504
        assert stack.get("/health").status == 200
        assert answer(peer).text == says([1, 2], 20)
        stack.faults.armed.clear()
        stack.call(dog.stop)
        assert "hangs" not in caplog.text
        stack.right()


@pytest.mark.parametrize("jump_s", [-1e9, 1e9])
@pytest.mark.promise("fault: wall clock")
def test_a_wall_clock_that_is_set_ends_and_delays_nothing(jump_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    hang = Hang()
    with running(stall_timeout_s=60.0) as stack:
        stack.faults.armed["launch"] = hang
        peers = [stack.send({**ENDLESS, "stream": stream, "timeout_ms": 20_000}) for stream in (True, False)]
        assert hang.entered.wait(PATIENCE_S)
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        stack.faults.armed.clear()
        hang.over.set()
        assert [answer(peer).text for peer in peers] == [says([1, 2], 200)] * 2
        assert stack.ask({**ENDLESS, "timeout_ms": 20_000, "max_tokens": 5}).text == says([1, 2], 5)
        stack.right()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.promise("R7", "fault: tokenizer raises")
def test_a_tokenizer_that_raises_fails_that_request_and_no_other(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    with running() as stack:
        neighbour = stack.send({**ENDLESS, "stream": True})
        assert neighbour.recv(1, socket.MSG_PEEK) == b"H"
        with monkeypatch.context() as patch:
            for name in ("encode", "encode_batch"):
                patch.setattr(Tokenizer, name, lambda *words, **named: boom())
            reply = stack.ask({"prompt": "abc", "max_tokens": 5, "stream": stream})
        assert reply.status == 500
        assert reply.error is not None
        assert "injected" not in reply.error["message"]  # the id of the request is all that is told
        assert answer(neighbour).text == says([1, 2], 200)
        stack.right()


@pytest.mark.promise("R1", "R5", "fault: GPU out of memory", "fault: GPU lost")
@pytest.mark.parametrize("place", ["launch", "wait"])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: unspecified launch failure")],
    ids=["out of memory", "lost"],
)
def test_an_error_of_the_device_in_a_step_answers_everyone_and_tells_no_client_of_it(
    place: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)

    def fail() -> None:
        raise error

    hang = Hang()
    with running(depth=2) as stack:
        peers = open_requests(stack, hang)
        stack.faults.armed[place] = fail
        hang.over.set()
        for reply in all_failed(peers):
            assert b"CUDA" not in reply.body
        stack.until_status("/health", 503)
        assert len(stack.deaths) == 1
