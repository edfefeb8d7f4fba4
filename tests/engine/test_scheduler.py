"""Whatever the batching, preemption, cancels and depth: each sequence's text is its solo text, and pages come back."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from fakes import VOCAB, FakeDevice, prefix_of, solo
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vserve.engine.request import Emit, FinishReason, GenRequest, RequestId, TokenLogprobs
from vserve.engine.scheduler import Limits, Scheduler
from vserve.engine.sequence import MOST_CHUNKS, Plan, Results, State

COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


class Engine:
    """The loop's part in these tests: plans launched in order, committed depth - 1 plans later."""

    def __init__(self, limits: Limits, depth: int = 1) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits, draw_seed=lambda: 0)
        self.device = FakeDevice(limits.num_blocks, limits.block_size, limits.max_num_seqs)
        self.depth = depth
        self.in_flight: deque[tuple[Plan, Results]] = deque()
        self.requests: dict[RequestId, GenRequest] = {}
        self.texts: dict[RequestId, list[int]] = {}
        self.ends: dict[RequestId, Emit] = {}
        self.plans: list[Plan] = []

    def add(self, request: GenRequest, now_s: float = 0.0) -> None:
        self.requests[request.id] = request
        self.texts[request.id] = []
        refusal = self.scheduler.add(request, now_s)
        self.take([refusal] if refusal else [])

    def take(self, emits: list[Emit]) -> None:
        for emit in emits:
            assert emit.id not in self.ends, "an ended sequence spoke again"
            assert emit.ids or emit.finish
            self.texts[emit.id] += emit.ids
            if emit.finish:
                assert emit.timing is not None
                self.ends[emit.id] = emit

    def turn(self, now_s: float = 0.0) -> bool:
        """One turn of the loop; False when there was nothing to do."""
        plan = self.scheduler.plan(now_s)
        if plan is None and not self.in_flight:
            assert self.scheduler.live == 0, "sequences live, nothing is in flight, and no step is possible"
            return False
        if plan is not None:
            self.check(plan)
            self.plans.append(plan)
            self.in_flight.append((plan, self.device.launch(plan)))
        if plan is None or len(self.in_flight) >= self.depth:
            self.take(self.scheduler.commit(*self.in_flight.popleft(), now_s))
        return True

    def check(self, plan: Plan) -> None:
        limits = self.limits
        assert plan.num_tokens == sum(work.num_tokens for work in plan.works) <= limits.max_num_batched_tokens
        assert plan.num_decodes == sum(work.sequence.state is State.DECODE for work in plan.works[: plan.num_decodes])
        assert len(plan.works) <= limits.max_num_seqs
        rows = [work.sequence.row for work in plan.works]
        assert len(set(rows)) == len(rows)
        assert all(row is not None and 0 <= row < limits.max_num_seqs for row in rows)
        if plan.num_decodes:
            assert plan.num_tokens - plan.num_decodes <= limits.max_prefill_chunk
        if self.depth == 1:
            assert not any(work.from_row for work in plan.works)

    def run(self, turns: int = 10_000) -> None:
        for _ in range(turns):
            if not self.turn():
                return
        raise AssertionError("the engine does not come to an end")

    def finish(self) -> None:
        """Run to the end and check every promise about texts, ends and pages."""
        self.run()
        pool = self.scheduler.pool
        pool.check()
        assert pool.held == 0
        assert self.ends.keys() == self.requests.keys()
        for name, request in self.requests.items():
            end, text = self.ends[name], self.texts[name]
            if len(request.prompt) + request.max_tokens > self.limits.max_sequence_tokens:
                assert (end.finish, text) == (FinishReason.ERROR, [])
                assert end.error is not None
                continue
            alone = solo(request)
            if end.finish in COMPLETE:
                assert text == alone
                stopped = alone[-1] in request.stop_ids
                assert end.finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)
                assert end.stop_id == (alone[-1] if stopped else None)
            else:
                assert end.finish in (FinishReason.CANCELLED, FinishReason.TIMEOUT)
                assert prefix_of(text, alone)
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, self.scheduler.waiting_tokens) == (0, 0, 0)
        assert stats.finished_total == len(self.requests)
        assert stats.cache_usage == 0.0


def limits(**changes: int | bool) -> Limits:
    plain = Limits(num_blocks=16, block_size=4, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64)
    return replace(plain, **changes)  # type: ignore[arg-type]


