"""Sampler: one row of logits and one request's parameters -> the next id.

The host back end, on numpy.  A draw depends on its own row alone: on its logits, its parameters, its seed, its place
in the sequence and the tokens before it; never on the batch, the clock or an earlier draw of another row.

Order of the filters: logit_bias and what may not be drawn, then the penalties; at temperature 0 the largest wins; else
divide by the temperature, keep top_k, of these min_p, of these top_p (each measured on what the one before kept), and
draw by inverting the cumulative distribution in the order of token ids.  A tie at the edge of a filter is kept whole.
Nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751, 3.1.  min_p: Nguyen et al. 2024, arXiv:2407.01082.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vserve.engine.constraint import DrawMask, is_masked, unpack
from vserve.engine.request import RequestFault, SamplingParams, TokenLogprobs
from vserve.engine.sequence import Results, Sequence
from vserve.errors import BadRequest

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

NOTHING_LEFT = "What the request allows (grammar, token ids, words, bias) leaves no token to draw."
GREEDY_BELOW = 1e-5
"""A temperature under this is 0: dividing by it would only overflow."""
_REACHES = (4.0, 12.0)
"""How far below the largest score top_p looks for its set before it sorts the whole vocabulary."""
_SPAN = 256
"""Width of the first level of the cumulative distribution over a whole vocabulary."""
_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """64 bits to 64 bits, each output bit depending on every input bit: the finaliser of SplitMix64.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, counter: int) -> float:
    """A number in [0, 1) that is a function of seed and counter alone: draw number counter of that seed."""
    key = mix((seed + 0x9E3779B97F4A7C15) & _MASK)
    return float(mix((key + (counter + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53


class SeenTokens:
    """Distinct ids of a sequence so far, and how often each was generated; for the penalties."""

    def __init__(self, prompt: Items[int], generated: Items[int]) -> None:
        self._place = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._size = len(self._place)
        self._ids: Ints = np.empty(max(16, 2 * self._size), np.int64)
        self._ids[: self._size] = list(self._place)
        self._counts: Floats = np.zeros(len(self._ids), np.float32)
        for token in generated:
            self.add(token)

    def add(self, token: int) -> None:
        """Count one generated token."""
        place = self._place.get(token)
        if place is None:
            place = self._size
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._place[token] = place
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1.0

    def penalise(self, logits: Floats, params: SamplingParams) -> None:
        """Change logits [V] in place: repetition over prompt and answer, presence and frequency over the answer."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        scores = logits[ids]
        if params.repetition_penalty != 1.0:
            penalty = np.float32(params.repetition_penalty)
            scores = np.where(scores > 0, scores / penalty, scores * penalty)
        if params.frequency_penalty != 0.0:
            scores -= np.float32(params.frequency_penalty) * counts
        if params.presence_penalty != 0.0:
            scores -= np.float32(params.presence_penalty) * (counts > 0)
        logits[ids] = scores


class RowState:
    """What the sampler keeps for the sequence in one row, from admission to the row's next owner."""

    __slots__ = (
        "bias",
        "bias_ids",
        "first_free",
        "greedy",
        "mask",
        "params",
        "prompt_length",
        "seed",
        "seen",
        "stop_ids",
    )

    def __init__(self, sequence: Sequence, vocab_size: int) -> None:
        """All ids of sequence.tokens are known: no draw of it is in flight."""
        request = sequence.request
        params = self.params = request.sampling
        self.seed = sequence.seed
        self.prompt_length = sequence.prompt_length
        self.greedy = params.temperature < GREEDY_BELOW
        # Length of the sequence from which its stop ids may be drawn.
        self.first_free = sequence.prompt_length + request.min_tokens if request.stop_ids else 0
        self.stop_ids: Ints = np.array(sorted(request.stop_ids), np.int64)
        self.bias_ids: Ints = np.array([token for token, _ in params.logit_bias], np.int64)
        self.bias: Floats = np.array([bias for _, bias in params.logit_bias], np.float32)
        self.mask = DrawMask(sequence, vocab_size) if is_masked(request) else None
        self.seen: SeenTokens | None = None
        if params.has_penalties:
            prompt, generated = sequence.tokens[: self.prompt_length], sequence.tokens[self.prompt_length :]
            self.seen = SeenTokens(prompt, generated)

    def changes_logits(self, length: int) -> bool:
        """True where the draw after length tokens is not made from the model's logits as they are."""
        return self.seen is not None or self.mask is not None or length < self.first_free or bool(self.bias_ids.size)


class Draw(NamedTuple):
    """One draw to make: the next token of a sequence that is length tokens long.  state None: it could not be made."""

    state: RowState | None
    length: int


class CannotDraw(Exception):
    """This row has no distribution to draw from, through no fault of its request."""


def sample(logits: Tensor, draws: list[Draw]) -> Results:
    """Draw one id for each row.

    logits [S, V] float32, read only; draws: S of them.  A row that fails, by its logits or by a fault in here, gets
    an error in the Results and harms no other.  The penalties' counts of each row are brought up to date.
    """
    if not draws:
        return Results([])
    rows: Floats = logits.detach().cpu().numpy()
    ids: list[int] = rows.argmax(axis=1).tolist()  # numpy's argmax finds the first NaN, if there is one
    logprobs: dict[int, TokenLogprobs] = {}
    errors: dict[int, str] = {}
    for place, (state, length) in enumerate(draws):
        row = rows[place]
        try:
            if state is None:
                raise CannotDraw("The sampling parameters of this request cannot be used.")
            # The largest is finite only if no entry is NaN or +inf and not all are -inf.
            if not math.isfinite(row[ids[place]]):
                raise CannotDraw("The model produced invalid numbers for this request.")
            if not state.greedy or state.changes_logits(length):
                ids[place] = draw(row, state, length)
            if state.seen is not None:
                state.seen.add(ids[place])
            if state.params.logprobs is not None:
                logprobs[place] = token_logprobs(row, ids[place], state.params.logprobs)
        except BadRequest as error:
            errors[place] = RequestFault(error.message)
        except CannotDraw as error:
            errors[place] = str(error)
        except Exception:
            log.exception("sampling failed for one request")
            errors[place] = "Sampling failed for this request."
    return Results(ids, logprobs, errors)


def draw(row: Floats, state: RowState, length: int) -> int:
    """The next id of a sequence of length tokens, from its logits row [V] (read only, its largest entry finite)."""
    params = state.params
    if state.changes_logits(length):
        row = row.copy()
        if state.bias_ids.size:
            np.add.at(row, state.bias_ids, state.bias)
        if state.mask is not None:  # min_tokens is part of it
            row[~unpack(state.mask.bits(length), row.size)] = -np.inf
        elif length < state.first_free:
            row[state.stop_ids] = -np.inf
        if state.seen is not None:
            state.seen.penalise(row, params)
        if not math.isfinite(row.max()):
            raise BadRequest(NOTHING_LEFT)
    if state.greedy:
        return int(row.argmax())
    scores = (row - row.max()) / np.float32(params.temperature)
    counter = length - state.prompt_length
    return pick(scores, keep_from(scores, params.top_k, params.top_p, params.min_p), uniform(state.seed, counter))


def keep_from(scores: Floats, top_k: int, top_p: float, min_p: float) -> float:
    """The lowest score that survives the filters; -inf when all do.

    scores [V] float32, largest 0, read only: logits over temperature.  top_k 0, top_p 1 and min_p 0 are off.
    """
    edge = -math.inf
    if 0 < top_k < scores.size:
        edge = float(np.partition(scores, scores.size - top_k)[scores.size - top_k])
    if min_p > 0.0:
        edge = max(edge, math.log(min_p))
    if top_p < 1.0:
        edge = max(edge, _nucleus(scores, top_p, edge))
    return edge


def _nucleus(scores: Floats, top_p: float, edge: float) -> float:
    """The lowest score of the smallest set that has top_p of the mass of all scores >= edge."""
    if edge > -math.inf:
        best = _descending(scores[scores >= edge])
        return _edge_of_mass(best, top_p, None)
    whole = float(np.exp(scores).sum())
    for reach in _REACHES:  # the set is mostly a few tokens near the top: sort those first
        best = _descending(scores[scores >= -reach])
        found = _edge_of_mass(best, top_p, whole)
        if found > -math.inf:
            return found
    return _edge_of_mass(_descending(scores), top_p, None)


def _descending(scores: Floats) -> Floats:
    return np.sort(scores)[::-1]


def _edge_of_mass(best: Floats, top_p: float, whole: float | None) -> float:
    """The score at which the mass of best (descending) passes top_p of whole (None: of its own); -inf if never."""
    mass = np.cumsum(np.exp(best), dtype=np.float64)
    place = int(np.searchsorted(mass, top_p * (mass[-1] if whole is None else whole)))
    if place < best.size:
        return float(best[place])
    return float(best[-1]) if whole is None else -math.inf


def pick(scores: Floats, edge: float, chance: float) -> int:
    """The id at which the cumulative distribution over scores >= edge, in id order, passes chance in [0, 1)."""
    if edge > -math.inf:
        ids = np.flatnonzero(scores >= edge)
        return int(ids[_invert(np.exp(scores[ids]), chance)])
    weights = np.exp(scores)
    # Two levels: adding up 256 at a time is fast, and only one span needs its running sum.
    whole = weights.size // _SPAN * _SPAN
    spans = np.append(weights[:whole].reshape(-1, _SPAN).sum(axis=1), weights[whole:].sum()).astype(np.float64)
    running = np.cumsum(spans)
    target = chance * running[-1]
    span = min(int(np.searchsorted(running, target, side="right")), int(np.flatnonzero(spans)[-1]))
    inside = (target - (running[span - 1] if span else 0.0)) / spans[span]
    return span * _SPAN + _invert(weights[span * _SPAN : (span + 1) * _SPAN], inside)


def _invert(weights: Floats, chance: float) -> int:
    """The first place whose running sum passes chance times the whole; never a place without weight."""
    running = np.cumsum(weights, dtype=np.float64)
    place = int(np.searchsorted(running, chance * running[-1], side="right"))
    return place if place < weights.size else int(np.flatnonzero(weights)[-1])


class Score(NamedTuple):
    """A prompt token whose log-probability is wanted, and how many of the most likely ones beside it."""

    token: int
    top: int


def score(logits: Tensor, scores: list[Score]) -> list[TokenLogprobs | None]:
    """Log-probabilities of prompt tokens, each from its row of logits [P, V] float32; None where those are invalid."""
    rows: Floats = logits.detach().cpu().numpy()
    return [
        token_logprobs(row, one.token, one.top) if math.isfinite(row.max()) else None
        for row, one in zip(rows, scores, strict=True)
    ]


def token_logprobs(row: Floats, token: int, top: int) -> TokenLogprobs:
    """Log-probability and rank of token under the model's own distribution, and the top most likely ids.

    row [V] float32: logits as the model gave them.  Rank 1 is the most likely; ties share the better rank.
    """
    largest = float(row.max())
    norm = largest + math.log(np.exp(row - np.float32(largest)).sum(dtype=np.float64))
    score = row[token]
    pairs: tuple[tuple[int, float], ...] = ()
    if top > 0:
        top = min(top, row.size)
        edge = np.partition(row, row.size - top)[row.size - top]
        above = np.flatnonzero(row > edge)  # fewer than top; ties at the edge fill up, lowest id first
        best = np.concatenate((above, np.flatnonzero(row == edge)[: top - above.size]))
        best = best[np.lexsort((best, -row[best]))]
        pairs = tuple((int(place), float(row[place]) - norm) for place in best)
    return TokenLogprobs(float(score) - norm, int(np.count_nonzero(row > score)) + 1, pairs)
