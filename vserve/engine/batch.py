"""Batch: a Plan as the tensors of one step.

Owns what is kept for each row between steps: the block table and the sampling state of the sequence in it.  Knows
where tokens go, not why; and how a draw is described, not how it is made.  G only.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vserve.engine.request import RequestId
from vserve.engine.sampler import Draw, RowState, Score
from vserve.engine.sequence import Plan, Sequence
from vserve.model.ops import Step

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step, ready to launch.

    step: see vserve.model.ops.  draws: one a logit row, in order.  draw_rows [S] int64: row of each draw, on the host.
    fed, fed_rows: places of step.ids, and the rows whose last id belongs there, where the host does not know the id.
    scores: prompt tokens whose log-probabilities are wanted; their logit rows come after those of the draws.
    """

    step: Step
    draws: list[Draw]
    draw_rows: list[int]
    fed: list[int]
    fed_rows: list[int]
    scores: list[Score]


class BatchBuilder:
    """Builds steps for rows 0 to max_num_seqs - 1, each with at most max_blocks blocks of block_size tokens.

    vocab_size: the width of the logits.
    """

    def __init__(
        self, *, max_num_seqs: int, max_blocks: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._device = device
        self._tables: NDArray[np.int32] = np.zeros((max_num_seqs, max_blocks), np.int32)
        self._filled = [0] * max_num_seqs
        # A preempted sequence comes back with other blocks, maybe in the same row: so many preemptions, so many owners.
        self._owners: list[tuple[RequestId, int] | None] = [None] * max_num_seqs
        self._states: list[RowState | None] = [None] * max_num_seqs

    def build(self, plan: Plan) -> Batch:
        """The tensors of plan on the device, and its draws.  Call it once a plan, in order, right after planning."""
        works = plan.works
        rows: list[int] = []
        ids: list[int] = []
        draws: list[Draw] = []
        draw_rows: list[int] = []
        draw_works: list[int] = []
        fed: list[int] = []
        fed_rows: list[int] = []
        longest = 1
        for place, (sequence, start, count, samples, from_row) in enumerate(works):
            row, blocks = self._enter(sequence)
            longest = max(longest, blocks)
            rows.append(row)
            if from_row:
                fed.append(len(ids))
                fed_rows.append(row)
                ids.append(0)
            elif count == 1:
                ids.append(sequence.tokens[start])
            else:
                ids += sequence.tokens[start : start + count]
            if samples:
                draws.append(Draw(self._states[row], start + count))
                draw_rows.append(row)
                draw_works.append(place)
        step = self._tensors(plan, ids, rows, draw_works, longest)
        scores = [
            Score(works[work].sequence.tokens[at], works[work].sequence.request.prompt_logprobs or 0)
            for work, places in plan.scorings
            for at in places
        ]
        return Batch(step, draws, draw_rows, fed, fed_rows, scores)

    def _enter(self, sequence: Sequence) -> tuple[int, int]:
        """Bring the row of the sequence up to date; returns the row and the number of its blocks."""
        row = sequence.row
        assert row is not None
        blocks = sequence.blocks
        owner = (sequence.id, sequence.preemptions)
        if self._owners[row] != owner:
            self._owners[row] = owner
            self._filled[row] = 0
            try:
                self._states[row] = RowState(sequence, self._vocab_size)
            except Exception:
                # One request's parameters must not end the step of the others; its draw reports the error.
                log.exception("sampling state failed for one request")
                self._states[row] = None
        filled = self._filled[row]
        if filled != len(blocks):
            self._tables[row, filled : len(blocks)] = blocks[filled:]
            self._filled[row] = len(blocks)
        return row, len(blocks)

    def _tensors(self, plan: Plan, ids: list[int], rows: list[int], draw_works: list[int], longest: int) -> Step:
        works, size, total = plan.works, self._block_size, plan.num_tokens
        starts = [work.start for work in works]
        counts = tuple([work.num_tokens for work in works])
        contexts = tuple([work.start + work.num_tokens for work in works])
        scored = [(work, at - 1) for work, places in plan.scorings for at in places]
        draws = len(draw_works) + len(scored)
        # Two packed buffers: on a GPU each is one copy, and splitting is one call however many fields there are.
        wide: NDArray[np.int64] = np.empty(3 * total + draws, np.int64)
        narrow: NDArray[np.int32] = np.zeros(2 * len(works) + 1 + len(works) * longest, np.int32)
        positions = wide[total : 2 * total]
        ends = narrow[1 : len(works) + 1]
        token_rows = np.array(rows)
        wide[:total] = ids
        np.cumsum(counts, out=ends)
        if total == len(works):
            positions[:] = starts
            from_rows = token_rows
        else:
            lengths = np.array(counts)
            positions[:] = np.arange(total) + np.repeat(np.array(starts) - ends + lengths, lengths)
            from_rows = np.repeat(token_rows, lengths)
        blocks, offsets = np.divmod(positions, size)
        # int64: block * size passes 2**31 on a cache of that many tokens
        wide[2 * total : 3 * total] = self._tables[from_rows, blocks].astype(np.int64) * size + offsets
        wide[3 * total : 3 * total + len(draw_works)] = ends[draw_works] - 1
        # The row of a token counts from the end of its work.
        wide[3 * total + len(draw_works) :] = [int(ends[work]) - contexts[work] + at for work, at in scored]
        narrow[len(works) + 1 : 2 * len(works) + 1] = contexts
        narrow[2 * len(works) + 1 :].reshape(len(works), longest)[:] = self._tables[rows, :longest]
        return self._step(wide, narrow, counts, contexts, draws)

    def _step(
        self,
        wide: NDArray[np.int64],
        narrow: NDArray[np.int32],
        counts: tuple[int, ...],
        contexts: tuple[int, ...],
        draws: int,
    ) -> Step:
        total, num = (len(wide) - draws) // 3, len(counts)
        token_ids, positions, slots, logit_rows = self._upload(torch.from_numpy(wide)).split_with_sizes(
            [total] * 3 + [draws]
        )
        query_starts, context_lens, tables = self._upload(torch.from_numpy(narrow)).split_with_sizes(
            [num + 1, num, len(narrow) - 2 * num - 1]
        )
        return Step(
            ids=token_ids,
            positions=positions,
            slots=slots,
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables=tables.view(num, -1),
            logit_rows=logit_rows,
            query_lens=counts,
            context_lens_host=contexts,
        )

    def _upload(self, tensor: Tensor) -> Tensor:
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)
