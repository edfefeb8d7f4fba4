"""The bridge merges what a late loop missed, keeps order, and lets no stream harm another."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from vserve.bridge import SLICE, SLICE_S, Bridge, Ended, Turns, merge
from vserve.engine.inbox import Inbox
from vserve.engine.request import (
    Cancel,
    Emit,
    EngineStats,
    FinishReason,
    GenRequest,
    RequestId,
    Timing,
    TokenLogprobs,
)
from vserve.errors import EngineDied, RateLimited, Unavailable


@dataclass
class Sink:
    """Remembers; raises on its first push when told to."""

    broken: bool = False
    pushes: list[Emit] = field(default_factory=list)
    failures: list[EngineDied] = field(default_factory=list)
    takes: Callable[[], None] = lambda: None

    def push(self, emit: Emit) -> None:
        self.takes()
        if self.broken:
            raise RuntimeError("a sink broke")
        self.pushes.append(emit)

    def fail(self, error: EngineDied) -> None:
        self.failures.append(error)
        if self.broken:
            raise RuntimeError("a sink broke again")

    @property
    def ids(self) -> list[int]:
        return [token for emit in self.pushes for token in emit.ids]


@dataclass
class Readings:
    """A meter that remembers."""

    steps: list[EngineStats] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    ends: list[Ended] = field(default_factory=list)

    def step(self, stats: EngineStats) -> None:
        self.steps.append(stats)

    def first(self, wait_s: float, /) -> None:
        self.firsts.append(wait_s)

    def gap(self, gap_s: float, /) -> None:
        self.gaps.append(gap_s)

    def ended(self, end: Ended) -> None:
        self.ends.append(end)


class Both:
    """A bridge on an event loop of its own, with sinks for a number of live requests."""

    def __init__(self, streams: int = 1, limit: int = 1000, turns: Turns | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        self.inbox = Inbox(limit)
        self.now_s = 0.0
        self.bridge = Bridge(self.loop, self.inbox, lambda: self.now_s, turns)
        self.meter = self.bridge.meter = Readings()
        self.sinks = {name: Sink() for name in (self.open(index) for index in range(streams))}
        for name, sink in self.sinks.items():
            self.bridge.submit(GenRequest(name, [1], 100), sink)

    def open(self, _: int) -> RequestId:
        return self.bridge.next_id()

    def turn(self) -> None:
        """One pass of the event loop."""
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def settle(self) -> None:
        for _ in range(200):
            self.turn()

    def close(self) -> None:
        self.loop.close()
        self.inbox.close()


@pytest.fixture
def both() -> Iterator[Both]:
    made = Both(3)
    yield made
    made.close()


def emits(streams: dict[RequestId, Sink], token: int) -> list[Emit]:
    return [Emit(name, (token,)) for name in streams]


def test_steps_published_while_the_loop_was_busy_arrive_as_one_push_a_stream(both: Both) -> None:
    for step in range(50):
        both.bridge.publish(emits(both.sinks, step), EngineStats(steps_total=step))
    both.turn()
    for sink in both.sinks.values():
        assert len(sink.pushes) == 1
        assert sink.ids == list(range(50))
    assert both.bridge.stats.steps_total == 49


def test_a_loop_that_is_behind_merges_instead_of_queueing() -> None:
    both = Both(SLICE * 5)
    for step in range(60):  # each pass of the loop serves a fifth of the streams while another step is published
        both.bridge.publish(emits(both.sinks, step), EngineStats())
        both.turn()
    both.settle()
    for sink in both.sinks.values():
        assert sink.ids == list(range(60))
        assert len(sink.pushes) <= 16  # a round takes four passes: its last slice and the next one's first share one
    both.close()


def test_a_turn_ends_after_so_many_streams_or_so_much_time() -> None:
    both = Both(SLICE * 2)
    both.bridge.publish(emits(both.sinks, 0), EngineStats())
    both.turn()
    assert sum(len(sink.pushes) for sink in both.sinks.values()) == SLICE
    both.settle()
    for sink in both.sinks.values():
        sink.takes = lambda: setattr(both, "now_s", both.now_s + SLICE_S / 3)
    pushed = [SLICE * 2]
    both.bridge.publish(emits(both.sinks, 1), EngineStats())
    while pushed[-1] < SLICE * 4:
        both.turn()
        pushed.append(sum(len(sink.pushes) for sink in both.sinks.values()))
    assert all(later - earlier <= 4 for earlier, later in pairwise(pushed))
    both.close()


class Line:
    """Turns whose other jobs are still to come, until told to go."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def soon(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    now = soon


