"""One sequence's life on the engine thread, and the values that speak of a step: Work, Plan, Results.

Owns the state table and the arithmetic of what is known, planned and still under way.  Knows no pool, no queue, no
tensor.  G only.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

from vserve.engine.request import Chunk, FinishReason, GenRequest, RequestId, Timing, TokenLogprobs

MOST_CHUNKS = 256
"""Chunks and preemptions of one sequence that a trace keeps: the first."""


class State(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


class Cause(enum.Enum):
    """What moves it on."""

    ADMITTED = "admitted"
    PROMPT_DONE = "prompt done"
    PREEMPTED = "preempted"
    ENDED = "ended"


_NEXT = {
    (State.WAITING, Cause.ADMITTED): State.PREFILL,
    (State.WAITING, Cause.ENDED): State.FINISHED,
    (State.PREFILL, Cause.PROMPT_DONE): State.DECODE,
    (State.PREFILL, Cause.PREEMPTED): State.WAITING,
    (State.PREFILL, Cause.ENDED): State.FINISHED,
    (State.DECODE, Cause.PREEMPTED): State.WAITING,
    (State.DECODE, Cause.ENDED): State.FINISHED,
}


class History:
    """What a traced sequence has been through: its first chunks and preemptions."""

    __slots__ = ("chunks", "left_out", "preempted_s")

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.left_out = 0
        self.preempted_s: list[float] = []

    def chunk(self, step: int, at_s: float, start: int, tokens: int) -> None:
        """A step took so many tokens from start on."""
        if len(self.chunks) < MOST_CHUNKS:
            self.chunks.append((step, at_s, start, tokens))
        else:
            self.left_out += 1

    def preempted(self, at_s: float) -> None:
        """It lost its blocks."""
        if len(self.preempted_s) < MOST_CHUNKS:
            self.preempted_s.append(at_s)


class Sequence:
    """A request on its way.  The scheduler alone changes it; batch and sampler read it while they build a step.

    tokens: the prompt and every generated id the host knows.  planned: how many of the sequence's tokens have their
    keys and values computed by steps planned so far (done or in flight).  pending: draws of steps in flight, whose
    ids the host does not know yet.  in_flight: steps in flight that touch this sequence's blocks.
    blocks: blocks held, in order.  keys: prefix keys of its full blocks, as far as they were computed.  named: how
    many of its blocks the prefix cache knows.  row: its place in [0, max_num_seqs) while it holds blocks.
    needs_ids: its next draw is planned only once the one before it is known.  scored: how many prompt tokens had
    their log-probabilities planned, the first one included, which has none; the whole prompt where none are wanted.
    scores: those that have come; None where none are wanted, or once they were handed on.
    history: None where the request is not traced.
    """

    __slots__ = (
        "blocks",
        "cached_tokens",
        "deadline_s",
        "finish",
        "first_token_s",
        "history",
        "id",
        "in_flight",
        "keys",
        "max_length",
        "named",
        "needs_ids",
        "order",
        "pending",
        "planned",
        "preemptions",
        "prompt_length",
        "request",
        "row",
        "scheduled_s",
        "scored",
        "scores",
        "seed",
        "state",
        "stop_ids",
        "tokens",
    )

    def __init__(self, request: GenRequest, arrival: int, seed: int) -> None:
        self.request = request
        self.id: RequestId = request.id
        self.order = (request.priority, arrival)
        self.seed = seed
        self.stop_ids = request.stop_ids
        self.needs_ids = request.needs_ids
        self.deadline_s = request.deadline_s
        self.prompt_length = len(request.prompt)
        self.tokens = [*request.prompt, *request.continued]
        self.max_length = self.prompt_length + request.max_tokens
        self.scored = self.prompt_length if request.prompt_logprobs is None else 1
        self.scores: list[TokenLogprobs] | None = None if request.prompt_logprobs is None else []
        self.state = State.WAITING
        self.finish: FinishReason | None = None
        self.planned = 0
        self.pending = 0
        self.in_flight = 0
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.named = 0
        self.row: int | None = None
        self.cached_tokens: int | None = None  # None until it was first admitted
        self.preemptions = 0
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.history = History() if request.traced else None

    def timing(self, now_s: float) -> Timing:
        """Its times; a phase that was never reached has the time of now."""
        scheduled_s = now_s if self.scheduled_s is None else self.scheduled_s
        first_s = now_s if self.first_token_s is None else self.first_token_s
        arrival_s, history = self.request.arrival_s, self.history
        if history is None:
            return Timing(arrival_s, scheduled_s, first_s, now_s, self.preemptions)
        chunks, preempted_s = tuple(history.chunks), tuple(history.preempted_s)
        return Timing(arrival_s, scheduled_s, first_s, now_s, self.preemptions, chunks, history.left_out, preempted_s)

    def move(self, cause: Cause) -> None:
        """Follow the table; KeyError is a bug in the scheduler."""
        self.state = _NEXT[self.state, cause]

    @property
    def length(self) -> int:
        """Tokens that exist: known ones and draws under way."""
        return len(self.tokens) + self.pending

    @property
    def generated(self) -> int:
        """Generated tokens that the host knows."""
        return len(self.tokens) - self.prompt_length


class Work(NamedTuple):
    """What one step does for one sequence.  A named tuple: a step makes one a row, and a frozen dataclass costs 3x.

    Tokens start to start + num_tokens of the sequence are computed.  samples: the last of them is the newest token, so
    the next one is drawn.  from_row: the one token to compute was drawn by the step before, which is still in flight:
    its id is read from the device's row of last ids.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    from_row: bool


class Scoring(NamedTuple):
    """Places of a sequence's prompt tokens whose log-probabilities are wanted, each from the token before it.

    work: which of the plan's works computes those tokens before.
    """

    work: int
    places: range


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: num_decodes works of one token each, then prefill chunks.  num_tokens: all of them together."""

    works: list[Work]
    num_decodes: int
    num_tokens: int
    scorings: Items[Scoring] = ()


@dataclass(frozen=True, slots=True)
class Results:
    """What a step drew: ids, one a sampling work in plan order.

    logprobs and errors are sparse, by index into ids.  An id with an error is meaningless: its sequence ends.
    scores: of the prompt tokens that the plan wants scored, in its order; None where there are no valid numbers.
    """

    ids: list[int]
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)
    scores: Items[TokenLogprobs | None] = ()
