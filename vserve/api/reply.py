"""A reply under way: its choices, its deadline, its client; and the kind that is sent whole.

Owns how a reply begins and ends, exactly once.  What the JSON looks like is the dialect's; how bytes
travel is the exchange's.  Event-loop thread only; no coroutine wakes for a token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson

from vserve.api.access import Key
from vserve.api.app import App
from vserve.api.choice import Choice
from vserve.api.shapes import Counts, Piece, server_timing
from vserve.bridge import Bridge
from vserve.engine.request import FinishReason, GenRequest
from vserve.errors import ApiError, DeadlineExceeded, InternalError
from vserve.http import sse
from vserve.http.exchange import Exchange, Response

Headers = tuple[tuple[str, str], ...]
CountsNow = Callable[[], Counts]


class Dialect(Protocol):
    """How one endpoint words its replies."""

    def affixes(self, index: int) -> tuple[bytes, bytes]:
        """The bytes before and after the JSON string of a plain text delta of that choice."""

    def opening(self, choice: Choice, counts: CountsNow) -> bytes:
        """The choice's first events, b"" if it has none."""

    def chunk(self, choice: Choice, piece: Piece, counts: CountsNow) -> bytes:
        """One event with a piece of the choice."""

    def ending(self, counts: CountsNow) -> bytes:
        """The events after the last choice, without [DONE]."""

    def whole(self, pieces: Sequence[tuple[Choice, Piece]], counts: Counts) -> bytes:
        """The body of a reply that is not streamed."""


@dataclass(frozen=True, slots=True)
class Framing:
    """What a stream sends that is no part of the answer.

    quiet: keeps a silent stream alive.  done: after the last event.  failure: an error, for the exchange of that id.
    """

    quiet: bytes
    done: bytes
    failure: Callable[[ApiError, str], bytes]


OPENAI = Framing(sse.COMMENT, sse.DONE, lambda error, _: sse.frame(orjson.dumps(error.body())))


class Reply:
    """What both kinds of reply share.  ``run`` is the life of one."""

    def __init__(
        self,
        app: App,
        bridge: Bridge,
        exchange: Exchange,
        dialect: Dialect,
        choices: Sequence[Choice],
        headers: Headers,
    ) -> None:
        """headers: for the answer.  The choices' requests share one deadline."""
        self.exchange = exchange
        self._app = app
        self._bridge = bridge
        self._dialect = dialect
        self._choices = choices
        self._headers = headers
        self._unfinished = len(choices)
        self._closed = False
        self._error: ApiError | None = None
        self.caller: Key | None = None  # whose quotas the tokens count against
        self._queued = False
        self._timer: asyncio.TimerHandle | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> Response | None:
        """Submit, wait for the end, and return the response if it was not streamed.

        Raises ApiError when the reply failed before its first byte.  However it is left, nothing keeps running.
        """
        try:
            self._submit()
            await self._done
        finally:
            self.close()
        if self._error is not None:
            raise self._error
        return self.answer()

    def answer(self) -> Response | None:
        """What is left to send once ``run`` has nothing to wait for."""
        return None

    def text(self, choice: Choice, text: str) -> None:
        """See choice.Listener."""
        choice.keep(text)

    def more(self, choice: Choice) -> None:
        """See choice.Listener."""

    def finished(self, choice: Choice) -> None:
        """See choice.Listener."""
        self._count_down()

    def _count_down(self) -> None:
        self._unfinished -= 1
        if self._unfinished == 0:
            self.end()

    def cancel(self, choice: Choice) -> None:
        """See choice.Listener."""
        if choice.request is not None:
            self._bridge.cancel(choice.request.id, FinishReason.STOP)

    def fail(self, error: ApiError) -> None:
        """End with error; the client sees it.  Does nothing once the reply has ended."""
        if self._closed:
            return
        if isinstance(error, InternalError):
            error = InternalError(f"{error.message} (request id {self.exchange.id})")
        reason = FinishReason.CANCELLED
        if isinstance(error, DeadlineExceeded):
            reason = FinishReason.TIMEOUT
        elif isinstance(error, InternalError):
            reason = FinishReason.ERROR
        self.close(reason)
        self.report(error)

    def report(self, error: ApiError) -> None:
        """Tell the client of error; the reply is closed."""
        self._error = error
        self._wake()

    def end(self) -> None:
        """All choices are finished."""
        self.close()
        self._wake()

    def close(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Stop what still runs and let go of everything shared.  Calling it again changes nothing."""
        if self._closed:
            return
        self._closed = True
        for choice in self._choices:
            choice.close()
            if choice.finish is None and choice.request is not None:
                self._bridge.cancel(choice.request.id, reason)
        if self._timer is not None:
            self._timer.cancel()
        self._app.replies.discard(self)
        self.exchange.on_gone = None
        self.exchange.on_writable = None
        if self.caller is not None and self._queued:
            self._app.keys.use(self.caller, self.spent())

    def spent(self) -> int:
        """Tokens of prompts and answers that this reply has cost."""
        counts = self.counts()
        return counts.prompt + counts.completion

    def counts(self) -> Counts:
        """Tokens so far.  Each prompt counts once, and so does what its first choice found cached."""
        firsts = [choice for choice in self._choices if choice.first]
        thought = [choice.reasoning_tokens for choice in self._choices if choice.reasoning_tokens is not None]
        return Counts(
            prompt=sum(len(choice.prompt) for choice in firsts),
            completion=sum(choice.num_tokens for choice in self._choices),
            cached=sum(choice.cached_tokens for choice in firsts),
            reasoning=sum(thought) if thought else None,
        )

    def _enter(self) -> None:
        """From now on the end of the client and of the server are heard of."""
        self.exchange.on_gone = self._gone
        self._app.replies.add(self)

    def _submit(self) -> None:
        self._enter()
        for choice in self._choices:
            choice.attach(self)
            if choice.request is not None:
                self._queue(choice, choice.request)
        self._queued = True
        for choice in self._choices:
            if choice.request is None:
                choice.finish = FinishReason.LENGTH
                self.finished(choice)
        self._watch_deadline()

    def _watch_deadline(self) -> None:
        deadline_s = next((choice.request.deadline_s for choice in self._choices if choice.request is not None), None)
        if deadline_s is not None and not self._closed:
            # The engine keeps the deadline too, but a long step must not keep the client waiting.
            left_s = max(0.0, deadline_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(left_s, self._expired)

    def _queue(self, choice: Choice, request: GenRequest) -> None:
        try:
            self._bridge.submit(request, choice)
        except ApiError as error:  # the gate had let it in
            self._app.refused(error)
            raise

    def _expired(self) -> None:
        self.fail(DeadlineExceeded("The request's deadline passed before the answer was complete."))

    def _gone(self) -> None:
        self.close()
        self._wake()

    def _wake(self) -> None:
        """Let run go on.  The future may be done already: its task was cancelled, or the reply has ended."""
        if not self._done.done():
            self._done.set_result(None)


class WholeReply(Reply):
    """A reply sent at once when the last choice has finished."""

    def answer(self) -> Response | None:
        if self.exchange.gone:
            return None
        pieces = [(choice, choice.take()) for choice in self._choices]
        headers = self._headers
        timings = [choice.timing for choice in self._choices if choice.timing is not None]
        if timings:
            headers = (*headers, ("server-timing", server_timing(timings)))
        return Response(200, self._dialect.whole(pieces, self.counts()), headers=headers)
