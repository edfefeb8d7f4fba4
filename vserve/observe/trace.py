"""Traces: what one request went through, step by step, and the bounded memory of the last ones.

Holds times, counts and names of the program: never text, never a key.  Knows neither engine nor HTTP: plain values come
in.  Event-loop thread only.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

MOST_GAPS = 4096
MOST_CHOICES = 32
"""Choices of one request that are followed; the others are counted."""
ID_CHARS = 128

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class Parent:
    """The span that a caller says is above ours (W3C Trace Context, section 3.2)."""

    trace_id: str
    span_id: str
    sampled: bool


def parent_of(traceparent: str | None) -> Parent | None:
    """The header's meaning; None without one, and for one that a receiver must disregard."""
    found = None if traceparent is None else _PARENT.fullmatch(traceparent)
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    if not int(found[2], 16) or not int(found[3], 16):
        return None
    return Parent(found[2], found[3], bool(int(found[4], 16) & 1))


class Gaps:
    """Seconds between tokens: exact up to MOST_GAPS of them, beyond that from every second, fourth and so on."""

    __slots__ = ("_kept", "_skip", "_stride", "count", "largest_s")

    def __init__(self) -> None:
        self._kept = array("d")
        self._stride = 1
        self._skip = 0
        self.count = 0
        self.largest_s = 0.0

    def add(self, gap_s: float) -> None:
        """Note one."""
        self.count += 1
        if gap_s > self.largest_s:
            self.largest_s = gap_s
        if self._skip:
            self._skip -= 1
            return
        kept = self._kept
        kept.append(gap_s)
        if len(kept) >= MOST_GAPS:
            del kept[::2]
            self._stride *= 2
        self._skip = self._stride - 1

    def quantile(self, share: float) -> float:
        """The smallest gap that so many of them, as a share in (0, 1], do not pass.  There is at least one."""
        ordered = sorted(self._kept)
        return ordered[math.ceil(share * len(ordered)) - 1]


class ChoiceTrace:
    """One sequence.  Times are time.monotonic() seconds, None where they never came.

    chunks: (step, seconds, first token's place, tokens) for each step of the prompt.
    """

    __slots__ = (
        "cached_tokens", "chunks", "chunks_left_out", "ended_s", "finish_reason", "first_token_s", "gaps", "id",
        "index", "last_s", "preempted_s", "preemptions", "prompt_tokens", "queued_s", "scheduled_s", "tokens",
    )  # fmt: skip

    def __init__(self, id: int, index: int, prompt_tokens: int) -> None:
        self.id = id
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.tokens = 0
        self.queued_s: float | None = None
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_s: float | None = None
        self.ended_s: float | None = None
        self.finish_reason: str | None = None
        self.preemptions = 0
        self.preempted_s: Sequence[float] = ()
        self.chunks: Sequence[tuple[int, float, int, int]] = ()
        self.chunks_left_out = 0
        self.gaps = Gaps()


