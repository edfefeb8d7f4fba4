"""A stream's own rules, with the client's pace and the clock in our hands: what is written, when, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.fakes_api import EOS_ID, LETTERS, options, parse_events
from vserve.api.app import App
from vserve.api.choice import Choice, Reading
from vserve.api.completions import CompletionDialect
from vserve.api.reply import CountsNow
from vserve.api.requests import parse_completion
from vserve.api.shapes import Head, Piece, TokenText
from vserve.api.stream import StreamReply
from vserve.bridge import Bridge
from vserve.engine.inbox import Inbox
from vserve.engine.request import Cancel, Emit, FinishReason, GenRequest, TokenLogprobs
from vserve.errors import InternalError, Unavailable
from vserve.http.events import Headers, RequestHead
from vserve.http.exchange import Exchange, Fields, Response


class Wire:
    """A Channel that keeps what is written; writable is set by hand."""

    peer = "test"

    def __init__(self) -> None:
        self.writable = True
        self.status = 0
        self.writes: list[bytes] = []
        self.ended = False

    def reply(self, exchange: Exchange, response: Response) -> None:
        raise AssertionError("a stream answered whole")

    def start_stream(self, exchange: Exchange, status: int, content_type: str, headers: Fields) -> None:
        assert not self.status
        self.status = status

    def write(self, exchange: Exchange, data: bytes) -> None:
        assert self.status
        assert not self.ended
        self.writes.append(data)

    def end(self, exchange: Exchange, trailers: Fields = ()) -> None:
        self.ended = True
        exchange.detach()

    def abort(self, exchange: Exchange) -> None:
        raise AssertionError("aborted")


class Stage:
    """A StreamReply of some choices on a Wire."""

    def __init__(self, n: int = 1, wording: type[CompletionDialect] = CompletionDialect, **fields: Any) -> None:
        head = RequestHead("POST", "/", "/", "", (1, 1), Headers(), None, False, True, False)
        self.wire = Wire()
        self.exchange = Exchange(self.wire, head, "id", 0.0)
        self.app = App(options())
        self.inbox = Inbox(100)
        self.bridge = Bridge(asyncio.get_running_loop(), self.inbox)
        wanted = parse_completion({"prompt": "x", "stream": True, "n": n, **fields}, 300).wanted
        reading = Reading(
            LETTERS,
            True,
            True,
            wanted.stop,
            False,
            0,
            frozenset({EOS_ID}),
            False,
            wanted.logprobs is not None,
            False,
            False,
        )
        prompt = [1]
        self.choices = [
            Choice(i, i == 0, prompt, GenRequest(self.bridge.next_id(), prompt, 50), reading, "") for i in range(n)
        ]
        dialect = wording(Head("cmpl-1", 1, "m", "fp"), wanted, TokenText(LETTERS, False))
        self.reply = StreamReply(self.app, self.bridge, self.exchange, dialect, self.choices, ())
        self.task = asyncio.create_task(self.reply.run())

    def push(self, index: int, text: str, finish: FinishReason | None = None) -> None:
        choice = self.choices[index]
        assert choice.request is not None
        choice.push(Emit(choice.request.id, tuple(LETTERS.encode(text)), finish))

    def take(self) -> list[Any]:
        """The events written since the last take, one list item each."""
        events = parse_events(b"".join(self.wire.writes).decode())
        self.wire.writes.clear()
        return events

    def texts(self) -> list[tuple[int, str, str | None]]:
        found = []
        for event in self.take():
            if event != "[DONE]":
                (choice,) = event["choices"]
                found.append((choice["index"], choice["text"], choice["finish_reason"]))
        return found

    def cancelled(self) -> list[Cancel]:
        return [item for item in self.inbox.drain() if isinstance(item, Cancel)]


def play(scene: Callable[[], Any]) -> None:
    """Run a scene on a loop."""

    async def run() -> None:
        await scene()

    asyncio.run(run())


def test_each_push_is_one_event_while_the_client_keeps_up() -> None:
    async def scene() -> None:
        stage = Stage()
        await asyncio.sleep(0)
        assert stage.wire.status == 0
        stage.push(0, "a")
        stage.push(0, "bc")
        stage.push(0, '"\n')
        assert stage.texts() == [(0, "a", None), (0, "bc", None), (0, '"\n', None)]
        stage.push(0, "d", FinishReason.LENGTH)
        assert stage.take()[-1] == "[DONE]"
        assert stage.wire.ended
        assert await stage.task is None
        assert stage.app.replies == set()
        assert len(stage.app.keep_alive) == 0

    play(scene)


def test_while_the_client_is_slow_nothing_is_written_and_then_one_event_a_choice() -> None:
    async def scene() -> None:
        stage = Stage(n=3)
        await asyncio.sleep(0)
        stage.push(0, "a")
        stage.push(2, "z")
        assert stage.texts() == [(0, "a", None), (2, "z", None)]
        stage.wire.writable = False
        for letter in "bcd":
            stage.push(1, letter)
            stage.push(0, letter)
        stage.push(2, "y", FinishReason.LENGTH)
        stage.push(0, "e", FinishReason.LENGTH)
        assert stage.wire.writes == []
        stage.wire.writable = True
        assert stage.exchange.on_writable is not None
        stage.exchange.on_writable()
        assert stage.texts() == [(1, "bcd", None), (0, "bcde", "length"), (2, "y", "length")]
        stage.push(1, "e")
        assert stage.texts() == [(1, "e", None)]
        stage.wire.writable = False
        stage.push(1, "f", FinishReason.LENGTH)
        assert not stage.wire.ended
        stage.wire.writable = True
        stage.exchange.on_writable()
        events = stage.take()
        assert events[0]["choices"][0]["text"] == "f"
        assert events[-1] == "[DONE]"
        await stage.task

    play(scene)


def test_catching_up_stops_when_the_client_is_full_again_and_keeps_the_order_of_text() -> None:
    async def scene() -> None:
        stage = Stage(n=2)
        await asyncio.sleep(0)
        stage.push(0, "a")
        stage.wire.writable = False
        stage.push(0, "b")
        stage.push(1, "c")
        take_one(stage.wire)
        stage.wire.writes.clear()
        assert stage.exchange.on_writable is not None
        stage.exchange.on_writable()
        assert stage.texts() == [(0, "b", None)]
        stage.wire.writable = True
        stage.push(1, "d")  # the wire is free again before anyone said so: what is held goes first
        assert stage.texts() == [(1, "cd", None)]
        stage.task.cancel()
        await asyncio.wait([stage.task])
        assert len(stage.cancelled()) == 2

    play(scene)


def take_one(wire: Wire) -> None:
    """Make the wire take one write and be full again."""
    wire.writable = True
    write = wire.write

    def once(exchange: Exchange, data: bytes) -> None:
        write(exchange, data)
        wire.writable = False
        del wire.__dict__["write"]

    wire.__dict__["write"] = once


def test_headers_wait_for_the_first_event_so_that_an_early_failure_has_its_status() -> None:
    async def scene() -> None:
        stage = Stage()
        await asyncio.sleep(0)
        stage.reply.fail(Unavailable("gone"))
        with pytest.raises(Unavailable, match="gone"):
            await stage.task
        assert stage.wire.status == 0
        assert len(stage.cancelled()) == 1

    play(scene)


def test_a_failure_in_the_middle_is_an_error_event_once_and_nothing_follows() -> None:
    async def scene() -> None:
        stage = Stage(n=2)
        await asyncio.sleep(0)
        stage.push(0, "a")
        stage.push(1, "b", FinishReason.LENGTH)
        stage.take()
        stage.reply.fail(InternalError("oops"))
        stage.reply.fail(InternalError("again"))
        stage.push(0, "c")
        error, done = stage.take()
        assert error["error"]["message"] == "oops (request id id)"
        assert (error["error"]["code"], done) == (500, "[DONE]")
        assert stage.wire.ended
        assert await stage.task is None
        assert [cancel.id for cancel in stage.cancelled()] == [1]

    play(scene)


def test_a_client_that_is_gone_ends_the_run_and_cancels_what_is_unfinished() -> None:
    async def scene() -> None:
        stage = Stage(n=3)
        await asyncio.sleep(0)
        stage.push(1, "b", FinishReason.LENGTH)
        on_gone = stage.exchange.on_gone
        assert on_gone is not None
        stage.exchange.detach(gone=True)
        on_gone()
        assert await stage.task is None
        assert [cancel.id for cancel in stage.cancelled()] == [1, 3]
        stage.push(0, "x")
        assert stage.app.replies == set()

    play(scene)


def test_a_comment_is_written_only_after_a_whole_silent_tick_and_never_into_a_full_buffer() -> None:
    async def scene() -> None:
        stage = Stage()
        await asyncio.sleep(0)
        stage.reply.tick()
        assert stage.wire.writes == []
        stage.wire.writable = False
        stage.reply.tick()
        assert stage.wire.writes == []
        stage.wire.writable = True
        stage.reply.tick()
        assert stage.wire.writes == [b":\n\n"]
        stage.push(0, "a")
        stage.wire.writes.clear()
        stage.reply.tick()
        assert stage.wire.writes == []
        stage.reply.tick()
        assert stage.wire.writes == [b":\n\n"]
        stage.push(0, "b", FinishReason.LENGTH)
        await stage.task

    play(scene)


def test_log_probabilities_of_held_back_text_still_go_out_with_their_tokens() -> None:
    async def scene() -> None:
        stage = Stage(stop="zz", logprobs=0)
        await asyncio.sleep(0)

        def emit(text: str, finish: FinishReason | None = None) -> None:
            request = stage.choices[0].request
            assert request is not None
            ids: Sequence[int] = LETTERS.encode(text)
            stage.choices[0].push(
                Emit(request.id, tuple(ids), finish, logprobs=tuple(TokenLogprobs(-1.0, 1) for _ in ids))
            )

        emit("z")
        emit("a")
        emit("", FinishReason.LENGTH)
        seen = [
            (event["choices"][0]["text"], (event["choices"][0]["logprobs"] or {}).get("tokens"))
            for event in stage.take()[:-1]
        ]
        assert seen == [("", ["z"]), ("za", ["a"]), ("", None)]
        await stage.task

    play(scene)


def test_a_reply_that_fails_as_its_client_catches_up_ends_with_an_error_and_stops_its_work() -> None:
    class Broken(CompletionDialect):
        def chunk(self, choice: Choice, piece: Piece, counts: CountsNow) -> bytes:
            raise RuntimeError("a chunk broke")

    async def scene() -> None:
        stage = Stage(wording=Broken)
        await asyncio.sleep(0)
        stage.wire.writable = False
        stage.push(0, "a")
        stage.wire.writable = True
        assert stage.exchange.on_writable is not None
        stage.exchange.on_writable()
        events = stage.take()
        assert events[-2]["error"]["code"] == 500
        assert events[-1] == "[DONE]"
        assert len(stage.cancelled()) == 1
        assert stage.wire.ended
        await stage.task
        assert stage.app.replies == set()

    play(scene)
