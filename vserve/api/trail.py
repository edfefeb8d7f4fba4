"""What is remembered of a stream, so that a client whose connection broke can go on behind the last event it saw.

Owns event ids and what stood behind each: how many tokens of which choice had been worded by then.  The text itself is
not kept: it is worded again from the drawn tokens.  Knows no connection and no engine.  Event-loop thread only.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vserve.errors import ApiError, BadRequest, NotFound

if TYPE_CHECKING:  # they import app, and app this
    from vserve.api.choice import Choice
    from vserve.api.reply import Dialect, Headers

FINISHED = 2**32 - 1
"""In place of a number of tokens: the choice has had its last event."""
OPENING = 1 << 62
ENDING = 1 << 63
"""Marks of events that belong to no choice: the first ones, and those behind the last choice."""

TAIL_LIMIT_BYTES = 2**18
"""Events that were made together are kept as bytes, so that one may be the last that was seen; so many of a stream."""
FIXED_BYTES = 4096
"""Roughly what a trail takes beside its tokens and events."""

_ID = re.compile(r"([A-Za-z0-9_-]{22})\.([0-9]{1,10})")


class Live(Protocol):
    """The reply that is being streamed."""

    def hand_over(self) -> None:
        """Stop, and cut the connection: another one takes the stream over."""


@dataclass(frozen=True, slots=True)
class Point:
    """How far a stream is for a client that saw everything up to one event.

    ended: the events behind the last choice have begun.  tokens: of each choice that has been heard of, FINISHED if it
    is through.  tail: bytes of events that were made together with the last one seen; mark: theirs.
    """

    ended: bool
    tokens: dict[int, int]
    tail: bytes
    mark: int


class Trail:
    """One stream's record.  marks grow by 8 bytes an event, choices by 4 a token; log-probabilities are bounded."""

    __slots__ = (
        "_batches", "_lost", "_marks", "_parents", "_prefix", "_tails", "_tails_bytes", "body", "choices", "endpoint",
        "error", "headers", "owner", "renew", "reply", "stream",
    )  # fmt: skip

    def __init__(
        self,
        endpoint: str,
        owner: bytes,
        body: int,
        renew: Callable[[], Dialect],
        choices: Sequence[Choice],
        headers: Headers,
    ) -> None:
        """owner: says which caller it belongs to.  body: hash of the request's.  renew: the dialect as at the start."""
        self.stream = secrets.token_urlsafe(16)
        self.endpoint = endpoint
        self.owner = owner
        self.body = body
        self.renew = renew
        self.choices = choices
        self.headers = headers
        self.reply: Live | None = None
        self.error: ApiError | None = None
        self._prefix = b"id: %b." % self.stream.encode()
        self._marks = array("Q")
        self._parents: dict[int, int] = {}  # first event of a continuation -> the event it goes on behind
        self._tails: dict[int, tuple[bytes, int]] = {}  # event -> the bytes it was part of, and its end in them
        self._tails_bytes = 0
        self._batches: deque[tuple[int, bytes]] = deque()  # first event and bytes of events that were made together
        self._lost: set[int] = set()
        for choice in choices:
            choice.record()

    @property
    def events(self) -> int:
        """Events that have been sent."""
        return len(self._marks)

    @property
    def num_bytes(self) -> int:
        """Roughly the memory that this takes."""
        prompts = sum(len(choice.prompt) for choice in self.choices if choice.first)
        recorded = sum(choice.recorded_bytes for choice in self.choices)
        return FIXED_BYTES + 8 * (prompts + len(self._marks)) + recorded + self._tails_bytes

    def stamp(self, mark: int, data: bytes) -> bytes:
        """The event, or events made together, with ids; what is sent next is behind them."""
        marks = self._marks
        if data.find(b"\n\n") == len(data) - 2:
            marks.append(mark)
            return b"%b%d\n%b" % (self._prefix, len(marks), data)
        return self._stamp_all(mark, data)

    def _stamp_all(self, mark: int, data: bytes) -> bytes:
        stamped, end, first = [], 0, len(self._marks) + 1
        for event in data.split(b"\n\n")[:-1]:
            end += len(event) + 2
            self._marks.append(mark)
            stamped.append(b"%b%d\n%b\n\n" % (self._prefix, len(self._marks), event))
            self._tails[len(self._marks)] = (data, end)
        self._batches.append((first, data))
        self._tails_bytes += len(data)
        while self._tails_bytes > TAIL_LIMIT_BYTES:
            self._forget_batch()
        return b"".join(stamped)

    def _forget_batch(self) -> None:
        """Drop the oldest events that were made together: nobody can go on from between them any more."""
        event, data = self._batches.popleft()
        self._tails_bytes -= len(data)
        while self._tails[event][1] < len(data):
            del self._tails[event]
            self._lost.add(event)
            event += 1
        del self._tails[event]

    def point(self, event: int) -> Point | None:
        """Where the client stands whose last event this was; None when the stream cannot be continued from there."""
        if not 1 <= event <= len(self._marks) or event in self._lost:
            return None
        data, end = self._tails.get(event, (b"", 0))
        tokens: dict[int, int] = {}
        ended, at = False, event
        while at > 0 and len(tokens) < len(self.choices):
            mark = self._marks[at - 1]
            if mark & ENDING:
                ended = True
            elif mark & OPENING:
                break  # no choice has been heard of before it
            else:
                tokens.setdefault(mark >> 32, mark & FINISHED)
            at = self._parents.get(at, at - 1)
        if any(not self.choices[index].recalls(count) for index, count in tokens.items() if count != FINISHED):
            return None
        return Point(ended, tokens, data[end:], self._marks[event - 1])

    def branch(self, event: int) -> None:
        """What is sent from now on is behind that event."""
        self._parents[len(self._marks) + 1] = event


