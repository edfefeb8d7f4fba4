"""Planner: which tokens of which sequences the next step computes.

Owns the order of a step and what is true while one is made; what a finished step means is the scheduler's, where the
terms of two steps in flight stand.  Pure.  G only.
"""

from __future__ import annotations

from vserve.engine.limits import Limits, Room
from vserve.engine.places import Places
from vserve.engine.prefix import PrefixCache
from vserve.engine.sequence import Cause, Plan, Scoring, Sequence, State, Work


class Planner:
    """Makes plans of what is in places.  prefix_queries, prefix_hits: prompt tokens of first admissions."""

    def __init__(self, limits: Limits, places: Places, prefix: PrefixCache) -> None:
        self._limits = limits
        self._places = places
        self._prefix = prefix
        self._scorings: list[Scoring] = []  # of the plan that is being made
        self._score_room = 0
        self._planned = 0  # steps planned; they are committed in that order, so each is that number's step
        self._now_s = 0.0  # of the plan that is being made
        self.prefix_queries = 0
        self.prefix_hits = 0

    def plan(self, now_s: float) -> Plan | None:
        """The next step, or None when there is nothing to compute until a plan in flight is committed."""
        works: list[Work] = []
        full: dict[bytes, int] = {}  # key -> block that this step completes
        self._scorings, self._score_room = [], self._limits.max_scored_tokens
        self._now_s = now_s
        self._plan_decodes(works, full)
        decodes = len(works)
        room, spent = self._limits.room(decodes, self._places.waiting_tokens), 0
        if self._places.prefilling:
            for sequence in self._places.running:
                allowance = room.further if spent else room.first
                if spent < allowance and sequence.state is State.PREFILL:
                    spent += self._plan_chunk(sequence, allowance - spent, works, full)
        if self._places.waiting:
            spent = self._admit(room, spent, works, full, now_s)
        self._prefix.name(full)
        if not works:
            return None
        self._planned += 1
        return Plan(works, decodes, decodes + spent, self._scorings)

    def _plan_decodes(self, works: list[Work], full: dict[bytes, int]) -> None:
        block_size, running, decode = self._limits.block_size, self._places.running, State.DECODE
        place = 0
        while place < len(running):  # preemption shortens the list from its end while this loop runs
            sequence = running[place]
            place += 1
            if sequence.state is not decode:
                continue
            known = len(sequence.tokens)
            if known + sequence.pending >= sequence.max_length:
                continue  # its last token is under way
            if sequence.needs_ids and sequence.pending:
                continue  # what may follow depends on a token that is under way
            start = sequence.planned
            if start == len(sequence.blocks) * block_size and not self._grow(sequence):
                continue
            works.append(Work(sequence, start, 1, True, start >= known))
            sequence.planned = start + 1
            sequence.pending += 1
            sequence.in_flight += 1
            if min(start + 1, known) >= (sequence.named + 1) * block_size:
                self._prefix.note_full(sequence, full)

    def _grow(self, sequence: Sequence) -> bool:
        """Give the running sequence one more block, taking it from later ones if need be; False: not in this step."""
        places = self._places
        while not places.pool.available:
            if places.leaving:
                return False  # blocks come back at the next commit; preempting more would only waste work
            victim = places.running[-1]
            places.preempt(victim, self._now_s)
            if victim is sequence:
                return False
        sequence.blocks += places.pool.take(1)
        return True

    def _plan_chunk(self, sequence: Sequence, allowance: int, works: list[Work], full: dict[bytes, int]) -> int:
        """Plan up to allowance tokens of a PREFILL sequence; returns how many."""
        start, end = sequence.planned, len(sequence.tokens)
        count = min(allowance, end - start)
        if sequence.scored < sequence.prompt_length:
            count = self._score(sequence, start, count, len(works))
            if not count:
                return 0
        samples = start + count == end
        works.append(Work(sequence, start, count, samples, False))
        sequence.planned = start + count
        sequence.in_flight += 1
        if sequence.history is not None:
            sequence.history.chunk(self._planned + 1, self._now_s, start, count)
        if samples:
            sequence.pending += 1
            sequence.move(Cause.PROMPT_DONE)
            self._places.prefilling -= 1
        self._prefix.note_full(sequence, full)
        return count

    def _score(self, sequence: Sequence, start: int, count: int, work: int) -> int:
        """Note what a chunk of up to count tokens scores; returns how many tokens this step has room to score."""
        first = max(sequence.scored, start + 1)  # a token's score comes from the one before it
        count = min(count, first - start - 1 + self._score_room)
        places = range(first, min(start + count + 1, sequence.prompt_length))
        if places:
            self._scorings.append(Scoring(work, places))
            self._score_room -= len(places)
            sequence.scored = places.stop
        return count

    def _admit(self, room: Room, spent: int, works: list[Work], full: dict[bytes, int], now_s: float) -> int:
        """Move waiting sequences to running, in order, while tokens, rows and blocks last.

        spent: prompt tokens of the step so far; returns what they are afterwards.
        """
        limits, places = self._limits, self._places
        pool, waiting, running = places.pool, places.waiting, places.running
        most = min(limits.max_num_seqs, limits.max_num_batched_tokens)  # so that every decode fits a step
        place = 0
        # Rows limit how far deferred sequences are looked past, too: the scan stays short however long the line is.
        while place < min(len(waiting), limits.max_num_seqs):
            allowance = room.further if spent else room.first
            if spent >= allowance:
                break
            sequence = waiting[place]
            if not places.rows or len(running) >= most or sequence.in_flight:
                break
            found = self._find(sequence)
            if (
                sequence.scored == sequence.prompt_length
                and len(found) < len(sequence.keys)
                and sequence.keys[len(found)] in full
            ):
                # This very step computes the block it needs next: one step later it is there to share.
                place += 1
                continue
            missing = -(-len(sequence.tokens) // limits.block_size) - len(found)
            revived = sum(not pool.is_held(block) for block in found)
            # One block for each decode that may soon need it: without them the newcomer would be preempted at once.
            reserve = len(running) - places.prefilling
            if missing + revived + reserve > pool.available:
                break
            pool.share(found)
            places.admit(place, found + pool.take(missing), len(found), len(found) * limits.block_size)
            self._note_admission(sequence, now_s)
            spent += self._plan_chunk(sequence, allowance - spent, works, full)
        return spent

    def _find(self, sequence: Sequence) -> list[int]:
        """Cached blocks to begin with: none of a token from which the next one's score is still to come."""
        found = self._prefix.find(sequence)
        if sequence.scored < sequence.prompt_length:
            del found[(sequence.scored - 1) // self._limits.block_size :]
        return found

    def _note_admission(self, sequence: Sequence, now_s: float) -> None:
        if sequence.cached_tokens is None:
            sequence.scheduled_s = now_s
            # Of a continued answer more than the prompt may be found.
            sequence.cached_tokens = min(sequence.planned, sequence.prompt_length)
            self.prefix_queries += sequence.prompt_length
            self.prefix_hits += sequence.cached_tokens
