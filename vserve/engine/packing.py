"""Packing: a Plan as the few int32 words that a GPU step needs from the host.

Owns what the host remembers of each row of the device: whose it is and how much of its block table is there.  Most
steps decode the same sequences as the step before; for those it touches no sequence but the few that got a new block.
Knows no torch.  G only; plans come in the order they were made, each once.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vserve.engine.request import RequestId
from vserve.engine.sequence import Plan, Sequence, Work
from vserve.engine.shapes import ENTRY_WORDS, Layout, Shape

log = logging.getLogger(__name__)

Words = NDArray[np.int32]

_PARAMETERS: Final = struct.Struct("<ififfIIi")
_NOBODY: Final = -1


@dataclass(frozen=True, slots=True)
class Packed:
    """What was packed: the number of draws, and those that the step's own sampling cannot make alone.

    special: (place among the draws, sequence, its length before the draw).  broken: places of draws whose sequence has
    parameters that cannot be used.  overflow [n, 3] int32: table updates that found no room among the words; they must
    reach the device before the step.
    """

    draws: int
    special: list[tuple[int, Sequence, int]]
    broken: list[int]
    overflow: Words | None


class Packer:
    """Packs steps for rows 0 to max_num_seqs - 1.

    on_enter(sequence, row): called when a sequence takes a row, before the first step that names it is packed; True
    means that its draws are special.  What it raises makes the sequence's draws broken.
    """

    def __init__(self, *, max_num_seqs: int, block_size: int, on_enter: Callable[[Sequence, int], bool]) -> None:
        self._size = block_size
        self._on_enter = on_enter
        # A preempted sequence comes back with other blocks, maybe in the same row: so many preemptions, so many owners.
        self._owners: list[tuple[RequestId, int] | None] = [None] * max_num_seqs
        self._filled = [0] * max_num_seqs
        self._special: set[int] = set()
        self._broken: set[int] = set()
        # The decodes of the last step, if it had nothing else.
        self._members: list[Sequence] = []
        self._member_rows: Words = np.empty(0, np.int32)
        self._positions: Words = np.empty(0, np.int32)
        self._member_special: list[tuple[int, Sequence]] = []
        self._member_broken: list[int] = []

    def pack(self, plan: Plan, layout: Layout, words: Words) -> Packed:
        """Write plan to words [layout.words]; its shape has room for it."""
        if layout.shape.is_decode:
            return self._pack_decodes(plan.works, layout, words)
        self._members = []
        return self._pack_mixed(plan, layout, words)

    def _pack_decodes(self, works: list[Work], layout: Layout, words: Words) -> Packed:
        members = [work[0] for work in works]
        if members == self._members:
            # Each was in the last step and is again, so it is one token further.
            self._positions += 1
        else:
            self._note_members(works, members)
        num, size, positions = len(works), self._size, self._positions
        room = layout.shape.tokens
        words[:num] = self._member_rows
        words[num:room] = _NOBODY
        at = layout.fields["positions"].start
        words[at : at + num] = positions
        at = layout.fields["fresh"].start
        words[at : at + num] = _NOBODY
        for place in np.flatnonzero(positions % size == 0).tolist():
            words[at + place] = members[place].blocks[int(positions[place]) // size]
        special = [(place, one, int(positions[place]) + 1) for place, one in self._member_special]
        return Packed(num, special, self._member_broken, None)

    def _note_members(self, works: list[Work], members: list[Sequence]) -> None:
        self._members = members
        rows = [one.row for one in members]
        self._member_rows = np.array(rows, np.int32)
        self._positions = np.array([work[1] for work in works], np.int32)
        special, broken = self._special, self._broken
        self._member_special = [(i, members[i]) for i, row in enumerate(rows) if row in special] if special else []
        self._member_broken = [i for i, row in enumerate(rows) if row in broken] if broken else []

    def _pack_mixed(self, plan: Plan, layout: Layout, words: Words) -> Packed:
        fields = {name: words[span.start : span.end] for name, span in layout.fields.items()}
        for name in ("rows", "sequence_rows", "draw_rows", "updates", "entries"):
            fields[name].fill(_NOBODY)
        for name in ("lens", "draw_tokens"):
            fields[name].fill(0)
        fields["starts"].fill(plan.num_tokens)
        decodes = plan.num_decodes
        updates: list[int] = []
        entries: list[bytes] = []
        draws = self._pack_running(plan.works[:decodes], fields, updates)
        at = decodes
        for place, work in enumerate(plan.works[decodes:], layout.shape.decodes):
            sequence, start, count, samples, _ = work
            row = self._enter(sequence, start + count, updates, entries)
            end = at + count
            fields["token_ids"][at:end] = sequence.tokens[start : start + count]
            fields["positions"][at:end] = np.arange(start, start + count)
            fields["rows"][at:end] = row
            fields["sequence_rows"][place] = row
            fields["lens"][place] = start + count
            fields["starts"][place] = at
            if samples:
                fields["draw_tokens"][len(draws)] = end - 1
                fields["draw_rows"][len(draws)] = row
                draws.append((sequence, start + count))
            at = end
        fields["entries"][: ENTRY_WORDS * len(entries)] = np.frombuffer(b"".join(entries), np.int32)
        most = len(fields["updates"])
        fields["updates"][: min(most, len(updates))] = updates[:most]
        overflow = np.array(updates[most:], np.int32).reshape(-1, 3) if len(updates) > most else None
        special = [(i, one, length) for i, (one, length) in enumerate(draws) if one.row in self._special]
        broken = [i for i, (one, _) in enumerate(draws) if one.row in self._broken]
        return Packed(len(draws), special, broken, overflow)

    def _pack_running(
        self, works: list[Work], fields: dict[str, Words], updates: list[int]
    ) -> list[tuple[Sequence, int]]:
        """The decodes of a mixed step: its first tokens, sequences and draws.  Returns (sequence, length) of each."""
        num, size = len(works), self._size
        rows = np.array([work[0].row for work in works], np.int32)
        positions = np.array([work[1] for work in works], np.int32)
        fields["token_ids"][:num] = _NOBODY
        fields["positions"][:num] = positions
        fields["rows"][:num] = rows
        fields["sequence_rows"][:num] = rows
        fields["lens"][:num] = positions + 1
        fields["draw_tokens"][:num] = np.arange(num)
        fields["draw_rows"][:num] = rows
        for place in np.flatnonzero(positions % size == 0).tolist():
            column = int(positions[place]) // size
            updates += (int(rows[place]), column, works[place][0].blocks[column])
        return [(work[0], work[1] + 1) for work in works]

    def _enter(self, sequence: Sequence, length: int, updates: list[int], entries: list[bytes]) -> int:
        """Bring the row of the sequence up to date for its first length tokens; returns the row."""
        row, size = sequence.row, self._size
        assert row is not None
        owner = (sequence.id, sequence.preemptions)
        if self._owners[row] != owner:
            self._owners[row] = owner
            self._filled[row] = 0
            self._special.discard(row)
            self._broken.discard(row)
            try:
                entries.append(parameters(sequence, row))
                if self._on_enter(sequence, row):
                    self._special.add(row)
            except Exception:
                # One request's parameters must not end the step of the others; its draws report the error.
                log.exception("sampling state failed for one request")
                self._broken.add(row)
        needed = -(-length // size)
        for column in range(self._filled[row], needed):
            updates += (row, column, sequence.blocks[column])
        self._filled[row] = max(self._filled[row], needed)
        return row


def parameters(sequence: Sequence, row: int) -> bytes:
    """The words of a row's sampling parameters (vserve.kernels.rows).  struct.error where one does not fit."""
    params = sequence.request.sampling
    seed = sequence.seed & 0xFFFFFFFFFFFFFFFF
    return _PARAMETERS.pack(
        row,
        params.temperature,
        min(params.top_k, 0x7FFFFFFF),
        params.top_p,
        params.min_p,
        seed & 0xFFFFFFFF,
        seed >> 32,
        sequence.prompt_length,
    )


def fits(plan: Plan, shape: Shape) -> bool:
    """True where shape has room for plan."""
    chunks = len(plan.works) - plan.num_decodes
    if shape.is_decode:
        return not chunks and plan.num_decodes <= shape.decodes
    return plan.num_decodes <= shape.decodes and chunks <= shape.chunks and plan.num_tokens <= shape.tokens