def request(name: int, prompt: list[int], max_tokens: int = 4, **rest: object) -> GenRequest:
    return GenRequest(id=RequestId(name), prompt=prompt, max_tokens=max_tokens, **rest)  # type: ignore[arg-type]


LIMITS = st.builds(
    Limits,
    num_blocks=st.integers(3, 14),
    block_size=st.sampled_from([1, 2, 4]),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 20),
    max_model_len=st.just(24),
    max_prefill_chunk=st.integers(1, 8),
    prefill_target=st.none() | st.integers(1, 8),
    mixed_sizes=st.just(()) | st.lists(st.integers(1, 20), min_size=1, unique=True).map(sorted).map(tuple),
    prefix_caching=st.booleans(),
)
# Few ids and shared beginnings, so that prefixes meet.
PROMPTS = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=14),
    st.integers(1, 14).map(lambda length: [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18][:length]),
)
REQUESTS = st.builds(
    GenRequest,
    id=st.just(RequestId(0)),
    prompt=PROMPTS,
    max_tokens=st.integers(1, 12),
    min_tokens=st.integers(0, 3),
    stop_ids=st.frozensets(st.integers(0, VOCAB - 1), max_size=8),
    cache_salt=st.sampled_from([b"", b"other"]),
    priority=st.integers(0, 1),
    deadline_s=st.one_of(st.none(), st.integers(1, 60).map(float)),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, cancels, deadlines and turns on tight pools, one to three steps in flight."""

    @initialize(limits=LIMITS, depth=st.sampled_from([1, 2, 2, 3]))
    def start(self, limits: Limits, depth: int) -> None:
        self.engine = Engine(limits, depth)
        self.now_s = 0.0

    @rule(request=REQUESTS)
    def arrive(self, request: GenRequest) -> None:
        name = RequestId(len(self.engine.requests))
        wanted = replace(request, id=name, min_tokens=min(request.min_tokens, request.max_tokens))
        if wanted.deadline_s is not None:
            wanted = replace(wanted, deadline_s=self.now_s + wanted.deadline_s)
        self.engine.add(wanted, self.now_s)

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.engine.requests)))
        emit = self.engine.scheduler.cancel(name, FinishReason.CANCELLED, self.now_s)
        assert (emit is None) == (name in self.engine.ends)
        self.engine.take([emit] if emit else [])

    @rule(turns=st.integers(1, 6))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            self.now_s += 1.0
            self.engine.take(self.engine.scheduler.expire(self.now_s))
            live = self.engine.requests.keys() - self.engine.ends.keys()
            deadlines = [self.engine.requests[name].deadline_s for name in live]
            assert all(deadline is None or deadline > self.now_s for deadline in deadlines)
            self.engine.turn(self.now_s)
            self.engine.scheduler.pool.check()

    @invariant()
    def no_block_is_lost(self) -> None:
        pool = self.engine.scheduler.pool
        pool.check()
        assert pool.free + pool.held + pool.cached == pool.total

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.finish()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_pool_too_small_for_all_preempts_and_every_text_is_whole(depth: int) -> None:
    engine = Engine(limits(num_blocks=7, prefix_caching=False), depth)
    for name in range(4):
        engine.add(request(name, [name + 1, 2, 3], max_tokens=20))
    engine.finish()
    assert engine.scheduler.stats().preemptions_total > 0
    preempted = [end for end in engine.ends.values() if end.timing and end.timing.preemptions]
    assert preempted
    assert engine.ends[RequestId(0)] not in preempted  # the oldest is never sent back


def test_a_preempted_sequence_finds_its_own_blocks_again_if_nobody_took_them() -> None:
    engine = Engine(limits(num_blocks=8))
    engine.add(request(0, [1, 2, 3], max_tokens=20))
    engine.add(request(1, [4, 5, 6], max_tokens=20))
    engine.finish()
    chunks = [work for plan in engine.plans for work in plan.works[plan.num_decodes :]]
    starts = [work.start for work in chunks if work.sequence.id == 1]
    assert len(starts) == 1 + engine.scheduler.stats().preemptions_total > 1
    assert all(start > 0 for start in starts[1:])


def test_decodes_come_first_and_bound_the_prompt_chunk_beside_them() -> None:
    engine = Engine(limits(max_prefill_chunk=3, max_num_batched_tokens=20))
    engine.add(request(0, [1] * 10, max_tokens=20))
    engine.turn()
    assert engine.plans[-1].num_tokens == 10  # nothing decodes: the whole prompt
    engine.add(request(1, [2] * 10))
    engine.turn()
    assert [(work.sequence.id, work.num_tokens) for work in engine.plans[-1].works] == [(0, 1), (1, 3)]
    engine.finish()


def test_a_step_never_passes_its_token_budget_and_prompts_are_cut_to_fit() -> None:
    engine = Engine(limits(max_num_batched_tokens=8, prefix_caching=False))
    engine.add(request(0, [1] * 13))
    engine.add(request(1, [2] * 13))
    engine.turn()
    engine.turn()
    chunks = [[(work.sequence.id, work.num_tokens) for work in plan.works] for plan in engine.plans]
    assert chunks == [[(0, 8)], [(0, 5), (1, 3)]]
    engine.finish()


def test_waiting_sequences_are_admitted_by_priority_then_arrival() -> None:
    engine = Engine(limits(max_num_seqs=1))
    for name, priority in enumerate([1, 0, 1, 0, -5]):
        engine.add(request(name, [name + 1], max_tokens=1, priority=priority))
    engine.finish()
    assert [plan.works[0].sequence.id for plan in engine.plans] == [4, 1, 3, 0, 2]


def test_a_prompt_seen_before_is_computed_from_its_first_new_block_and_always_leaves_one_token() -> None:
    engine = Engine(limits())
    prompt = list(range(12))
    engine.add(request(0, prompt, max_tokens=1))
    engine.run()
    engine.add(request(1, prompt, max_tokens=1))  # three full blocks, of which the last must be computed
    engine.add(request(2, [*prompt, 40], max_tokens=1))
    engine.add(request(3, prompt, max_tokens=1, cache_salt=b"other"))
    engine.finish()
    assert [engine.ends[RequestId(name)].cached_tokens for name in range(4)] == [0, 8, 12, 0]
    stats = engine.scheduler.stats()
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (12 + 12 + 13 + 12, 20)


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    engine = Engine(limits(num_blocks=32, max_num_seqs=4), depth=2)
    prompt = list(range(17))
    for name in range(4):
        engine.add(request(name, prompt, max_tokens=3))
    engine.finish()
    computed = sum(work.num_tokens for plan in engine.plans for work in plan.works[plan.num_decodes :])
    assert computed == 17 + 3 * 1


def test_generated_blocks_are_shared_with_the_next_turn_of_a_conversation() -> None:
    for depth in (1, 2):
        engine = Engine(limits(), depth)
        engine.add(request(0, [1, 2, 3], max_tokens=10))
        engine.run()
        engine.add(request(1, [1, 2, 3, *engine.texts[RequestId(0)], 9]))
        engine.finish()
        assert engine.ends[RequestId(1)].cached_tokens == 12  # 3 + 10 tokens: the last full block included


def test_without_prefix_caching_nothing_is_shared_or_kept() -> None:
    engine = Engine(limits(prefix_caching=False))
    for name in range(2):
        engine.add(request(name, list(range(12))))
        engine.run()
    engine.finish()
    assert engine.scheduler.pool.cached == 0
    assert engine.ends[RequestId(1)].cached_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([1] * 60, 5, "60 tokens and max_tokens is 5; together they may be at most 64"),
        ([], 1, "at least one prompt token"),
        ([1], 0, "one token to generate"),
        ([1, VOCAB], 1, "outside the vocabulary of 48"),
        ([-1], 1, "outside the vocabulary"),
    ],
)
def test_a_request_that_can_never_run_ends_with_an_error_that_has_the_numbers(
    prompt: list[int], max_tokens: int, words: str
) -> None:
    scheduler = Scheduler(limits(vocab_size=VOCAB))
    refusal = scheduler.add(request(1, prompt, max_tokens), 3.0)
    assert refusal is not None
    assert refusal.finish is FinishReason.ERROR
    assert refusal.error is not None
    assert words in refusal.error
    assert scheduler.live == 0
    assert scheduler.plan(3.0) is None


def test_a_request_that_needs_every_block_runs_and_one_token_more_is_refused() -> None:
    engine = Engine(limits(num_blocks=3, max_num_seqs=2), depth=2)
    engine.add(request(0, [1] * 5, max_tokens=8))  # 13 tokens, the last of which needs no place
    engine.add(request(1, [2] * 5, max_tokens=9))
    engine.add(request(2, [3] * 5, max_tokens=8))
    engine.finish()
    assert engine.ends[RequestId(1)].finish is FinishReason.ERROR
    assert "at most 13" in (engine.ends[RequestId(1)].error or "")


def test_an_id_that_is_live_cannot_be_added_again() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request(1, [1]), 0.0)
    with pytest.raises(ValueError, match="live already"):
        scheduler.add(request(1, [1]), 0.0)


def test_a_stop_id_is_seen_one_step_late_and_the_spare_token_is_dropped() -> None:
    text = solo(request(0, [1, 2, 3], max_tokens=8))
    stop = text[4]
    engine = Engine(limits(), depth=2)
    engine.add(request(0, [1, 2, 3], max_tokens=8, stop_ids=frozenset({stop})))
    expected = text[: text.index(stop) + 1]
    engine.finish()
    assert engine.texts[RequestId(0)] == expected
    assert sum(work.samples for plan in engine.plans for work in plan.works) == len(expected) + 1


def test_the_end_by_max_tokens_is_foreseen_and_nothing_spare_is_planned() -> None:
    engine = Engine(limits(), depth=2)
    engine.add(request(0, [1, 2, 3], max_tokens=5))
    engine.finish()
    assert sum(work.samples for plan in engine.plans for work in plan.works) == 5


def test_pages_and_row_of_a_sequence_in_flight_are_held_until_its_last_plan_is_committed() -> None:
    engine = Engine(limits(max_num_seqs=1), depth=2)
    engine.add(request(0, [1, 2, 3, 4, 5], max_tokens=9))
    engine.turn()
    cancelled = engine.scheduler.cancel(RequestId(0), FinishReason.CANCELLED, 1.0)
    engine.take([cancelled] if cancelled else [])
    assert engine.scheduler.live == 0
    assert engine.scheduler.pool.held == 2
    engine.add(request(1, [7], max_tokens=1))
    assert engine.scheduler.plan(1.0) is None  # the only row is still taken
    engine.turn()
    assert engine.scheduler.pool.held == 0
    engine.finish()


def test_one_victim_in_flight_is_enough_and_no_second_is_sent_back_while_its_blocks_are_on_their_way() -> None:
    engine = Engine(limits(num_blocks=6, prefix_caching=False), depth=2)
    for name in range(2):
        engine.add(request(name, [name + 1] * 7, max_tokens=8))
    while not engine.scheduler.stats().preemptions_total:
        engine.turn()
    assert engine.scheduler.stats().preemptions_total == 1
    engine.finish()


@pytest.mark.parametrize(("lengths", "short"), [((5, 3, 1), 7), ((5, 7, 1), 3), ((7, 1, 3), 5), ((7, 3, 5), 3)])
def test_a_victim_is_not_admitted_again_before_its_last_draw_is_known(
    lengths: tuple[int, int, int], short: int
) -> None:
    # The second sequence ends, and its blocks come back, while draws of the third, preempted, are still under way.
    engine = Engine(limits(num_blocks=4, prefix_caching=False), depth=3)
    for name, (length, max_tokens) in enumerate(zip(lengths, (12, short, 9), strict=True)):
        engine.add(request(name, [name + 1] * length, max_tokens=max_tokens))
    engine.finish()


def test_a_row_error_ends_its_sequence_alone_and_its_blocks_are_shared_with_nobody() -> None:
    engine = Engine(limits())
    engine.add(request(0, list(range(8)), max_tokens=3))
    engine.add(request(1, [9, 9], max_tokens=3))
    plan = engine.scheduler.plan(0.0)
    assert plan is not None
    drawn = engine.device.launch(plan)
    engine.take(engine.scheduler.commit(plan, Results(drawn.ids, errors={0: "bad row"}), 1.0))
    assert engine.ends[RequestId(0)].error == "bad row"
    assert engine.ends[RequestId(0)].ids == ()
    assert engine.scheduler.pool.cached == 0
    engine.run()
    assert engine.texts[RequestId(1)] == solo(engine.requests[RequestId(1)])


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode"])
@pytest.mark.promise("R4")
def test_a_deadline_ends_a_sequence_in_any_state(phase: str) -> None:
    engine = Engine(limits(max_num_seqs=1, max_num_batched_tokens=4))
    if phase == "waiting":
        engine.add(request(9, [1] * 4, max_tokens=30))
    engine.add(request(0, [1] * 8, max_tokens=9, deadline_s=5.0))
    for _ in range(3 if phase == "decode" else 1):
        engine.turn(1.0)
    assert engine.scheduler.expire(4.9) == []
    (late,) = engine.scheduler.expire(5.0)
    assert (late.id, late.finish) == (0, FinishReason.TIMEOUT)
    assert late.timing is not None
    assert late.timing.finished_s == 5.0
    assert engine.scheduler.expire(1e9) == []
    engine.take([late])
    engine.run()
    assert engine.scheduler.pool.held == 0


def test_the_last_emit_carries_timing_cached_tokens_and_logprobs() -> None:
    engine = Engine(limits())
    engine.add(request(0, [1, 2], max_tokens=2, arrival_s=1.0))
    entry = TokenLogprobs(-0.5, 1)
    seen: list[Emit] = []
    for now_s in (2.0, 3.0):
        plan = engine.scheduler.plan(now_s)
        assert plan is not None
        seen += engine.scheduler.commit(plan, Results(engine.device.launch(plan).ids, {0: entry}), now_s + 0.5)
    assert [emit.logprobs for emit in seen] == [(entry,), (entry,)]
    timing = seen[-1].timing
    assert timing is not None
    assert (timing.arrival_s, timing.scheduled_s, timing.first_token_s, timing.finished_s) == (1.0, 2.0, 2.5, 3.5)
    first = seen[0].timing  # with the first token, as far as it goes
    assert first is not None
    assert (first.scheduled_s, first.first_token_s, first.finished_s) == (2.0, 2.5, 2.5)


def test_cancel_all_ends_everything_with_the_error() -> None:
    engine = Engine(limits(max_num_seqs=2))
    for name in range(4):
        engine.add(request(name, [1, 2]))
    engine.turn()
    emits = engine.scheduler.cancel_all("going away", 1.0)
    assert [(emit.finish, emit.error) for emit in emits] == [(FinishReason.ERROR, "going away")] * 4
    assert (engine.scheduler.live, engine.scheduler.pool.held, engine.scheduler.waiting_tokens) == (0, 0, 0)


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        limits(**{name: 0})


def prompt_tokens(plan: Plan) -> list[int]:
    """Prompt tokens of each sequence that the plan takes in."""
    return [work.num_tokens for work in plan.works[plan.num_decodes :]]


def test_with_a_prefill_target_a_step_takes_one_whole_prompt_or_some_short_ones() -> None:
    scheduler = Scheduler(
        limits(max_num_batched_tokens=64, max_prefill_chunk=16, prefill_target=8, num_blocks=200, max_num_seqs=8)
    )
    for name, length in enumerate((20, 3, 3, 3, 3)):
        scheduler.add(request(name, list(range(length))), 0.0)
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert first is not None
    assert second is not None
    assert prompt_tokens(first) == [20]
    assert second.num_decodes == 1
    assert prompt_tokens(second) == [3, 3, 3, 3]  # a target says nothing of steps that decode


@pytest.mark.parametrize(
    ("decodes", "waiting", "chunk", "taken"),
    [
        (1, 1, 1000, 255),
        (1, 3, 1000, 255),
        (1, 4, 1000, 511),
        (1, 8, 1000, 639),
        (1, 50, 1000, 639),  # a whole size at most: 1023 are more than a chunk may be
        (1, 50, 520, 511),
        (1, 50, 100, 100),
        (127, 1, 1000, 129),
        (130, 1, 1000, 382),
        (200, 50, 1000, 824),
        (600, 1, 1000, 424),
    ],
)
def test_steps_that_decode_fill_one_of_the_cheap_sizes_and_larger_ones_for_a_backlog(
    decodes: int, waiting: int, chunk: int, taken: int
) -> None:
    scheduler = Scheduler(
        Limits(
            num_blocks=8000,
            block_size=16,
            max_num_seqs=700,
            max_num_batched_tokens=8192,
            max_model_len=1024,
            max_prefill_chunk=chunk,
            mixed_sizes=(256, 512, 640, 1024),
            prefix_caching=False,
        )
    )
    for name in range(decodes):
        scheduler.add(request(name, [1, 2, 3, 4]), 0.0)
    assert scheduler.plan(0.0) is not None
    for name in range(decodes, decodes + waiting):
        scheduler.add(request(name, [1] * 512), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert plan.num_decodes == decodes
    assert sum(prompt_tokens(plan)) == taken


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("drawn", [0, 1, 5, 11])
def test_a_continued_answer_goes_on_as_if_it_had_never_stopped(drawn: int, depth: int) -> None:
    engine = Engine(limits(num_blocks=9, max_model_len=40), depth)
    whole = [request(i, [i, 2, 3], 12, stop_ids=frozenset({5}), min_tokens=6) for i in range(3)]  # they preempt
    texts = [solo(one) for one in whole]
    for one, text in zip(whole, texts, strict=True):
        before = text[:drawn] if len(text) > drawn else []
        again = one.behind(before, one.id, 0.0)
        engine.requests[one.id] = again
        engine.texts[one.id] = list(before)
        assert engine.scheduler.add(again, 0.0) is None
    engine.run()
    assert [engine.texts[one.id] for one in whole] == texts
    assert all(engine.ends[one.id].cached_tokens <= len(one.prompt) for one in whole)
    assert engine.scheduler.pool.held == 0


def test_a_continued_answer_with_nothing_left_to_draw_or_an_unknown_token_is_refused() -> None:
    scheduler = Scheduler(limits(vocab_size=VOCAB))
    for drawn, said in (([1, 2, 3, 4], "none is left"), ([VOCAB], "outside the vocabulary")):
        emit = scheduler.add(request(1, [1], 4).behind(drawn, RequestId(2), 0.0), 0.0)
        assert emit is not None
        assert emit.finish is FinishReason.ERROR
        assert said in (emit.error or "")
    assert scheduler.live == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_traced_sequence_notes_each_chunk_with_its_step(depth: int) -> None:
    engine = Engine(limits(max_num_batched_tokens=4, max_prefill_chunk=3), depth=depth)
    engine.add(request(0, list(range(10)), max_tokens=3, traced=True))
    engine.add(request(1, list(range(20, 27)), max_tokens=3, traced=True))
    engine.add(request(2, [1, 2], max_tokens=2))
    engine.run()
    for name, length in ((0, 10), (1, 7)):
        timing = engine.ends[RequestId(name)].timing
        assert timing is not None
        steps, times, starts, tokens = zip(*timing.chunks, strict=True)
        assert sum(tokens) == length
        assert list(starts) == [sum(tokens[:i]) for i in range(len(tokens))]
        assert list(steps) == sorted(set(steps))
        assert list(times) == sorted(times)
        assert 1 <= steps[0] <= steps[-1] <= engine.scheduler.stats().steps_total
        assert times[0] == timing.scheduled_s
    untraced = engine.ends[RequestId(2)].timing
    assert untraced is not None
    assert (untraced.chunks, untraced.preempted_s) == ((), ())


def test_a_traced_sequence_notes_when_it_was_preempted_and_what_was_computed_again() -> None:
    engine = Engine(limits(num_blocks=6, block_size=2, prefix_caching=False))
    for name in range(3):
        engine.add(request(name, [name + 1] * 3, max_tokens=7, traced=True))
    engine.run()
    timings = [end.timing for end in engine.ends.values() if end.timing is not None]
    again = [timing for timing in timings if timing.preemptions]
    assert again
    for timing in timings:
        assert len(timing.preempted_s) == timing.preemptions
        assert sum(tokens for _, _, _, tokens in timing.chunks) >= 3 * (1 + timing.preemptions)
        for at_s in timing.preempted_s:
            assert any(chunk[1] >= at_s and chunk[2] == 0 for chunk in timing.chunks)


def test_what_is_noted_of_a_sequence_is_bounded() -> None:
    engine = Engine(limits(max_num_batched_tokens=1, max_model_len=2000, num_blocks=1000))
    length = MOST_CHUNKS + 44
    engine.add(request(0, [1] * length, max_tokens=1, traced=True))
    engine.run()
    timing = engine.ends[RequestId(0)].timing
    assert timing is not None
    assert (len(timing.chunks), timing.chunks_left_out) == (MOST_CHUNKS, 44)
