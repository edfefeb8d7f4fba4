"""Scheduler: which tokens of which sequences the next step computes, and what a finished step means.

Pure: no clock, no thread, no tensor; time is passed in.  Owns every live sequence, the waiting line and the page pool.
Continuous batching with chunked prefill: each step takes all decodes, then prompt chunks, first come first served
within a priority.  When blocks run out the latest, least urgent sequence goes back to the waiting line and is
recomputed later, prompt and generated tokens alike; its client sees a pause, no gap and no repetition.

Two steps in flight.  ``plan`` may be called again before the last plan was committed, on these terms:

1. A sequence's next token is planned while the draw before it is in flight.  Its id is not known here, so the work
   says ``from_row``: the device reads it from the row where it keeps the last id of each live sequence.
2. A stop id is therefore seen one step late.  The token drawn after it is spare: ``commit`` drops it, since its
   sequence is FINISHED by then.  Ends that need no id (max_tokens) are foreseen, and nothing spare is planned.
3. Blocks and row of a sequence that has ended or was preempted stay its own until the last plan that names it is
   committed: the spare step's keys and values go where nobody else reads.
4. Plans are committed in the order they were made, and steps run in that order on the device.  So a block may be
   shared through the prefix cache as soon as the step that fills it is planned and its tokens are known.
"""

from __future__ import annotations

import secrets
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vserve.engine.pages import PagePool
from vserve.engine.prefix import PrefixCache
from vserve.engine.request import Emit, EngineStats, FinishReason, GenRequest, RequestId, Timing, TokenLogprobs
from vserve.engine.sequence import Cause, Plan, Results, Scoring, Sequence, State, Work

MAX_SCORED_TOKENS = 128
"""Rows of logits that scoring prompts adds to a step: 25 MB at a vocabulary of 49,152, 66 MB at 128,256."""


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


class _Room(NamedTuple):
    """Prompt tokens that a step may take: for one prompt alone, and in all once it takes several."""

    first: int
    further: int


LEAST_CHUNK = 128
"""Prompt tokens that a step of one of mixed_sizes has room for."""
BACKLOG = 2048
"""A step that decodes takes the next larger size for every so many prompt tokens that wait."""


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _fresh_seed() -> int:
    return secrets.randbits(64)