class Trace:
    """One request.  Times are time.monotonic() seconds, None where they never came.

    id: of the exchange; reply_id: of the answer.  prompt_tokens: each prompt counts once.  queued_s, scheduled_s: of
    work that is no sequence.  expected: ids of its sequences.  open: those that have not ended.  over: the exchange
    has.
    """

    __slots__ = (
        "admitted_s", "bytes_written", "choices", "choices_left_out", "completion_tokens", "ended_s",
        "expected", "gone", "id", "max_tokens", "method", "model", "n", "open", "over", "parent",
        "prompt_tokens", "queued_s", "received_s", "reply_id", "route", "scheduled_s", "span_id", "status",
        "stream", "temperature", "tokenised_s", "top_p", "trace_id", "unix_s",
    )  # fmt: skip

    def __init__(
        self, id: str, route: str, method: str, received_s: float, admitted_s: float, parent: Parent | None
    ) -> None:
        self.id = id
        self.route = route
        self.method = method
        self.received_s = received_s
        self.admitted_s = admitted_s
        self.unix_s = time.time() - (admitted_s - received_s)
        self.parent = parent
        self.trace_id = parent.trace_id if parent is not None else f"{random.getrandbits(128) or 1:032x}"
        self.span_id = f"{random.getrandbits(64) or 1:016x}"
        self.tokenised_s: float | None = None
        self.ended_s: float | None = None
        self.reply_id: str | None = None
        self.model: str | None = None
        self.stream = False
        self.n = 1
        self.max_tokens: int | None = None
        self.temperature: float | None = None
        self.top_p: float | None = None
        self.choices: list[ChoiceTrace] = []
        self.choices_left_out = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.queued_s: float | None = None
        self.scheduled_s: float | None = None
        self.expected: list[int] = []
        self.open = 0
        self.over = False
        self.status = 0
        self.bytes_written = 0
        self.gone = False

    def choice(self, id: int, prompt_tokens: int) -> ChoiceTrace | None:
        """A further choice that will be generated; None where there are too many to follow it in detail."""
        self.expected.append(id)
        if len(self.choices) >= MOST_CHOICES:
            self.choices_left_out += 1
            return None
        made = ChoiceTrace(id, len(self.choices), prompt_tokens)
        self.choices.append(made)
        return made

    @property
    def sampled(self) -> bool:
        """Whether it is to be exported: the caller's word counts where it gave one."""
        return self.parent is None or self.parent.sampled

    def record(self) -> dict[str, object]:
        """All of it as JSON has it: times in milliseconds since it was received, null where they never came."""
        after = self._after
        times = [choice.queued_s for choice in self.choices if choice.queued_s is not None]
        begun = [choice.scheduled_s for choice in self.choices if choice.scheduled_s is not None]
        firsts = [choice.first_token_s for choice in self.choices if choice.first_token_s is not None]
        return {
            "id": self.id[:ID_CHARS],
            "reply_id": self.reply_id,
            "trace_id": self.trace_id,
            "span_id": self.span_id,
            "parent_span_id": None if self.parent is None else self.parent.span_id,
            "route": self.route,
            "method": self.method,
            "model": self.model,
            "stream": self.stream,
            "n": self.n,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "received": round(self.unix_s, 6),
            "admitted_ms": after(self.admitted_s),
            "tokenised_ms": after(self.tokenised_s),
            "queued_ms": after(min(times, default=self.queued_s)),
            "first_scheduled_ms": after(min(begun, default=self.scheduled_s)),
            "first_token_ms": after(min(firsts, default=None)),
            "ended_ms": after(self.ended_s),
            "status": self.status or None,
            "client_gone": self.gone,
            "bytes_written": self.bytes_written,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "choices": [self._choice(choice) for choice in self.choices],
            "choices_left_out": self.choices_left_out,
        }

    def _choice(self, choice: ChoiceTrace) -> dict[str, object]:
        after, gaps = self._after, choice.gaps
        measured: dict[str, object] = {"count": gaps.count}
        if gaps.count:
            for name, gap_s in (("p50", gaps.quantile(0.5)), ("p99", gaps.quantile(0.99)), ("max", gaps.largest_s)):
                measured[f"{name}_ms"] = round(gap_s * 1e3, 3)
        return {
            "id": choice.id,
            "index": choice.index,
            "prompt_tokens": choice.prompt_tokens,
            "cached_tokens": choice.cached_tokens,
            "completion_tokens": choice.tokens,
            "queued_ms": after(choice.queued_s),
            "first_scheduled_ms": after(choice.scheduled_s),
            "prefill": [
                {"step": step, "at_ms": after(at_s), "start": start, "tokens": tokens}
                for step, at_s, start, tokens in choice.chunks
            ],
            "prefill_left_out": choice.chunks_left_out,
            "first_token_ms": after(choice.first_token_s),
            "gaps": measured,
            "preemptions": choice.preemptions,
            "preempted_ms": [after(at_s) for at_s in choice.preempted_s],
            "finish_reason": choice.finish_reason,
            "ended_ms": after(choice.ended_s),
        }

    def _after(self, at_s: float | None) -> float | None:
        return None if at_s is None else round((at_s - self.received_s) * 1e3, 3)


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished trace: the ids it is found by, and its record as JSON."""

    ids: frozenset[str]
    json: bytes


@dataclass(frozen=True, slots=True)
class RingFigures:
    """kept: traces now, and their bytes.  total: ever noted.  pushed_out: of those, gone again."""

    kept: int
    bytes: int
    total: int
    pushed_out: int


class TraceRing:
    """The last traces: at most limit of them, and at most limit_bytes of JSON."""

    def __init__(self, limit: int, limit_bytes: int) -> None:
        self.limit = limit
        self._limit_bytes = limit_bytes
        self._kept: deque[Kept] = deque()
        self._bytes = 0
        self._total = 0

    def add(self, kept: Kept) -> None:
        """Keep one more; the oldest go."""
        self._total += 1
        self._kept.append(kept)
        self._bytes += len(kept.json)
        while len(self._kept) > self.limit or self._bytes > self._limit_bytes:
            self._bytes -= len(self._kept.popleft().json)

    def find(self, limit: int, id: str | None = None) -> list[bytes]:
        """At most limit records, the latest first; with id only those of that request, reply, trace or choice."""
        found = (kept.json for kept in reversed(self._kept) if id is None or id in kept.ids)
        return list(itertools.islice(found, limit))

    @property
    def figures(self) -> RingFigures:
        """How full it is."""
        kept = len(self._kept)
        return RingFigures(kept, self._bytes, self._total, self._total - kept)
