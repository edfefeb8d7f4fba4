"""A run that answers one exchange, and the kind of reply that is sent whole.

Owns what the client's leaving does to a run.  What the JSON looks like is the dialect's; how bytes travel is the
exchange's.  Event-loop thread only; no coroutine wakes for a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson

from vserve.api.app import App
from vserve.api.choice import Choice
from vserve.api.run import Run
from vserve.api.shapes import Counts, Piece, server_timing
from vserve.bridge import Bridge
from vserve.engine.request import FinishReason
from vserve.errors import ApiError
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


class Reply(Run):
    """What both kinds of reply to an exchange share.  ``run`` is the life of one."""

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
        super().__init__(app, bridge, choices, exchange.id)
        self.exchange = exchange
        self._dialect = dialect
        self._headers = headers

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

    def close(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """See Run.  The exchange is let go of too."""
        if self._closed:
            return
        super().close(reason)
        self.exchange.on_gone = None
        self.exchange.on_writable = None

    def _enter(self) -> None:
        """From now on the end of the client is heard of too."""
        self.exchange.on_gone = self._gone
        super()._enter()

    def _gone(self) -> None:
        self.close()
        self._wake()


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
