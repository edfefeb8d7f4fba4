"""Runner: launches planned steps on the device, in order, and hands back what they drew.

Owns the device's row of last ids, by which a step takes its input from the step before it without the host in
between.  Knows no queue, no pool and no request's life.  G only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from vserve.engine.batch import BatchBuilder
from vserve.engine.sampler import sample, score
from vserve.engine.sequence import Plan, Results
from vserve.model.ops import KvCache, Step


class Decoder(Protocol):
    """The model, as far as a step needs it (vserve.model.decoder)."""

    @property
    def vocab_size(self) -> int:
        """V."""

    def forward(self, step: Step, cache: KvCache) -> Tensor:
        """Compute the step, writing keys and values; returns logits [S, V] float32 of step.logit_rows, S >= 0."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A launched step.  The host back end has its results at once; a device's would wait for its copy here."""

    results: Results

    def wait(self) -> Results:
        """What the step drew."""
        return self.results


class Runner:
    """Steps for max_num_seqs rows of sequences of at most max_model_len tokens, on the device of the cache."""

    def __init__(self, decoder: Decoder, cache: KvCache, *, max_num_seqs: int, max_model_len: int) -> None:
        device = cache.pairs[0].device
        self._decoder = decoder
        self._cache = cache
        self._builder = BatchBuilder(
            max_num_seqs=max_num_seqs,
            max_blocks=-(-max_model_len // cache.block_size),
            block_size=cache.block_size,
            vocab_size=decoder.vocab_size,
            device=device,
        )
        self._last_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Pending:
        """Start the step.  Plans come in the order they were made, each once.

        Raises what the decoder raises: a fault here is not one request's own.
        """
        batch = self._builder.build(plan)
        if batch.fed:
            batch.step.ids[batch.fed] = self._last_ids[batch.fed_rows]
        logits = self._decoder.forward(batch.step, self._cache)
        results = sample(logits[: len(batch.draws)], batch.draws)
        if batch.scores:
            results = replace(results, scores=score(logits[len(batch.draws) :], batch.scores))
        if batch.draws:
            self._last_ids[batch.draw_rows] = torch.tensor(results.ids, device=self._last_ids.device)
        return Pending(results)