class Trails:
    """All streams that can be gone on with: those being sent, and for keep_s those that broke or ended.

    At most max_streams of the latter, of max_bytes together; the oldest go first.  keep_s 0: there are none at all.
    """

    def __init__(
        self, keep_s: float, max_streams: int, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keep_s = keep_s
        self._max_streams = max_streams
        self._max_bytes = max_bytes
        self._clock = clock
        self._all: dict[str, Trail] = {}
        self._parked: dict[str, tuple[float, int]] = {}  # until when, and its bytes; oldest first
        self._parked_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def enabled(self) -> bool:
        return self._keep_s > 0 and self._max_streams > 0

    @property
    def parked(self) -> int:
        """Streams that nobody receives."""
        return len(self._parked)

    @property
    def parked_bytes(self) -> int:
        """Roughly the memory that these take."""
        return self._parked_bytes

    def begin(self, trail: Trail, reply: Live) -> None:
        """The stream is being sent, perhaps again."""
        self._unpark(trail.stream)
        self._all[trail.stream] = trail
        trail.reply = reply

    def park(self, trail: Trail, reply: Live) -> None:
        """The reply has stopped sending the stream: it may be gone on with for a while."""
        if trail.reply is not reply:
            return
        trail.reply = None
        if not trail.events:  # nobody knows an id of it
            self._all.pop(trail.stream, None)
            return
        self._parked[trail.stream] = (self._clock() + self._keep_s, trail.num_bytes)
        self._parked_bytes += trail.num_bytes
        self.expire()
        while self._parked and (len(self._parked) > self._max_streams or self._parked_bytes > self._max_bytes):
            self._drop(next(iter(self._parked)))

    def find(self, event_id: str, endpoint: str, owner: bytes, body: bytes) -> tuple[Trail, Point]:
        """The stream of an event id and where its client stands.

        Raises NotFound, always in the same words, for ids that are not, no longer or not for this caller and endpoint;
        BadRequest when a body is sent that is not the stream's own.
        """
        self.expire()
        match = _ID.fullmatch(event_id.strip())
        trail = self._all.get(match[1]) if match is not None else None
        point = None
        if match is not None and trail is not None and (trail.endpoint, trail.owner) == (endpoint, owner):
            point = trail.point(int(match[2]))
        if trail is None or point is None:
            raise NotFound(
                "There is no stream to go on with behind this Last-Event-ID: one is kept for "
                f"{self._keep_s:g} s after its connection broke, for the same key and path.",
                param="last-event-id",
            )
        if body and hash(body) != trail.body:
            raise BadRequest(
                "The body is not the one that the stream of this Last-Event-ID began with; send the same or none.",
                param="last-event-id",
            )
        return trail, point

    def expire(self) -> None:
        """Forget what has been parked for long enough, and look again when the next one is due."""
        now_s = self._clock()
        while self._parked:
            stream, (until_s, _) = next(iter(self._parked.items()))
            if until_s > now_s:
                break
            self._drop(stream)
        if self._parked and self._timer is None:
            left_s = next(iter(self._parked.values()))[0] - now_s
            self._timer = asyncio.get_running_loop().call_later(left_s, self._due)

    def close(self) -> None:
        """Forget everything."""
        self._all.clear()
        self._parked.clear()
        self._parked_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        self.expire()

    def _drop(self, stream: str) -> None:
        self._unpark(stream)
        del self._all[stream]

    def _unpark(self, stream: str) -> None:
        found = self._parked.pop(stream, None)
        if found is not None:
            self._parked_bytes -= found[1]
