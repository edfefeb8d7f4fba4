"""Scheduler: every live sequence from its arrival to its end, and what a finished step means.

Pure: no clock, no thread, no tensor; time is passed in.  Where sequences are is in places.py, what a step takes in
planner.py.
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
from collections.abc import Callable

from vserve.engine.limits import Limits
from vserve.engine.places import Places
from vserve.engine.planner import Planner
from vserve.engine.prefix import PrefixCache
from vserve.engine.request import Emit, EngineStats, FinishReason, GenRequest, RequestId, Timing, TokenLogprobs
from vserve.engine.sequence import Cause, Plan, Results, Sequence, State

__all__ = ["Limits", "Scheduler"]


def _fresh_seed() -> int:
    return secrets.randbits(64)


class Scheduler:
    """All live sequences and their next step.  G only.  draw_seed: seeds for requests that bring none."""

    def __init__(self, limits: Limits, draw_seed: Callable[[], int] = _fresh_seed) -> None:
        self.limits = limits
        self._places = Places(limits)
        self.pool = self._places.pool
        self._prefix = PrefixCache(self.pool, limits.block_size, enabled=limits.prefix_caching)
        self._planner = Planner(limits, self._places, self._prefix)
        self._draw_seed = draw_seed
        self._live: dict[RequestId, Sequence] = {}
        self._arrivals = 0
        self._next_deadline_s: float | None = None
        self._steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._aborted = 0
        self._finished = 0

    @property
    def live(self) -> int:
        """Sequences that have been added and have not ended."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Sequences in the waiting line, preempted ones included."""
        return len(self._places.waiting)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the waiting line."""
        return self._places.waiting_tokens

    def stats(self, busy_s: float = 0.0) -> EngineStats:
        """The gauges and counters as of now; prefix queries and hits count prompt tokens of first admissions."""
        return EngineStats(
            running=len(self._places.running),
            waiting=len(self._places.waiting),
            free_blocks=self.pool.free,
            cached_blocks=self.pool.cached,
            total_blocks=self.pool.total,
            steps_total=self._steps,
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated_tokens,
            prefix_queries_total=self._planner.prefix_queries,
            prefix_hits_total=self._planner.prefix_hits,
            preemptions_total=self._places.preemptions,
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
        problem = self.limits.problem(request)
        if problem is not None:
            self._finished += 1
            timing = Timing(request.arrival_s, now_s, now_s, now_s)
            return Emit(id=request.id, finish=FinishReason.ERROR, timing=timing, error=problem)
        seed = request.sampling.seed
        self._arrivals += 1
        sequence = Sequence(request, self._arrivals, self._draw_seed() if seed is None else seed)
        self._live[request.id] = sequence
        self._places.queue(sequence)
        deadline = request.deadline_s
        if deadline is not None and (self._next_deadline_s is None or deadline < self._next_deadline_s):
            self._next_deadline_s = deadline
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

    # ---- steps ----------------------------------------------------------------------------------------------

    def plan(self, now_s: float) -> Plan | None:
        """The next step, or None when there is nothing to compute until a plan in flight is committed."""
        return self._planner.plan(now_s)

    def commit(self, plan: Plan, results: Results, now_s: float) -> list[Emit]:
        """Take what the oldest uncommitted plan drew; at most one Emit a sequence, none for those that had ended."""
        emits: list[Emit] = []
        ids, logprobs, errors = results.ids, results.logprobs, results.errors
        places, finished, draw = self._places, State.FINISHED, 0
        leaving = places.leaving
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
            if not sequence.in_flight and leaving and sequence in leaving:
                leaving.discard(sequence)
                places.release(sequence)
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
        self._places.unlist(sequence)
        sequence.move(Cause.ENDED)
        sequence.finish = reason
        self._places.part(sequence)
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
