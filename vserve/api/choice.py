"""One choice of a reply: tokens in from the bridge, text out to the reply it belongs to.

Owns decoding, stop strings, splitting into parts and counting of one sequence.  Knows nothing of JSON or sockets.
Event-loop thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vserve.api.past import Past
from vserve.api.shapes import Drawn, Piece
from vserve.engine.request import Emit, FinishReason, GenRequest, RequestFault, RequestId, Timing, TokenLogprobs
from vserve.errors import ApiError, BadRequest, DeadlineExceeded, EngineDied, InternalError, Unavailable
from vserve.text.detokenizer import Detokenizer
from vserve.text.parts import Content, Part, Splitter, merged
from vserve.text.stops import StopMatcher
from vserve.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Splitting:
    """How answers are split into reasoning, content and calls of tools.

    make: a splitter for one answer.  one_call: an answer ends with its first call.  shown: special ids whose text the
    splitter has to see; it shows them to nobody.  reasons: whether reasoning is told apart, and its tokens counted.
    """

    make: Callable[[], Splitter]
    one_call: bool = False
    shown: frozenset[int] = frozenset()
    reasons: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """How the tokens of all choices of a reply are read.

    continuation: the tokens go on with the prompt's text, so that a leading space is kept.
    min_tokens: a stop string cannot end a choice within its first so many tokens.  eos_ids: ids that end a sequence
    without being anyone's stop_reason.  scored: the log-probabilities of the prompt are wanted.  count_chunks: every
    chunk carries the usage so far.  splitting: None where all text is content.
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
    scored: bool
    count_chunks: bool
    splitting: Splitting | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing but its text is wanted of a token, split or not."""
        extras = self.keep_ids or self.keep_logprobs or self.scored or self.count_chunks
        return not (self.stops or extras or (self.splitting is not None and self.splitting.one_call))


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
        "_detokenizer", "_drawn", "_ids", "_listener", "_parts", "_past", "_plain", "_reading", "_scores", "_splitter",
        "_stops", "_texts", "cached_tokens", "finish", "first", "index", "lead", "num_tokens", "offset", "prefix",
        "prompt", "reasoning_tokens", "request", "stop_reason", "suffix", "timing",
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
        self.reasoning_tokens: int | None = None
        self.offset = len(lead)
        self.finish: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.timing: Timing | None = None
        self._reading = reading
        self._plain = False  # until the first tokens were read: they bring their times with them
        splitting = reading.splitting
        self._splitter = None
        if splitting is not None:
            self._splitter = splitting.make()
            self.reasoning_tokens = 0 if splitting.reasons else None
        self._detokenizer = Detokenizer(
            reading.tokenizer,
            skip_special=reading.skip_special,
            continuation=reading.continuation,
            shown=frozenset() if splitting is None else splitting.shown,
        )
        self._stops = StopMatcher(reading.stops, reading.include_stop) if reading.stops else None
        self._texts: list[str] = []
        self._parts: list[Part] = []
        self._ids: list[int] = []
        self._drawn: list[Drawn] = []
        self._scores: Sequence[TokenLogprobs] | None = None
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

    @property
    def num_calls(self) -> int:
        """Calls of tools that are complete."""
        return 0 if self._splitter is None else self._splitter.num_calls

    def keep(self, text: str) -> None:
        """Put text aside for the next ``take``."""
        self._texts.append(text)
        if self._splitter is not None:
            self._parts.append(Content(text))

    def take(self) -> Piece:
        """All that has gathered since the last take."""
        parts = None if self._splitter is None else merged(self._parts)
        text = "".join(self._texts)
        piece = Piece(
            text, self.offset, self._ids, self._drawn, self.finish, self.stop_reason, self._scores, parts=parts
        )
        self._scores = None
        self.offset += len(text)
        self._texts, self._parts, self._ids, self._drawn = [], [], [], []
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
                if self._splitter is not None:
                    self._pass_on(emit.ids, listener)
                    return
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
        if emit.timing is not None:
            self.timing = emit.timing
        if emit.prompt_logprobs is not None:
            self._scores = emit.prompt_logprobs
        if emit.finish is FinishReason.TIMEOUT:
            listener.fail(DeadlineExceeded("The request's deadline passed before the answer was complete."))
            return
        if isinstance(emit.error, RequestFault):
            listener.fail(BadRequest(emit.error))
            return
        if emit.finish is FinishReason.ERROR:
            log.error("the engine failed on a request: %s", emit.error)
            listener.fail(InternalError("The engine failed on this request."))
            return
        hides_last = emit.stop_id is not None and not self._reading.include_stop
        used, ended, stop = self._words(emit.ids[:-1] if hides_last else emit.ids)
        if not ended:
            used = len(emit.ids)
        self._gather(emit, used)
        if not ended and emit.finish is not None:
            stop = self._flush()
            ended = stop is not None
        if ended:
            self.finish, self.stop_reason = FinishReason.STOP, stop
            if emit.finish is None:
                if self.timing is not None:  # the engine's own word on the end comes when nobody listens
                    self.timing = replace(self.timing, finished_s=time.monotonic())
                listener.cancel(self)
        elif emit.finish is not None:
            self.finish = emit.finish
            self.stop_reason = emit.stop_id if emit.stop_id not in self._reading.eos_ids else None
        if self.finish is not None:
            if self._splitter is not None and not self._has_its_call():
                self._split(self._splitter.flush())
            listener.finished(self)
            return
        self._plain = self._reading.plain
        if self._texts or self._parts or self._ids or self._drawn or self._scores is not None:
            listener.more(self)

    def _pass_on(self, ids: Sequence[int], listener: Listener) -> None:
        """Split ids' text.  One piece of content goes the quick way, which most tokens can take."""
        self._words(ids)
        parts = self._parts
        if len(parts) == 1 and isinstance(parts[0], Content):
            text = parts[0].text
            self._texts, self._parts = [], []
            listener.text(self, text)
        elif parts:
            listener.more(self)

    def _words(self, ids: Sequence[int]) -> tuple[int, bool, str | None]:
        """Turn ids into text; how many were used, whether the answer ends there, and the stop string that ended it."""
        splitter, stops = self._splitter, self._stops
        if stops is None and splitter is None:
            self._say(self._detokenizer.push(ids))
            return len(ids), False, None
        for used, token in enumerate(ids, 1):  # one by one: usage counts tokens up to the end, and those of reasoning
            thought = splitter is not None and splitter.reasoning
            text, hit = self._detokenizer.push((token,)), None
            early = self.num_tokens + used <= self._reading.min_tokens
            if text and stops is not None and not early:
                text, hit = stops.push(text)
            self._say(text)
            if thought and splitter is not None and splitter.reasoning and self.reasoning_tokens is not None:
                self.reasoning_tokens += 1  # not the token that closes it
            if hit is not None:
                return used, True, hit
            if not early and self._has_its_call():
                return used, True, None
        return len(ids), False, None

    def _has_its_call(self) -> bool:
        """Whether the one call that the answer may have is complete."""
        splitting = self._reading.splitting
        return splitting is not None and splitting.one_call and self.num_calls > 0

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
        if not text:
            return
        if self._splitter is None:
            self._texts.append(text)
        else:
            self._split(self._splitter.push(text))

    def _split(self, parts: Sequence[Part]) -> None:
        self._parts += parts
        self._texts += [part.text for part in parts if isinstance(part, Content)]
