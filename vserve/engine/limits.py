"""Limits: what the scheduler works within, and what follows from the numbers alone.

Pure: knows requests, no sequence and no state.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from vserve.engine.request import GenRequest

MAX_SCORED_TOKENS = 128
"""Rows of logits that scoring prompts adds to a step: 25 MB at a vocabulary of 49,152, 66 MB at 128,256."""

LEAST_CHUNK = 128
"""Prompt tokens that a step of one of mixed_sizes has room for."""
BACKLOG = 2048
"""A step that decodes takes the next larger size for every so many prompt tokens that wait."""


class Room(NamedTuple):
    """Prompt tokens that a step may take: for one prompt alone, and in all once it takes several."""

    first: int
    further: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler works within; every number is at least 1.

    max_num_seqs: sequences that hold blocks at once, and the number of rows.  max_num_batched_tokens: tokens of one
    step.  max_prefill_chunk: prompt tokens of a step that also decodes, so that decodes never wait long; a step
    without decodes takes whole prompts.  prefill_target: where tokens of one step cost less up to so many and the same
    beyond (a GPU): a step that does not decode takes one prompt, and others only up to so many.  None: as many as may
    be.  mixed_sizes: tokens, decodes included, of steps that cost little for their size, ascending.  A step that
    decodes fills the smallest that leaves LEAST_CHUNK for prompts, and a larger one only while many wait; empty: it
    takes max_prefill_chunk.
    max_model_len: prompt and answer together.  vocab_size: when given, a prompt id outside it is refused here,
    whatever the caller checked.  max_scored_tokens: prompt tokens of a step whose log-probabilities are worked out;
    each takes a row of logits.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_prefill_chunk: int = 256
    prefill_target: int | None = None
    mixed_sizes: tuple[int, ...] = ()
    prefix_caching: bool = True
    vocab_size: int | None = None
    max_scored_tokens: int = MAX_SCORED_TOKENS

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "max_prefill_chunk",
            "max_scored_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt + max_tokens that is accepted: the context length, or what all blocks together hold."""
        # The last drawn token is never computed, so it needs no place.
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)

    def problem(self, request: GenRequest) -> str | None:
        """Why the request could never run, with the numbers; None when it can."""
        prompt = request.prompt
        only_scores = request.max_tokens == 0 and request.prompt_logprobs is not None
        if not prompt or (request.max_tokens < 1 and not only_scores):
            return "A request needs at least one prompt token and one token to generate."
        wanted, most = len(prompt) + request.max_tokens, self.max_sequence_tokens
        if only_scores:  # the place that max_sequence_tokens adds is that of a token that is drawn
            most = min(most, self.num_blocks * self.block_size)
        if wanted > most:
            return (
                f"The prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}; "
                f"together they may be at most {most}."
            )
        drawn = request.continued
        if drawn and len(drawn) >= request.max_tokens:
            return (
                f"{len(drawn)} tokens are drawn already and max_tokens is {request.max_tokens}: none is left to draw."
            )
        for ids in (prompt, drawn):
            if self.vocab_size is not None and ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                return f"The prompt has a token id outside the vocabulary of {self.vocab_size}."
        return None

    def room(self, decodes: int, waiting_tokens: int) -> Room:
        """Prompt tokens for a step of so many decodes, while so many prompt tokens wait."""
        left = self.max_num_batched_tokens - decodes
        if not decodes:
            return Room(left, min(left, self.prefill_target or left))
        allowance = min(left, self.max_prefill_chunk)
        sizes = self.mixed_sizes
        if sizes:
            place = bisect_left(sizes, decodes + LEAST_CHUNK) + waiting_tokens // BACKLOG
            place = min(place, len(sizes) - 1)
            while place and sizes[place] - decodes > allowance:
                place -= 1
            # Less than the bounds allow, so that the step is one of those sizes: the next tokens would cost the most.
            allowance = min(allowance, max(sizes[place] - decodes, LEAST_CHUNK))
        return Room(allowance, allowance)
