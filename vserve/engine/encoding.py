"""What crosses between the event loop (L) and the encoder's thread (E): texts as ids down, vectors as bytes up.

Plain values only.  Knows neither torch nor HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

EncodingId = NewType("EncodingId", int)


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """A request for the vectors, or a cross-encoder's scores, of some texts.

    texts: ids of each, at least one each, at most what the model takes.  types: token types of each, () for 0
    throughout.  normalize: vectors of length 1; None is the model's choice.  dimensions: keep so many numbers, and
    length 1 if the vectors had it.  priority: lower is served earlier.  deadline_s: time.monotonic() seconds.
    """

    id: EncodingId
    texts: Sequence[Sequence[int]]
    types: Sequence[Sequence[int]] = ()
    normalize: bool | None = None
    dimensions: int | None = None
    priority: int = 0
    arrival_s: float = 0.0
    deadline_s: float | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


@dataclass(frozen=True, slots=True)
class Timed:
    """When an encoding arrived, was first computed on and was done, time.monotonic() seconds."""

    arrival_s: float
    started_s: float
    done_s: float


@dataclass(frozen=True, slots=True)
class Encoded:
    """The end of an encoding.

    vectors: float32 numbers of each text in the machine's order, () where error is set.  error: why there are none.
    """

    id: EncodingId
    vectors: Sequence[bytes] = ()
    error: str | None = None
    expired: bool = False
    timed: Timed | None = None


@dataclass(frozen=True, slots=True)
class BatchStats:
    """One batch that was computed, and the line behind it."""

    texts: int
    tokens: int
    seconds: float