def test_streams_are_served_when_it_is_their_turn() -> None:
    line = Line()
    both = Both(SLICE * 3, turns=line)
    for step in range(5):
        both.bridge.publish(emits(both.sinks, step), EngineStats())
        both.turn()
    assert len(line.jobs) == 1  # steps that come meanwhile are merged with what waits, or into the round behind it
    while line.jobs:
        line.jobs.pop(0)()
    assert all(sink.ids == list(range(5)) for sink in both.sinks.values())
    both.close()


def test_published_from_another_thread_nothing_is_lost() -> None:
    both = Both(10)

    def engine() -> None:
        for step in range(500):
            both.bridge.publish(emits(both.sinks, step), EngineStats())
        both.bridge.publish([Emit(name, (), FinishReason.LENGTH) for name in both.sinks], EngineStats())

    thread = threading.Thread(target=engine)
    thread.start()
    while both.bridge.live:
        both.turn()
    thread.join()
    assert all(sink.ids == list(range(500)) for sink in both.sinks.values())
    both.close()


@pytest.mark.promise("R1")
@pytest.mark.parametrize("streams", [1, SLICE, SLICE + 1, SLICE * 2, SLICE * 3])
@pytest.mark.parametrize("place", ["gathering", "delivering"])
def test_a_step_published_at_any_place_of_a_round_loses_no_later_wake_up(streams: int, place: str) -> None:
    both = Both(streams)
    meter = Readings()
    both.bridge.meter = meter
    told = False

    def publish_once(*_: object) -> None:
        nonlocal told
        if not told:
            told = True
            both.bridge.publish(emits(both.sinks, 1), EngineStats())

    if place == "gathering":
        meter.step = publish_once  # type: ignore[method-assign]
    else:
        meter.first = publish_once  # type: ignore[method-assign]
    both.bridge.publish(emits(both.sinks, 0), EngineStats())
    both.settle()
    for step in range(2, 5):
        both.bridge.publish(emits(both.sinks, step), EngineStats())
        both.settle()
    assert all(sink.ids == list(range(5)) for sink in both.sinks.values())
    both.close()


def test_nothing_is_pushed_after_a_finish_or_a_cancel(both: Both) -> None:
    one, two, _ = both.sinks
    both.bridge.publish([Emit(one, (1,), FinishReason.STOP), Emit(two, (1,))], EngineStats())
    both.turn()
    both.bridge.publish([Emit(one, (2,)), Emit(two, (2,))], EngineStats())
    both.bridge.cancel(two)
    both.bridge.cancel(two)
    both.settle()
    assert both.sinks[one].ids == [1]
    assert both.sinks[two].ids == [1]
    assert both.bridge.live == 1
    assert [item for item in both.inbox.drain() if isinstance(item, Cancel)] == [Cancel(two)]


def test_a_sink_that_raises_is_failed_and_cancelled_and_the_others_get_their_tokens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    both = Both(SLICE * 2 + 5)
    names = list(both.sinks)
    for name in (names[0], names[SLICE + 1], names[-1]):  # in the first slice, in a later one, and the last of all
        both.sinks[name].broken = True
    for step in range(3):
        both.bridge.publish(emits(both.sinks, step), EngineStats())
        both.settle()
    for sink in both.sinks.values():
        assert sink.ids == ([] if sink.broken else [0, 1, 2])
        assert len(sink.failures) == (1 if sink.broken else 0)
    cancels = [item for item in both.inbox.drain() if isinstance(item, Cancel)]
    assert [cancel.reason for cancel in cancels] == [FinishReason.ERROR] * 3
    both.close()


