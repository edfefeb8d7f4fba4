"""Places: which live sequences wait and which run, and the blocks and rows of those that run.

Owns the waiting line, the running list and the page pool; decides nothing.  Pure.  G only.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from vserve.engine.limits import Limits
from vserve.engine.pages import PagePool
from vserve.engine.sequence import Cause, Sequence, State


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


class Places:
    """Where every live sequence is.

    waiting, running: sorted by (priority, arrival).  waiting_tokens: prompt tokens of the waiting line.  prefilling:
    running sequences whose prompt is not planned whole.  leaving: ended or preempted, but a step in flight still names
    them.  rows: the free ones.  preemptions: how many there were.
    """

    def __init__(self, limits: Limits) -> None:
        self.pool = PagePool(limits.num_blocks)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.leaving: set[Sequence] = set()
        self.rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self.waiting_tokens = 0
        self.prefilling = 0
        self.preemptions = 0

    def queue(self, sequence: Sequence) -> None:
        """Put a WAITING sequence into the line, at its priority and arrival."""
        insort(self.waiting, sequence, key=_order)
        self.waiting_tokens += sequence.prompt_length

    def admit(self, place: int, blocks: list[int], named: int, planned: int) -> None:
        """Let the sequence at that place of the waiting line run, with these blocks.

        named: how many of them the prefix cache knows; planned: the tokens they hold.
        """
        sequence = self.waiting.pop(place)
        self.waiting_tokens -= sequence.prompt_length
        sequence.blocks = blocks
        sequence.named = named
        sequence.planned = planned
        sequence.row = self.rows.pop()
        insort(self.running, sequence, key=_order)
        sequence.move(Cause.ADMITTED)
        self.prefilling += 1

    def unlist(self, sequence: Sequence) -> None:
        """Take a sequence out of the line or the running ones, before its state changes; it keeps blocks and row."""
        line = self.waiting if sequence.state is State.WAITING else self.running
        del line[bisect_left(line, sequence.order, key=_order)]
        if sequence.state is State.WAITING:
            self.waiting_tokens -= sequence.prompt_length
        elif sequence.state is State.PREFILL:
            self.prefilling -= 1

    def preempt(self, victim: Sequence, now_s: float) -> None:
        """Send a running sequence back to the waiting line, to be computed again from its first token."""
        self.unlist(victim)
        victim.move(Cause.PREEMPTED)
        victim.planned = 0
        victim.preemptions += 1
        if victim.history is not None:
            victim.history.preempted(now_s)
        self.preemptions += 1
        self.queue(victim)
        self.part(victim)

    def part(self, sequence: Sequence) -> None:
        """Let go of blocks and row, once no step in flight names them (point 3 in scheduler.py)."""
        if sequence.in_flight:
            self.leaving.add(sequence)
        else:
            self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take its blocks and row back."""
        self.pool.give_back(reversed(sequence.blocks))
        sequence.blocks = []
        sequence.named = 0
        if sequence.row is not None:
            self.rows.append(sequence.row)
            sequence.row = None