class Scheduler:
    """All live sequences and their next step.  G only.  draw_seed: seeds for requests that bring none."""

    def __init__(self, limits: Limits, draw_seed: Callable[[], int] = _fresh_seed) -> None:
        self.limits = limits
        self.pool = PagePool(limits.num_blocks)
        self._prefix = PrefixCache(self.pool, limits.block_size, enabled=limits.prefix_caching)
        self._draw_seed = draw_seed
        self._prefill_target = limits.prefill_target or limits.max_num_batched_tokens
        self._live: dict[RequestId, Sequence] = {}
        self._waiting: list[Sequence] = []  # both lists are sorted by (priority, arrival)
        self._running: list[Sequence] = []
        self._rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._leaving: set[Sequence] = set()  # ended or preempted, but a step in flight still names them
        self._scorings: list[Scoring] = []  # of the plan that is being made
        self._score_room = 0
        self._prefilling = 0
        self._waiting_tokens = 0
        self._arrivals = 0
        self._planned = 0  # steps planned; they are committed in that order, so each is that number's step
        self._now_s = 0.0  # of the plan that is being made
        self._next_deadline_s: float | None = None
        self._steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._preemptions = 0
        self._aborted = 0
        self._finished = 0

    @property
    def live(self) -> int:
        """Sequences that have been added and have not ended."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Sequences in the waiting line, preempted ones included."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the waiting line."""
        return self._waiting_tokens

    def stats(self, busy_s: float = 0.0) -> EngineStats:
        """The gauges and counters as of now; prefix queries and hits count prompt tokens of first admissions."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            free_blocks=self.pool.free,
            cached_blocks=self.pool.cached,
            total_blocks=self.pool.total,
            steps_total=self._steps,
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated_tokens,
            prefix_queries_total=self._prefix_queries,
            prefix_hits_total=self._prefix_hits,
            preemptions_total=self._preemptions,
            aborted_total=self._aborted,
            finished_total=self._finished,
            busy_s_total=busy_s,
        )

    # ---- in and out -------------------------------------------------------------------------------------------

    def add(self, request: GenRequest, now_s: float) -> Emit | None:
        """Put the request in the waiting line.

        A request that could never run is not queued: the Emit that ends it, with the numbers, is returned.  ValueError
        when the id is live already.
        """
        if request.id in self._live:
            raise ValueError(f"request id {request.id} is live already")
        problem = self._problem(request)
        if problem is not None:
            self._finished += 1
            timing = Timing(request.arrival_s, now_s, now_s, now_s)
            return Emit(id=request.id, finish=FinishReason.ERROR, timing=timing, error=problem)
        seed = request.sampling.seed
        self._arrivals += 1
        sequence = Sequence(request, self._arrivals, self._draw_seed() if seed is None else seed)
        self._live[request.id] = sequence
        self._queue(sequence)
        deadline = request.deadline_s
        if deadline is not None and (self._next_deadline_s is None or deadline < self._next_deadline_s):
            self._next_deadline_s = deadline
        return None

    def _problem(self, request: GenRequest) -> str | None:
        prompt, limits = request.prompt, self.limits
        only_scores = request.max_tokens == 0 and request.prompt_logprobs is not None
        if not prompt or (request.max_tokens < 1 and not only_scores):
            return "A request needs at least one prompt token and one token to generate."
        wanted, most = len(prompt) + request.max_tokens, limits.max_sequence_tokens
        if only_scores:  # the place that max_sequence_tokens adds is that of a token that is drawn
            most = min(most, limits.num_blocks * limits.block_size)
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
            if limits.vocab_size is not None and ids and not 0 <= min(ids) <= max(ids) < limits.vocab_size:
                return f"The prompt has a token id outside the vocabulary of {limits.vocab_size}."
        return None

    def cancel(self, request_id: RequestId, reason: FinishReason, now_s: float) -> Emit | None:
        """End a sequence in whatever state it is; an unknown or ended id is ignored and gives None."""
        sequence = self._live.get(request_id)
        return None if sequence is None else self._end(sequence, reason, now_s)

    def cancel_all(self, error: str, now_s: float) -> list[Emit]:
        """End every live sequence with error."""
        return [self._end(sequence, FinishReason.ERROR, now_s, error) for sequence in list(self._live.values())]

    def expire(self, now_s: float) -> list[Emit]:
        """End every sequence whose deadline has passed, waiting ones too.  O(1) until the next deadline comes."""
        if self._next_deadline_s is None or now_s < self._next_deadline_s:
            return []
        timed = [sequence for sequence in self._live.values() if sequence.deadline_s is not None]
        late = [sequence for sequence in timed if sequence.deadline_s is not None and sequence.deadline_s <= now_s]
        emits = [self._end(sequence, FinishReason.TIMEOUT, now_s) for sequence in late]
        self._next_deadline_s = min(
            (one.deadline_s for one in timed if one.deadline_s is not None and one.deadline_s > now_s), default=None
        )
        return emits

    # ---- planning ---------------------------------------------------------------------------------------------

    def plan(self, now_s: float) -> Plan | None:
        """The next step, or None when there is nothing to compute until a plan in flight is committed."""
        works: list[Work] = []
        full: dict[bytes, int] = {}  # key -> block that this step completes
        self._scorings, self._score_room = [], self.limits.max_scored_tokens
        self._now_s = now_s
        self._plan_decodes(works, full)
        decodes = len(works)
        room, spent = self._room(decodes), 0
        if self._prefilling:
            for sequence in self._running:
                allowance = room.further if spent else room.first
                if spent < allowance and sequence.state is State.PREFILL:
                    spent += self._plan_chunk(sequence, allowance - spent, works, full)
        if self._waiting:
            spent = self._admit(room, spent, works, full, now_s)
        self._prefix.name(full)
        if not works:
            return None
        self._planned += 1
        return Plan(works, decodes, decodes + spent, self._scorings)

    def _room(self, decodes: int) -> _Room:
        """Prompt tokens for a step of so many decodes."""
        limits, target = self.limits, self._prefill_target
        left = limits.max_num_batched_tokens - decodes
        if not decodes:
            return _Room(left, min(left, target))
        allowance = min(left, limits.max_prefill_chunk)
        sizes = limits.mixed_sizes
        if sizes:
            place = bisect_left(sizes, decodes + LEAST_CHUNK) + self._waiting_tokens // BACKLOG
            place = min(place, len(sizes) - 1)
            while place and sizes[place] - decodes > allowance:
                place -= 1
            # Less than the bounds allow, so that the step is one of those sizes: the next tokens would cost the most.
            allowance = min(allowance, max(sizes[place] - decodes, LEAST_CHUNK))
        return _Room(allowance, allowance)

    def _plan_decodes(self, works: list[Work], full: dict[bytes, int]) -> None:
        block_size, running, decode = self.limits.block_size, self._running, State.DECODE
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
        while not self.pool.available:
            if self._leaving:
                return False  # blocks come back at the next commit; preempting more would only waste work
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.take(1)
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
            self._prefilling -= 1
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

    def _admit(self, room: _Room, spent: int, works: list[Work], full: dict[bytes, int], now_s: float) -> int:
        """Move waiting sequences to running, in order, while tokens, rows and blocks last.

        spent: prompt tokens of the step so far; returns what they are afterwards.
        """
        limits, pool, waiting = self.limits, self.pool, self._waiting
        most = min(limits.max_num_seqs, limits.max_num_batched_tokens)  # so that every decode fits a step
        place = 0
        # Rows limit how far deferred sequences are looked past, too: the scan stays short however long the line is.
        while place < min(len(waiting), limits.max_num_seqs):
            allowance = room.further if spent else room.first
            if spent >= allowance:
                break
            sequence = waiting[place]
            if not self._rows or len(self._running) >= most or sequence.in_flight:
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
            reserve = len(self._running) - self._prefilling
            if missing + revived + reserve > pool.available:
                break
            del waiting[place]
            self._waiting_tokens -= sequence.prompt_length
            pool.share(found)
            sequence.blocks = found + pool.take(missing)
            sequence.named = len(found)
            sequence.planned = len(found) * limits.block_size
            sequence.row = self._rows.pop()
            self._note_admission(sequence, now_s)
            insort(self._running, sequence, key=_order)
            sequence.move(Cause.ADMITTED)
            self._prefilling += 1
            spent += self._plan_chunk(sequence, allowance - spent, works, full)
        return spent

    def _find(self, sequence: Sequence) -> list[int]:
        """Cached blocks to begin with: none of a token from which the next one's score is still to come."""
        found = self._prefix.find(sequence)
        if sequence.scored < sequence.prompt_length:
            del found[(sequence.scored - 1) // self.limits.block_size :]
        return found

    def _note_admission(self, sequence: Sequence, now_s: float) -> None:
        if sequence.cached_tokens is None:
            sequence.scheduled_s = now_s
            # Of a continued answer more than the prompt may be found.
            sequence.cached_tokens = min(sequence.planned, sequence.prompt_length)
            self._prefix_queries += sequence.prompt_length
            self._prefix_hits += sequence.cached_tokens

    # ---- results ----------------------------------------------------------------------------------------------

    def commit(self, plan: Plan, results: Results, now_s: float) -> list[Emit]:
        """Take what the oldest uncommitted plan drew; at most one Emit a sequence, none for those that had ended."""
        emits: list[Emit] = []
        ids, logprobs, errors = results.ids, results.logprobs, results.errors
        finished, draw = State.FINISHED, 0
        if plan.scorings:
            emits += self._take_scores(plan, results, now_s)
        for sequence, _, _, samples, _ in plan.works:
            sequence.in_flight -= 1
            if samples:
                sequence.pending -= 1
                if sequence.state is not finished:
                    if errors and draw in errors:
                        emits.append(self._end(sequence, FinishReason.ERROR, now_s, errors[draw], spoiled=True))
                    else:
                        emits.append(self._accept(sequence, ids[draw], logprobs.get(draw) if logprobs else None, now_s))
                draw += 1
            if not sequence.in_flight and self._leaving and sequence in self._leaving:
                self._leaving.discard(sequence)
                self._release(sequence)
        self._steps += 1
        return emits

    def _take_scores(self, plan: Plan, results: Results, now_s: float) -> list[Emit]:
        """Put the step's log-probabilities of prompts aside; returns the ends of those that have none."""
        emits: list[Emit] = []
        at = 0
        for scoring in plan.scorings:
            sequence = plan.works[scoring.work].sequence
            scores = results.scores[at : at + len(scoring.places)]
            at += len(scoring.places)
            if sequence.state is State.FINISHED:
                continue
            known = [score for score in scores if score is not None]
            if len(known) < len(scoring.places):
                message = "The model produced invalid numbers for this request."
                emits.append(self._end(sequence, FinishReason.ERROR, now_s, message, spoiled=True))
            elif sequence.scores is not None:
                sequence.scores += known
        return emits

    def _accept(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, now_s: float) -> Emit:
        emit = self._accepted(sequence, token, logprobs, now_s)
        if sequence.scores is not None:
            emit = emit._replace(prompt_logprobs=tuple(sequence.scores))
            sequence.scores = None
        return emit

    def _accepted(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, now_s: float) -> Emit:
        if not sequence.request.max_tokens:
            self._prompt_tokens += sequence.prompt_length
            return self._end(sequence, FinishReason.LENGTH, now_s)
        sequence.tokens.append(token)
        self._generated_tokens += 1
        timing: Timing | None = None
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
            self._prompt_tokens += sequence.prompt_length
            timing = sequence.timing(now_s)
        entry = None if logprobs is None else (logprobs,)
        if token in sequence.stop_ids:
            return self._end(sequence, FinishReason.STOP, now_s, ids=(token,), stop_id=token, logprobs=entry)
        if len(sequence.tokens) >= sequence.max_length:
            return self._end(sequence, FinishReason.LENGTH, now_s, ids=(token,), logprobs=entry)
        return Emit(sequence.id, (token,), None, None, entry, sequence.cached_tokens or 0, timing)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now_s: float,
        error: str | None = None,
        *,
        ids: tuple[int, ...] = (),
        stop_id: int | None = None,
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        spoiled: bool = False,
    ) -> Emit:
        """Finish a live sequence: its blocks and row come back now, or when the last step in flight is committed."""
        if spoiled:  # nobody else may share what it computed
            self.pool.forget(sequence.blocks)
        elif sequence.blocks:
            full: dict[bytes, int] = {}
            self._prefix.note_full(sequence, full)
            self._prefix.name(full)
        del self._live[sequence.id]
        self._unlist(sequence)
        sequence.move(Cause.ENDED)
        sequence.finish = reason
        self._part(sequence)
        self._finished += 1
        self._aborted += reason is FinishReason.CANCELLED
        return Emit(
            id=sequence.id,
            ids=ids,
            finish=reason,
            stop_id=stop_id,
            logprobs=logprobs,
            cached_tokens=sequence.cached_tokens or 0,
            timing=sequence.timing(now_s),
            error=error,
        )

    # ---- places -----------------------------------------------------------------------------------------------

    def _queue(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_order)
        self._waiting_tokens += sequence.prompt_length

    def _unlist(self, sequence: Sequence) -> None:
        line = self._waiting if sequence.state is State.WAITING else self._running
        del line[bisect_left(line, sequence.order, key=_order)]
        if sequence.state is State.WAITING:
            self._waiting_tokens -= sequence.prompt_length
        elif sequence.state is State.PREFILL:
            self._prefilling -= 1

    def _preempt(self, victim: Sequence) -> None:
        """Send a running sequence back to the waiting line, to be computed again from its first token."""
        self._unlist(victim)
        victim.move(Cause.PREEMPTED)
        victim.planned = 0
        victim.preemptions += 1
        if victim.history is not None:
            victim.history.preempted(self._now_s)
        self._preemptions += 1
        self._queue(victim)
        self._part(victim)

    def _part(self, sequence: Sequence) -> None:
        """Let go of blocks and row, once no step in flight names them (point 3 above)."""
        if sequence.in_flight:
            self._leaving.add(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(reversed(sequence.blocks))
        sequence.blocks = []
        sequence.named = 0
        if sequence.row is not None:
            self._rows.append(sequence.row)
            sequence.row = None
