"""Special draws on a GPU: those with penalties, biases, ids that may not be drawn, or log-probabilities to report.

A step draws all its tokens by temperature and filters alone; the few that need more are drawn again here, behind it on
the same stream, from the same logits.  Owns the tables that these draws need and the counts of the tokens that
penalised sequences have generated.  Masks are made on the host, while the device computes the step they belong to.
G only; nothing here waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vserve.engine.constraint import DrawMask, is_masked
from vserve.engine.request import RequestFault, TokenLogprobs
from vserve.engine.sampler import NOTHING_LEFT
from vserve.engine.sequence import Sequence
from vserve.errors import BadRequest
from vserve.kernels import sampling
from vserve.kernels.rows import Inputs, Rows

log = logging.getLogger(__name__)

CANNOT_DRAW: Final = RequestFault(NOTHING_LEFT)
_FIRST_PLACES: Final = 8
_FIRST_WIDTH: Final = 16


def is_special(sequence: Sequence) -> bool:
    """True where some draw of the sequence needs more than temperature and filters."""
    request, params = sequence.request, sequence.request.sampling
    return (
        params.has_penalties
        or bool(params.logit_bias)
        or params.logprobs is not None
        or bool(request.min_tokens and request.stop_ids)
        or is_masked(request)
    )


@dataclass(frozen=True, slots=True)
class Answers:
    """Log-probabilities on their way to the host: of special draws, in their order.

    draws: places among the step's draws; tops: how many likely tokens each asked for (None: no log-probabilities).
    scores [K] float32, ranks [K] int32, top_ids [K, N] int64, top_scores [K, N] float32, pinned.
    """

    draws: list[int]
    tops: list[int | None]
    scores: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_scores: Tensor

    def read(self) -> dict[int, TokenLogprobs]:
        """By place among the step's draws; only once the step's event has come."""
        found: dict[int, TokenLogprobs] = {}
        rows = zip(self.draws, self.tops, self.scores.tolist(), self.ranks.tolist(), strict=True)
        for place, (draw, top, score, rank) in enumerate(rows):
            if top is None:
                continue
            ids, scores = self.top_ids[place, :top].tolist(), self.top_scores[place, :top].tolist()
            best = sorted(zip(ids, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))
            found[draw] = TokenLogprobs(score, rank, tuple(best))
        return found


def answers_for(draws: list[int], tops: list[int | None], raw: Tensor, ids: Tensor) -> Answers:
    """What is asked for of ids [K] int64, drawn or read from raw [K, V] float32: on its way to the host."""
    scores, ranks = sampling.token_logprobs(raw, ids.clamp(min=0))
    most = min(max(top or 0 for top in tops), raw.shape[1])
    best, best_ids = raw.topk(most, dim=1)
    best = best - raw.logsumexp(1, keepdim=True)
    return Answers(draws, tops, _fetch(scores), _fetch(ranks), _fetch(best_ids), _fetch(best))


class SpecialDraws:
    """The tables of special rows, by place; a row keeps its place until another sequence takes the row."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab = vocab_size
        self._device = device
        self._places: dict[int, int] = {}  # row -> place
        self._free = list(range(_FIRST_PLACES - 1, -1, -1))
        self._masks: dict[int, DrawMask] = {}  # row -> what may be drawn there, where not everything may
        self._counts: Tensor | None = None  # [places, V] int32, made when the first penalty comes
        self._make(_FIRST_PLACES, _FIRST_WIDTH, _FIRST_WIDTH)

    def enter(self, sequence: Sequence, row: int) -> bool:
        """A sequence takes a row; True if its draws are special.  ValueError for a token outside the vocabulary."""
        self._masks.pop(row, None)
        place = self._places.pop(row, None)
        if place is not None:
            self._free.append(place)
        if not is_special(sequence):
            return False
        request, params = sequence.request, sequence.request.sampling
        if any(not 0 <= token < self._vocab for token, _ in params.logit_bias):
            raise ValueError("logit_bias names a token outside the vocabulary")
        bias = dict(params.logit_bias)
        banned = sorted(token for token in request.stop_ids if 0 <= token < self._vocab)
        if is_masked(request):
            self._masks[row] = DrawMask(sequence, self._vocab)
            banned = []  # the mask sees to it
        self._reserve(len(bias), len(banned))
        place = self._free.pop()
        self._places[row] = place
        self._set(self._bias_ids[place], list(bias), -1)
        self._set(self._biases[place], list(bias.values()), 0.0)
        self._set(self._banned[place], banned, -1)
        self._free_from[place] = sequence.prompt_length + request.min_tokens if banned else 0
        self._repetition[place] = params.repetition_penalty
        self._presence[place] = params.presence_penalty
        self._frequency[place] = params.frequency_penalty
        if params.has_penalties:
            self._count(sequence, place)
        return True

    def _count(self, sequence: Sequence, place: int) -> None:
        counts = np.zeros(self._vocab, np.int32)
        np.add.at(counts, np.array(sequence.tokens[sequence.prompt_length :], np.int64), 2)
        counts[np.array(sequence.tokens[: sequence.prompt_length], np.int64)] |= 1
        if self._counts is None:
            self._counts = torch.zeros((len(self._free_from), self._vocab), dtype=torch.int32, device=self._device)
        self._counts[place].copy_(torch.from_numpy(counts))

    def _set(self, row: Tensor, values: Items[float], filling: float) -> None:
        row.fill_(filling)
        row[: len(values)] = torch.tensor(values, dtype=row.dtype)

    def _make(self, places: int, biases: int, banned: int) -> None:
        device = self._device
        self._bias_ids = torch.full((places, biases), -1, dtype=torch.int32, device=device)
        self._biases = torch.zeros((places, biases), dtype=torch.float32, device=device)
        self._banned = torch.full((places, banned), -1, dtype=torch.int32, device=device)
        self._free_from = torch.zeros(places, dtype=torch.int64, device=device)
        self._repetition = torch.ones(places, dtype=torch.float32, device=device)
        self._presence = torch.zeros(places, dtype=torch.float32, device=device)
        self._frequency = torch.zeros(places, dtype=torch.float32, device=device)

    def _reserve(self, biases: int, banned: int) -> None:
        """Room for one more place, of so many biases and banned ids."""
        places, num_biases, num_banned = len(self._free_from), self._bias_ids.shape[1], self._banned.shape[1]
        more = places if self._free else 2 * places
        wider = _power(max(num_biases, biases)), _power(max(num_banned, banned))
        if (more, *wider) == (places, num_biases, num_banned):
            return
        old = self._tables()
        self._make(more, *wider)
        for before, after in zip(old, self._tables(), strict=True):
            after[tuple(slice(size) for size in before.shape)] = before
        self._free += range(more - 1, places - 1, -1)
        if self._counts is not None and more > places:
            counts = torch.zeros((more, self._vocab), dtype=torch.int32, device=self._device)
            counts[:places] = self._counts
            self._counts = counts

    def _tables(self) -> tuple[Tensor, ...]:
        return (
            self._bias_ids,
            self._biases,
            self._banned,
            self._free_from,
            self._repetition,
            self._presence,
            self._frequency,
        )

    def draw(
        self, special: Items[tuple[int, Sequence, int]], logits: Tensor, inputs: Inputs, rows: Rows, drawn: Tensor
    ) -> Answers | None:
        """Draw these again: (place among the draws, sequence, its length before the draw).

        logits [S, V] float32: as the model gave them, read only.  inputs: the step's.  Changes drawn [S] and the rows'
        last ids.  Returns what is asked for beside the ids, None if nothing is.
        """
        draws = [draw for draw, _, _ in special]
        params = [sequence.request.sampling for _, sequence, _ in special]
        places = [self._places[_row(sequence)] for _, sequence, _ in special]
        penalised = [place if one.has_penalties else -1 for place, one in zip(places, params, strict=True)]
        numbers = [draws, places, penalised, [length for _, _, length in special], [_row(one) for _, one, _ in special]]
        at, state, counted, lengths, step_rows = self._upload(numbers)
        raw = logits.index_select(0, at)
        changed = raw.clone()
        sampling.bias_and_ban(changed, state, lengths, self._bias_ids, self._biases, self._banned, self._free_from)
        masks = self._bits(special)
        if masks is not None:
            changed.masked_fill_(masks, float("-inf"))
        if self._counts is not None:
            sampling.penalise(changed, counted, self._counts, self._repetition, self._presence, self._frequency)
        ids = sampling.sample(
            changed,
            inputs.temperature.index_select(0, at),
            inputs.top_k.index_select(0, at),
            inputs.top_p.index_select(0, at),
            inputs.min_p.index_select(0, at),
            inputs.seeds.index_select(0, at),
            inputs.counters.index_select(0, at),
        )
        drawn.index_copy_(0, at, ids)
        rows.last_ids.index_copy_(0, step_rows, ids.clamp(min=0))
        if self._counts is not None:
            sampling.count_tokens(self._counts, counted, ids)
        tops = [one.logprobs for one in params]
        if all(top is None for top in tops):
            return None
        return answers_for(draws, tops, raw, ids)

    def _bits(self, special: Items[tuple[int, Sequence, int]]) -> Tensor | None:
        """Where these draws may not go, [K, V] bool on the device; None if they may go anywhere."""
        if not any(_row(sequence) in self._masks for _, sequence, _ in special):
            return None
        packed = np.full((len(special), -(-self._vocab // 8)), 255, np.uint8)
        for place, (_, sequence, length) in enumerate(special):
            mask = self._masks.get(_row(sequence))
            if mask is not None:
                try:
                    packed[place] = mask.bits(length)
                except BadRequest:  # with nothing to draw, the request ends
                    packed[place] = 0
                except Exception:
                    log.exception("a constraint failed for one request")
                    packed[place] = 0
        bits = torch.from_numpy(packed)
        if self._device.type != "cpu":
            bits = bits.pin_memory().to(self._device, non_blocking=True)
        places = torch.arange(8, dtype=torch.uint8, device=self._device)
        return ((bits[:, :, None] >> places) & 1).view(len(special), -1)[:, : self._vocab] == 0

    def _upload(self, numbers: list[list[int]]) -> tuple[Tensor, ...]:
        packed = torch.tensor(numbers, dtype=torch.int64)
        if self._device.type != "cpu":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        return packed.unbind(0)


def _fetch(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    # The allocator of pinned memory keeps it until the copy has been made.
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _row(sequence: Sequence) -> int:
    assert sequence.row is not None
    return sequence.row


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
