"""One choice of a reply: tokens in from the bridge, text out to the reply it belongs to.

Owns decoding, stop strings and counting of one sequence.  Knows nothing of JSON or sockets.  Event-loop thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vserve.api.past import Past
from vserve.api.shapes import Drawn, Piece
from vserve.engine.request import Emit, FinishReason, GenRequest, RequestId, Timing
from vserve.errors import ApiError, DeadlineExceeded, EngineDied, InternalError, Unavailable
from vserve.text.detokenizer import Detokenizer
from vserve.text.stops import StopMatcher
from vserve.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """How the tokens of all choices of a reply are read.

    continuation: the tokens go on with the prompt's text, so that a leading space is kept.
    min_tokens: a stop string cannot end a choice within its first so many tokens.  eos_ids: ids that end a sequence
    without being anyone's stop_reason.  count_chunks: every chunk carries the usage so far.
    """

    tokenizer: Tokenizer
    skip_special: bool
    continuation: bool
    stops: tuple[str, ...]
    include_stop: bool
    min_tokens: int
    eos_ids: frozenset[int]
    keep_ids: bool
    keep_logprobs: bool
    count_chunks: bool

    @property
    def plain(self) -> bool:
        """Whether nothing but its text is wanted of a token."""
        return not (self.stops or self.keep_ids or self.keep_logprobs or self.count_chunks)


class Listener(Protocol):
    """The reply a choice belongs to."""

    def text(self, choice: Choice, text: str) -> None:
        """New text of a choice, never empty."""

    def more(self, choice: Choice) -> None:
        """The choice gathered something: ``take`` has it."""

    def finished(self, choice: Choice) -> None:
        """The choice has its finish; ``take`` has the rest of it."""

    def cancel(self, choice: Choice) -> None:
        """A stop string was found: the engine need not go on."""

    def fail(self, error: ApiError) -> None:
        """The whole reply ends with error."""


class _Deaf:
    """A listener for what has been said before."""

    def text(self, choice: Choice, text: str) -> None:
        choice.keep(text)

    def more(self, choice: Choice) -> None: ...
    def finished(self, choice: Choice) -> None: ...
    def cancel(self, choice: Choice) -> None: ...
    def fail(self, error: ApiError) -> None: ...


class Choice:
    """The state of one choice; a TokenSink.

    index: its place in the reply.  first: it is the first choice of its prompt.  request: None when there is nothing to
    generate.  lead: text before the first token.
    """

    __slots__ = (
        "_detokenizer", "_drawn", "_ids", "_listener", "_parts", "_past", "_plain", "_reading", "_stops",
        "cached_tokens",
        "finish", "first", "index", "lead", "num_tokens", "offset", "prefix", "prompt", "request", "stop_reason",
        "suffix", "timing",
    )  # fmt: skip

    def __init__(
        self, index: int, first: bool, prompt: Sequence[int], request: GenRequest | None, reading: Reading, lead: str
    ) -> None:
        self.index = index
        self.first = first
        self.prompt = prompt
        self.request = request
        self.lead = lead
        self.prefix = b""  # bytes around a plain text delta, for the reply's use
        self.suffix = b""
        self.num_tokens = 0
        self.cached_tokens = 0
        self.offset = len(lead)
        self.finish: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.timing: Timing | None = None
        self._reading = reading
        self._plain = reading.plain
        self._detokenizer = Detokenizer(
            reading.tokenizer, skip_special=reading.skip_special, continuation=reading.continuation
        )
        self._stops = StopMatcher(reading.stops, reading.include_stop) if reading.stops else None
        self._parts: list[str] = []
        self._ids: list[int] = []
        self._drawn: list[Drawn] = []
        self._listener: Listener | None = None
        self._past: Past | None = None

    def record(self) -> None:
        """From now on keep what is pushed, so that another life can go over it."""
        self._past = Past()

    @property
    def recorded_bytes(self) -> int:
        """Roughly the memory that this takes."""
        return 0 if self._past is None else self._past.num_bytes

    def recalls(self, tokens: int) -> bool:
        """Whether what was said behind so many tokens can be said again."""
        past = self._past
        return past is not None and (not self._reading.keep_logprobs or past.has_scores_from(tokens))

    @property
    def complete(self) -> bool:
        """Whether nothing is left to draw."""
        return self.finish is not None or self.request is None or (self._past is not None and self._past.complete)

    def again(self, id: RequestId, arrival_s: float) -> Choice:
        """This choice as at its start, its request going on behind what is recorded.

        All that follows from the tokens (half characters, half stop strings, counts) ``catch_up`` makes anew.
        """
        request = self.request
        if request is not None and self._past is not None:
            request = request.behind(self._past.ids.tolist(), id, arrival_s)
        return Choice(self.index, self.first, self.prompt, request, self._reading, self.lead)

    def catch_up(self, before: Choice, seen: int, *, through: bool) -> Piece:
        """Take in silence the first seen tokens (through: all) of what an earlier life recorded; what it had said."""
        past = before._past
        self._past = Past()
        self.cached_tokens = before.cached_tokens
        self._listener = _Deaf()
        if past is not None and (seen or through):
            self.push(past.since(0) if through else past.until(seen))
        if through and self.finish is None:
            self.finish = before.finish
        return self.take()

    def go_on(self, before: Choice) -> None:
        """Hear the rest of what the earlier life recorded, aloud."""
        past = before._past
        if past is not None and (past.complete or len(past.ids) > self.num_tokens):
            self.push(past.since(self.num_tokens))

    def attach(self, listener: Listener) -> None:
        """Say who hears of this choice."""
        self._listener = listener

    def keep(self, text: str) -> None:
        """Put text aside for the next ``take``."""
        self._parts.append(text)

    def take(self) -> Piece:
        """All that has gathered since the last take."""
        piece = Piece("".join(self._parts), self.offset, self._ids, self._drawn, self.finish, self.stop_reason)
        self.offset += len(piece.text)
        self._parts, self._ids, self._drawn = [], [], []
        return piece

    def push(self, emit: Emit) -> None:
        """Take new tokens (TokenSink)."""
        listener = self._listener
        if listener is None or self.finish is not None:
            return
        try:
            if self._past is not None:
                self._past.take(emit)
            if self._plain and emit.finish is None:
                if emit.cached_tokens and not self.num_tokens:
                    self.cached_tokens = emit.cached_tokens
                self.num_tokens += len(emit.ids)
                text = self._detokenizer.push(emit.ids)
                if text:
                    listener.text(self, text)
            else:
                self._read(emit, listener)
        except Exception:  # one reply's bug must not stop the fan-out to all others
            log.exception("reading the tokens of a reply failed")
            listener.fail(InternalError("The server failed while reading the model's answer."))

    def fail(self, error: EngineDied) -> None:
        """The engine is gone (TokenSink)."""
        if self._listener is not None:
            self._listener.fail(Unavailable("The engine has stopped; the server is shutting down.", close=True))

    def close(self) -> None:
        """Hear nothing more."""
        self._listener = None

    def _read(self, emit: Emit, listener: Listener) -> None:
        if emit.cached_tokens and not self.num_tokens:
            self.cached_tokens = emit.cached_tokens
        self.timing = emit.timing
        if emit.finish is FinishReason.TIMEOUT:
            listener.fail(DeadlineExceeded("The request's deadline passed before the answer was complete."))
            return
        if emit.finish is FinishReason.ERROR:
            log.error("the engine failed on a request: %s", emit.error)
            listener.fail(InternalError("The engine failed on this request."))
            return
        hides_last = emit.stop_id is not None and not self._reading.include_stop
        used, hit = self._words(emit.ids[:-1] if hides_last else emit.ids)
        if hit is None:
            used = len(emit.ids)
        self._gather(emit, used)
        if hit is None and emit.finish is not None:
            hit = self._flush()
        if hit is not None:
            self.finish, self.stop_reason = FinishReason.STOP, hit
            if emit.finish is None:
                listener.cancel(self)
        elif emit.finish is not None:
            self.finish = emit.finish
            self.stop_reason = emit.stop_id if emit.stop_id not in self._reading.eos_ids else None
        if self.finish is not None:
            listener.finished(self)
        elif self._parts or self._ids or self._drawn:
            listener.more(self)

    def _words(self, ids: Sequence[int]) -> tuple[int, str | None]:
        """Turn ids into text; how many were used, and the stop string found in them."""
        if self._stops is None:
            self._say(self._detokenizer.push(ids))
            return len(ids), None
        for used, token in enumerate(ids, 1):  # one by one: usage counts tokens up to the hit
            text = self._detokenizer.push((token,))
            if not text:
                continue
            if self.num_tokens + used <= self._reading.min_tokens:
                self._say(text)
                continue
            safe, hit = self._stops.push(text)
            self._say(safe)
            if hit is not None:
                return used, hit
        return len(ids), None

    def _gather(self, emit: Emit, used: int) -> None:
        self.num_tokens += used
        if self._reading.keep_ids:
            self._ids += emit.ids[:used]
        if self._reading.keep_logprobs and emit.logprobs is not None:
            self._drawn += zip(emit.ids[:used], emit.logprobs[:used], strict=True)

    def _flush(self) -> str | None:
        """Release what was held back at the end; a stop string may still be completed by it."""
        rest = self._detokenizer.flush()
        if self._stops is None:
            self._say(rest)
            return None
        safe, hit = self._stops.push(rest) if rest else ("", None)
        self._say(safe)
        if hit is None:
            self._say(self._stops.flush())
        return hit

    def _say(self, text: str) -> None:
        if text:
            self._parts.append(text)