def test_death_delivers_what_was_computed_then_fails_every_stream_and_every_later_submit() -> None:
    both = Both(SLICE + 10)
    names = list(both.sinks)
    both.bridge.publish(emits(both.sinks, 1), EngineStats())
    both.turn()  # a round is half done
    both.bridge.publish([Emit(names[0], (2,), FinishReason.STOP), *emits(both.sinks, 2)[1:]], EngineStats())
    error = EngineDied("gone")
    both.bridge.died(error)
    both.settle()
    assert all(sink.ids == [1, 2] for sink in both.sinks.values())
    assert [len(both.sinks[name].failures) for name in names] == [0] + [1] * (SLICE + 9)
    assert both.bridge.death is error
    assert both.bridge.live == 0
    with pytest.raises(Unavailable):
        both.bridge.submit(GenRequest(both.bridge.next_id(), [1], 1), Sink())
    both.close()


def test_a_refused_request_has_no_sink() -> None:
    both = Both(2, limit=2)
    with pytest.raises(RateLimited):
        both.bridge.submit(GenRequest(both.bridge.next_id(), [1], 1), Sink())
    assert both.bridge.live == 2
    both.close()


def test_publishing_to_a_closed_loop_is_no_error(both: Both) -> None:
    both.loop.close()
    both.bridge.publish(emits(both.sinks, 1), EngineStats())
    both.bridge.died(EngineDied("gone"))


def test_stats_are_told_once_a_wake_up(both: Both) -> None:
    seen: list[EngineStats] = []
    both.bridge.on_stats = seen.append
    both.bridge.publish([], EngineStats(steps_total=1))
    both.bridge.publish([], EngineStats(steps_total=2))
    both.settle()
    assert [stats.steps_total for stats in seen] == [2]


def test_whoever_counts_the_stats_and_fails_stops_no_stream(both: Both, caplog: pytest.LogCaptureFixture) -> None:
    def broken(stats: EngineStats) -> None:
        raise RuntimeError("the counter broke")

    both.bridge.on_stats = broken
    name, sink = next(iter(both.sinks.items()))
    for token in range(3):
        both.bridge.publish([Emit(name, (token,))], EngineStats())
        both.settle()
    assert sink.ids == [0, 1, 2]
    assert "the counter broke" in caplog.text


def test_merged_emits_add_up() -> None:
    name, timing = RequestId(1), Timing(0, 1, 2, 3)
    logprobs = [TokenLogprobs(-float(place), 1) for place in range(3)]
    parts = [
        Emit(name, (1,), logprobs=(logprobs[0],), cached_tokens=4),
        Emit(name, (2,), logprobs=(logprobs[1],), cached_tokens=4),
        Emit(name, (3,), FinishReason.STOP, 3, (logprobs[2],), 4, timing),
    ]
    assert merge(parts) == Emit(name, (1, 2, 3), FinishReason.STOP, 3, tuple(logprobs), 4, timing)
    assert merge([Emit(name, (1,)), Emit(name, (), FinishReason.CANCELLED)]).logprobs is None


def test_the_meter_hears_of_every_step_of_each_pause_and_once_of_the_end() -> None:
    both = Both(1)
    (name,) = both.sinks
    for token, now_s in enumerate((2.0, 2.5, 4.5)):
        both.now_s = now_s
        both.bridge.publish([Emit(name, (token,))], EngineStats(steps_total=2 * token + 1))
        both.bridge.publish([Emit(name, (token,))], EngineStats(steps_total=2 * token + 2))
        both.turn()
    timing = Timing(0.0, 1.0, 2.0, 5.0)
    both.bridge.publish([Emit(name, finish=FinishReason.LENGTH, timing=timing)], EngineStats(steps_total=7))
    both.now_s = 5.5
    both.turn()
    assert [stats.steps_total for stats in both.meter.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert both.meter.firsts == [2.0]
    assert both.meter.gaps == [0.5, 2.0]
    assert both.meter.ends == [Ended(FinishReason.LENGTH, 1, 6, 5.5, timing)]
    both.close()


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.STOP, FinishReason.TIMEOUT])
@pytest.mark.parametrize("late", [FinishReason.CANCELLED, FinishReason.LENGTH])
def test_a_cancelled_sequence_is_metered_with_our_reason_and_the_engines_times(
    both: Both, reason: FinishReason, late: FinishReason
) -> None:
    name = next(iter(both.sinks))
    both.bridge.cancel(name, reason)
    both.bridge.cancel(name, FinishReason.ERROR)
    assert both.meter.ends == []
    timing = Timing(0.0, 1.0, 1.5, 2.0)
    for _ in range(2):  # a second last word cannot come; it would change nothing
        both.bridge.publish([Emit(name, (1,), finish=late, timing=timing)], EngineStats())
        both.turn()
    assert both.meter.ends == [Ended(reason, 1, 0, 0.0, timing)]
    assert both.sinks[name].pushes == []


