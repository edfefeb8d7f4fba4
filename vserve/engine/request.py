"""What crosses between the event loop (L) and the engine thread (G): requests in, emitted tokens out.

Plain values only: no torch, no asyncio, no JSON.  Everything is immutable once it has been handed over.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NewType, Protocol

RequestId = NewType("RequestId", int)
"""Made by the server, unique in the process, never taken from a client."""


class FinishReason(enum.Enum):
    """Why a sequence ended; the value is what OpenAI's finish_reason says, where it has a word."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "abort"
    ERROR = "error"
    TIMEOUT = "timeout"


class Constraint(Protocol):
    """What one answer must follow.  Made on L, used on G alone from submission on; it keeps its own place."""

    def mask(self, generated: Sequence[int]) -> bytes:
        """Which ids may be drawn next: bit i % 8 of byte i // 8 for id i; ids beyond the mask may not.

        generated: all ids of the answer so far; a call sees those of the call before and what has come since.  Raises
        BadRequest where nothing can be said: that ends this one sequence.
        """

    def afresh(self) -> Constraint:
        """The same for another answer, from its start."""


class RequestFault(str):
    """The text of an error that is the request's own fault, for its client to read."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn.  All values are checked before this is built; the engine trusts them.

    temperature >= 0 (0 is greedy); top_k >= 0 (0 is off); top_p in (0, 1]; min_p in [0, 1];
    repetition_penalty > 0; presence and frequency in [-2, 2]; logit_bias pairs (token id, bias in [-100, 100]);
    seed None draws a fresh one; logprobs None is off, 0 the drawn token's only, k >= 1 also the k most likely.
    allowed_ids None: any token, else only these, sorted and not empty.  bad_words: sequences of ids, none empty, whose
    last id is not drawn where the answer's ids before it are the others.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    allowed_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def has_penalties(self) -> bool:
        """True where the counts of earlier tokens change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class GenRequest:
    """One sequence to generate: one prompt, one choice.  Made on L, read on G; no field changes after submit.

    prompt: token ids, non-empty, each in [0, vocabulary).  len(prompt) + max_tokens <= the context length.
    max_tokens >= 1, or 0 where only prompt_logprobs are wanted; 0 <= min_tokens <= max_tokens: no id of stop_ids can be
    drawn before min_tokens tokens, unless a constraint leaves nothing else.
    continued: tokens of the answer that were drawn before, fewer than max_tokens; the answer goes on behind them.
    They are computed again, never emitted, and count as drawn in every respect: places of seeded draws, penalties,
    min_tokens, max_tokens, the constraint.
    constraint: what the answer must follow, or None.  prompt_logprobs: None is off, k >= 0 reports the prompt's tokens
    and the k most likely at each place.
    stop_ids: ids that end the sequence (the end-of-text ids are in it unless ignore_eos was asked for).
    cache_salt: blocks of the prefix cache are shared only among requests of the same salt.
    priority: lower is served earlier; equal ones by arrival.  arrival_s, deadline_s: time.monotonic() seconds.
    traced: its chunks and preemptions are noted in its last Timing.
    """

    id: RequestId
    prompt: Sequence[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    cache_salt: bytes = b""
    priority: int = 0
    arrival_s: float = 0.0
    deadline_s: float | None = None
    continued: Sequence[int] = ()
    constraint: Constraint | None = None
    prompt_logprobs: int | None = None
    traced: bool = False

    def behind(self, drawn: Sequence[int], id: RequestId, arrival_s: float) -> GenRequest:
        """This request again, to go on behind the tokens drawn so far.  The prompt's scores came with the first."""
        return replace(
            self,
            id=id,
            arrival_s=arrival_s,
            continued=drawn,
            constraint=None if self.constraint is None else self.constraint.afresh(),
            prompt_logprobs=None if drawn else self.prompt_logprobs,
        )

    @property
    def needs_ids(self) -> bool:
        """True where what may be drawn depends on the id drawn before."""
        return self.constraint is not None or any(len(word) > 1 for word in self.sampling.bad_words)


@dataclass(frozen=True, slots=True)
class Cancel:
    """L tells G that nobody waits for this sequence any more; unknown and finished ids are ignored."""

    id: RequestId
    reason: FinishReason = FinishReason.CANCELLED


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log) of one drawn token under the raw model distribution.

    rank >= 1: place of the token among all; top: the most likely (token id, logprob) pairs, best first.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


Chunk = tuple[int, float, int, int]
"""Prompt tokens that one step took: its number, when it was planned, the first token's place, how many.

A plain tuple: a traced step makes one a chunk.
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """time.monotonic() seconds of a sequence's life, for Server-Timing, histograms and traces.

    chunks, preempted_s: where the request is traced; the first of them, with chunks_left_out the number of the others.
    """

    arrival_s: float
    scheduled_s: float
    first_token_s: float
    finished_s: float
    preemptions: int = 0
    chunks: tuple[Chunk, ...] = ()
    chunks_left_out: int = 0
    preempted_s: tuple[float, ...] = ()


class Emit(NamedTuple):
    """What one sequence produced since its last Emit.  A named tuple: a step makes one a sequence, at half the cost.

    ids: new token ids in order; empty only together with finish.  stop_id: set when finish is STOP and the last of
    ids is that stop id (it counts as a generated token; its text is not shown).  logprobs: one a token of ids, or
    None.  cached_tokens: prompt tokens found in the prefix cache.  timing: with the finish, and with the
    first token (whose time is then the end, too).  error accompanies finish; one that is a RequestFault is the
    client's.
    prompt_logprobs: with the first ids (or the finish), where they were asked for: one a prompt token but the first.
    """

    id: RequestId
    ids: tuple[int, ...] = ()
    finish: FinishReason | None = None
    stop_id: int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cached_tokens: int = 0
    timing: Timing | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine as of one step; gauges but for the names in _total, which only grow."""

    running: int = 0
    waiting: int = 0
    swapped: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    steps_total: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0
    preemptions_total: int = 0
    aborted_total: int = 0
    finished_total: int = 0
    busy_s_total: float = 0.0

    @property
    def cache_usage(self) -> float:
        """Share of blocks held by live sequences, in [0, 1]; cached-but-free blocks count as free."""
        held = self.total_blocks - self.free_blocks - self.cached_blocks
        return held / self.total_blocks if self.total_blocks else 0.0
