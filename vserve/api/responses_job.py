"""A response under way: tokens in, steps out to whoever follows, the finished document into the store.

Goes on without a connection.  Owns the states of one response and how it ends, exactly once; what it looks like is
responses_events.py's.  Event-loop thread only; no coroutine wakes for a token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import orjson

from vserve.api.app import App
from vserve.api.choice import Choice
from vserve.api.responses_events import Document, Logprobs, Output, Step, pack, started
from vserve.api.run import Run
from vserve.api.shapes import Drawn, Piece, TokenText, chat_logprobs
from vserve.bridge import Bridge
from vserve.engine.request import FinishReason
from vserve.errors import ApiError, InternalError, Unavailable
from vserve.store.record import NEXT, Record, Status, StoreFailed
from vserve.text.parts import Content, Part

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ticket:
    """What is fixed of a response before it is generated.

    key: 32 hexadecimal digits, of its id and its items' ids.  document: it as it will be, but for what the answer
    decides.  items: its input as JSON.  kept: it goes into the store.  words: how the tokens of log-probabilities are
    spelled, None when nobody wants them.
    """

    key: str
    owner: bytes
    created_s: int
    document: Document
    items: bytes
    kept: bool
    background: bool
    words: TokenText | None

    @property
    def id(self) -> str:
        return f"resp_{self.key}"


class Follows(Protocol):
    """Somebody who tells the events of a response."""

    def advance(self) -> None:
        """There is more to tell."""


class Shelves(Protocol):
    """Where a job's record goes."""

    async def write(self, record: Record) -> None:
        """Store the record.  Raises StoreFailed."""

    async def write_failure(self, record: Record) -> None:
        """Keep in memory what could not be stored."""


def unstorable(error: StoreFailed) -> Unavailable:
    """What a client hears of a store that cannot be written or read."""
    return Unavailable(
        f"The response store failed ({error}); other requests are not concerned. store: false needs none."
    )


