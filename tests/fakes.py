"""Fakes of our own for tests: a model whose every answer depends on every token before it, and devices that run it.

The model is a hash: the scores of the next token are a function of all context ids and their places, so one wrong
page, slot, id or order anywhere changes the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vserve.engine.request import GenRequest
from vserve.engine.sequence import Plan, Results
from vserve.model.ops import KvCache, Step

VOCAB = 48
"""Ids of the fake model: 0 to 47."""
_PRIME = 65521


def context_hash(tokens: Iterable[int]) -> int:
    """A number that depends on every id and its place."""
    value = 1
    for place, token in enumerate(tokens):
        value = (value + (token + 1) * ((place + 3) * 7919 % 32749)) % _PRIME
    return value


def fake_logits(tokens: Iterable[int]) -> list[float]:
    """VOCAB scores in [0, 8) of the token that follows."""
    value = context_hash(tokens)
    return [((value + 17) * (token * 7919 + 10473)) % _PRIME / 8192.0 for token in range(VOCAB)]


def greedy(tokens: Iterable[int], banned: frozenset[int] = frozenset()) -> int:
    """The most likely next token that is not banned; the lowest id of a tie."""
    scores = fake_logits(tokens)
    return max((token for token in range(VOCAB) if token not in banned), key=lambda token: (scores[token], -token))


def solo(request: GenRequest) -> list[int]:
    """What the request generates greedily when it has the fake model to itself."""
    tokens = list(request.prompt)
    generated: list[int] = []
    while len(generated) < request.max_tokens:
        banned = request.stop_ids if len(generated) < request.min_tokens else frozenset[int]()
        generated.append(greedy(tokens + generated, banned))
        if generated[-1] in request.stop_ids:
            break
    return generated


class FakeDevice:
    """Runs plans greedily on pages that are Python lists, with a row of last ids: no torch, no sampler.

    A plan runs when it is launched, in order, as a device stream would; its Results may be committed later.
    """

    def __init__(self, num_blocks: int, block_size: int, rows: int) -> None:
        self._size = block_size
        self._pages: list[list[tuple[int, int] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._last: list[int | None] = [None] * rows

    def launch(self, plan: Plan) -> Results:
        """Compute the plan.  AssertionError when a page that is read does not hold what the sequence wrote."""
        for sequence, start, count, _, from_row in plan.works:
            for place in range(start, start + count):
                token = self._last[sequence.row or 0] if from_row else sequence.tokens[place]
                assert token is not None
                self._pages[sequence.blocks[place // self._size]][place % self._size] = (place, token)
        ids = []
        for sequence, start, count, samples, _ in plan.works:
            if not samples:
                continue
            context = []
            for place in range(start + count):
                entry = self._pages[sequence.blocks[place // self._size]][place % self._size]
                assert entry is not None, f"page of place {place} was never written"
                assert entry[0] == place, f"page of place {place} was overwritten"
                context.append(entry[1])
            request = sequence.request
            early = start + count - len(request.prompt) < request.min_tokens
            ids.append(greedy(context, request.stop_ids if early else frozenset()))
            assert sequence.row is not None
            self._last[sequence.row] = ids[-1]
        return Results(ids)


class FakeModel:
    """A decoder of the fake model on real paged tensors.

    poison: a context with this id gives a row of NaN.  explode: a step with this id raises RuntimeError.
    """

    def __init__(self, poison: int | None = None, explode: int | None = None) -> None:
        self._poison = poison
        self._explode = explode
        self.steps: list[tuple[int, ...]] = []

    @property
    def vocab_size(self) -> int:
        return VOCAB

    def new_cache(self, num_blocks: int, block_size: int) -> KvCache:
        """One layer, one head of width one: a token's key is its id, its value its place."""
        return KvCache((torch.full((num_blocks, block_size, 2, 1, 1), -1.0),), block_size, num_blocks)

    def forward(self, step: Step, cache: KvCache) -> Tensor:
        """Write ids and places to the slots, read each context back through its block table."""
        ids = step.ids.tolist()
        self.steps.append(step.query_lens)
        if self._explode is not None and self._explode in ids:
            raise RuntimeError("the fake model exploded")
        pages = cache.pairs[0].view(-1, 2)
        pages[step.slots] = torch.stack((step.ids, step.positions), 1).float()
        starts = step.query_starts.tolist()
        assert starts == [0, *np.cumsum(step.query_lens).tolist()]
        assert step.context_lens.tolist() == list(step.context_lens_host)
        rows = []
        for row in step.logit_rows.tolist():
            owner = int(np.searchsorted(starts, row, side="right")) - 1
            length = step.context_lens_host[owner] - (starts[owner + 1] - 1 - row)
            slots = step.block_tables[owner].long()[:, None] * cache.block_size + torch.arange(cache.block_size)
            entries = pages[slots.view(-1)[:length]]
            assert entries[:, 1].tolist() == list(range(length)), "a page does not hold what the sequence wrote"
            context = [int(token) for token in entries[:, 0].tolist()]
            poisoned = self._poison is not None and self._poison in context
            rows.append([float("nan")] * VOCAB if poisoned else fake_logits(context))
        return torch.tensor(rows, dtype=torch.float32).view(len(rows), VOCAB)


@dataclass
class ManualClock:
    """A clock that moves only when told to."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def prefix_of(part: Sequence[int], whole: Sequence[int]) -> bool:
    """True when whole begins with part."""
    return list(whole[: len(part)]) == list(part)