def test_the_engines_death_meters_open_and_cancelled_sequences_once(both: Both) -> None:
    first, second, third = both.sinks
    both.bridge.cancel(first)
    both.bridge.publish([Emit(second, (1,), finish=FinishReason.STOP)], EngineStats())
    both.bridge.died(EngineDied("gone"))
    both.settle()
    assert [end.reason for end in both.meter.ends] == [FinishReason.STOP, FinishReason.ERROR, FinishReason.CANCELLED]
    both.bridge.cancel(third)
    assert len(both.meter.ends) == 3


class Follower:
    """A bridge's Tracer that remembers."""

    def __init__(self) -> None:
        self.sinks: dict[RequestId, tuple[float, Sink]] = {}
        self.ends: list[tuple[RequestId, Ended]] = []

    def sink(self, request: GenRequest, sink: object, queued_s: float) -> Sink:
        taking = Sink()
        self.sinks[request.id] = (queued_s, taking)
        return taking

    def ended(self, request_id: RequestId, end: Ended) -> None:
        self.ends.append((request_id, end))


@pytest.mark.parametrize("how", ["finish", "cancel", "death"])
def test_a_traced_sequence_is_followed_from_its_submission_to_its_one_end_and_no_other_is(how: str) -> None:
    both = Both(1)
    follower = both.bridge.tracer = Follower()
    (plain,) = both.sinks
    both.now_s = 3.0
    name = both.bridge.next_id()
    both.bridge.submit(GenRequest(name, [1], 100, traced=True), Sink())
    other = both.bridge.next_id()
    both.bridge.submit(GenRequest(other, [1], 100), Sink())
    assert list(follower.sinks) == [name]
    queued_s, taking = follower.sinks[name]
    both.bridge.publish([Emit(plain, (1,)), Emit(name, (2,)), Emit(other, (3,))], EngineStats())
    both.turn()
    assert (queued_s, taking.ids) == (3.0, [2])
    if how == "cancel":
        both.bridge.cancel(name)
        assert follower.ends == []  # until the engine's last word
    if how == "death":
        both.bridge.died(EngineDied("gone"))
    else:
        both.bridge.publish(
            [Emit(name, finish=FinishReason.LENGTH), Emit(other, finish=FinishReason.STOP)], EngineStats()
        )
    both.turn()
    reason = {"finish": FinishReason.LENGTH, "cancel": FinishReason.CANCELLED, "death": FinishReason.ERROR}[how]
    assert [(id, end.reason) for id, end in follower.ends] == [(name, reason)]
    both.close()


def test_a_refused_request_is_not_followed() -> None:
    both = Both(2, limit=2)
    follower = both.bridge.tracer = Follower()
    with pytest.raises(RateLimited):
        both.bridge.submit(GenRequest(both.bridge.next_id(), [1], 1, traced=True), Sink())
    assert (follower.sinks, follower.ends) == ({}, [])
    both.close()


def test_the_times_of_the_first_token_outlast_a_merge() -> None:
    name, first, last = RequestId(1), Timing(0, 1, 2, 2), Timing(0, 1, 2, 9)
    assert merge([Emit(name, (1,), timing=first), Emit(name, (2,))]).timing is first
    assert merge([Emit(name, (1,), timing=first), Emit(name, (2,), FinishReason.STOP, timing=last)]).timing is last