class Job(Run):
    """One response.  ``start`` it; ``recorded`` is done once it is stored as running, ``ended`` once it is as ended."""

    def __init__(self, app: App, bridge: Bridge, choice: Choice, request_id: str, ticket: Ticket) -> None:
        super().__init__(app, bridge, (choice,), request_id)
        loop = asyncio.get_running_loop()
        self.ticket = ticket
        self.kept = ticket.kept
        self.status = Status.QUEUED if ticket.background else Status.IN_PROGRESS
        self.steps: list[Step] = []
        self.final: Document | None = None
        self.body = b""
        self.recorded: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._choice = choice
        self._followers: dict[Follows, None] = {}
        self._output = Output(ticket.key)
        self._drawn: list[Drawn] = []

    @property
    def document(self) -> Document:
        """What is fixed of it."""
        return self.ticket.document

    @property
    def error(self) -> ApiError | None:
        """Why it failed."""
        return self._error

    @property
    def choice(self) -> Choice:
        """Its only choice."""
        return self._choice

    def start(self) -> None:
        """Queue it.  Raises ApiError when there is no room; nothing is left behind then."""
        try:
            self._submit()
        except BaseException:
            self.close()
            raise

    def stop(self) -> None:
        """Cancel it.  Does nothing once it has ended."""
        if not self._closed:
            self.status = _to(self.status, Status.CANCELLED)
            self.close()
            self._wake()

    def follow(self, follower: Follows) -> None:
        """Tell follower of every step from now on, and of the end."""
        self._followers[follower] = None

    def unfollow(self, follower: Follows) -> None:
        """Tell follower no more."""
        self._followers.pop(follower, None)

    def now(self) -> Document:
        """The response as it is at this moment."""
        if self.final is not None:
            return self.final
        items = self._output.snapshot(Status.IN_PROGRESS)
        return {**started(self.document), "status": self.status.value, "output": items}

    async def live(self, shelves: Shelves) -> None:
        """Its life after ``start``: stored as running, waited for, stored as ended.  ``announce`` comes after."""
        try:
            await self._record(shelves)
            await self._done
            await self._finish(shelves)
        except Exception:
            log.exception("a response could not be ended")
            self.close()
            self._error = InternalError("The server failed while ending the response.")
            self.status = Status.FAILED
            self._conclude(self._end())

    def announce(self) -> None:
        """Tell everybody of the end."""
        for future in (self.recorded, self.ended):
            if not future.done():
                future.set_result(None)
        self._tell()

    async def _record(self, shelves: Shelves) -> None:
        if self.kept:
            document = orjson.dumps({**started(self.document), "status": self.status.value})
            try:
                await shelves.write(self._as_record(document, b"[]"))
            except StoreFailed as error:
                log.error("a response could not be stored: %s", error)
                self.kept = False
                self._error = unstorable(error)
                self.close()
                self._wake()
        if not self.recorded.done():
            self.recorded.set_result(None)

    async def _finish(self, shelves: Shelves) -> None:
        if self.status.running:
            if self._error is not None:
                after = Status.FAILED
            else:
                after = Status.INCOMPLETE if self._choice.finish is FinishReason.LENGTH else Status.COMPLETED
            self.status = _to(self.status, after)
        final = self._end()
        if self.kept:
            try:
                await shelves.write(self._as_record(orjson.dumps(final), pack(self.steps)))
            except StoreFailed as error:
                log.error("a finished response could not be stored: %s", error)
                self.status, self._error = Status.FAILED, unstorable(error)
                final = self._end()
                small = orjson.dumps({**final, "output": []})
                await shelves.write_failure(self._as_record(small, b"[]"))
        self._conclude(final)

    def _conclude(self, final: Document) -> None:
        self.final = final
        self.body = orjson.dumps(final)

    def _end(self) -> Document:
        counts, status = self.counts(), self.status
        usage = {
            "input_tokens": counts.prompt,
            "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},  # no write is charged
            "output_tokens": counts.completion,
            "output_tokens_details": {"reasoning_tokens": counts.reasoning or 0},
            "total_tokens": counts.prompt + counts.completion,
        }
        error = None
        if self._error is not None:
            error = {"code": "server_error", "message": self._error.message}
        return {
            **started(self.document),
            "status": status.value,
            "completed_at": int(time.time()) if status is Status.COMPLETED else None,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status is Status.INCOMPLETE else None,
            "output": self._output.snapshot(status),
            "usage": None if status is Status.FAILED else usage,
        }

    def _as_record(self, document: bytes, trace: bytes) -> Record:
        ticket = self.ticket
        return Record(ticket.id, ticket.owner, ticket.created_s, self.status, document, ticket.items, trace)

    # ---- the choice's Listener -----------------------------------------------------------------------------------

    def text(self, choice: Choice, text: str) -> None:
        """See choice.Listener."""
        choice.keep(text)
        self.more(choice)

    def more(self, choice: Choice) -> None:
        """See choice.Listener."""
        if self.status is Status.QUEUED:
            self.status = _to(self.status, Status.IN_PROGRESS)
        self._take(choice.take())
        self._tell()

    def finished(self, choice: Choice) -> None:
        """See choice.Listener."""
        self._take(choice.take())
        super().finished(choice)

    def _take(self, piece: Piece) -> None:
        parts: tuple[Part, ...] = (Content(piece.text),) if piece.text else ()
        if piece.parts is not None:
            parts = piece.parts
        self._drawn += piece.drawn
        if piece.finish is FinishReason.STOP:
            self._drop_stop(piece)
        for place, part in enumerate(parts, 1):
            logprobs: Logprobs | None = None
            if isinstance(part, Content) and self.ticket.words is not None:
                logprobs = self._logprobs(part.text, self.ticket.words, last=place == len(parts))
            step = Step(part, logprobs)
            self.steps.append(step)
            self._output.take(step)
        if parts and not isinstance(parts[-1], Content):
            self._drawn = []

    def _logprobs(self, text: str, words: TokenText, *, last: bool) -> Logprobs:
        """Those of a text among all that was drawn with it; last: nothing else was said behind it.

        Tokens may come before the text they are held back for: they go with the next text there is.
        """
        drawn = self._drawn
        begins = bool(self.steps) and not isinstance(self.steps[-1].part, Content)
        if begins:  # behind reasoning, a call or their marks: the end of what was drawn
            drawn = drawn[len(drawn) - covering(text, [token for token, _ in reversed(drawn)], words) :] if last else []
        elif not last:
            drawn = drawn[: covering(text, [token for token, _ in drawn], words)]
        self._drawn = []
        logprobs = chat_logprobs(drawn, words)["content"]
        assert isinstance(logprobs, list)
        return logprobs

    def _drop_stop(self, piece: Piece) -> None:
        """The token that ended the answer is not part of its text, unless it was asked to be."""
        words, request = self.ticket.words, self._choice.request
        if words is None or request is None or not self._drawn:
            return
        token = self._drawn[-1][0]
        if token in request.stop_ids and not piece.text.endswith(words.of(token)):
            self._drawn.pop()

    def _tell(self) -> None:
        for follower in list(self._followers):
            follower.advance()


def covering(text: str, tokens: Sequence[int], words: TokenText) -> int:
    """How many of the tokens have at least as many characters as text together; all, when none do."""
    length = 0
    for count, token in enumerate(tokens):
        if length >= len(text):
            return count
        length += len(words.of(token))
    return len(tokens)


def _to(status: Status, after: Status) -> Status:
    """after, if it may follow status; RuntimeError otherwise."""
    if after not in NEXT[status]:
        raise RuntimeError(f"a response cannot go from {status.value} to {after.value}")
    return after


def lost(record: Record) -> Record:
    """A record that was running when its server ended: it has failed, and its document says so."""
    document = orjson.loads(record.document)
    if record.status is not Status.FAILED or document["status"] == Status.FAILED.value:
        return record
    error = {"code": "server_error", "message": "The server was restarted before the response was complete."}
    document |= {"status": Status.FAILED.value, "error": error}
    return replace(record, document=orjson.dumps(document))
