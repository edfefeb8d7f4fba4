"""The engine thread: every accepted request ends exactly once, whatever is cancelled, late, broken or stopped."""

from __future__ import annotations

import gc
import logging
import random
import threading
from collections.abc import Callable
from typing import cast

import pytest
from fakes import FakeModel, ManualClock, prefix_of, solo

from vserve.engine.inbox import Inbox
from vserve.engine.loop import EngineLoop, StepRunner
from vserve.engine.request import Cancel, Emit, EngineStats, FinishReason, GenRequest, RequestId, SamplingParams
from vserve.engine.runner import Runner
from vserve.engine.scheduler import Limits, Scheduler
from vserve.engine.sequence import Plan
from vserve.errors import EngineDied, RateLimited, Unavailable
from vserve.observe.heartbeat import Heartbeat, Phase

PATIENCE_S = 60.0
GREEDY = SamplingParams(temperature=0.0)


class Server:
    """A real engine thread on the fake model, and what it published."""

    def __init__(self, *, depth: int = 1, model: FakeModel | None = None, **options: object) -> None:
        self.limits = Limits(
            num_blocks=cast(int, options.pop("num_blocks", 40)),
            block_size=4,
            max_num_seqs=cast(int, options.pop("max_num_seqs", 6)),
            max_num_batched_tokens=32,
            max_model_len=64,
            max_prefill_chunk=8,
        )
        self.model = model or FakeModel()
        cache = self.model.new_cache(self.limits.num_blocks, self.limits.block_size)
        runner: StepRunner = Runner(self.model, cache, max_num_seqs=self.limits.max_num_seqs, max_model_len=64)
        wrap = cast(Callable[[StepRunner], StepRunner] | None, options.pop("wrap", None))
        self.inbox = Inbox(cast(int, options.pop("queue", 1000)))
        self.scheduler = Scheduler(self.limits)
        self.heartbeat = Heartbeat()
        self.emits: list[Emit] = []
        self.stats: list[EngineStats] = []
        self.deaths: list[EngineDied] = []
        self._news = threading.Condition()
        self.loop = EngineLoop(
            self.inbox,
            self.scheduler,
            wrap(runner) if wrap else runner,
            cast(Callable[[list[Emit], EngineStats], None], options.pop("publish", self.publish)),
            self.die,
            self.heartbeat,
            depth=depth,
            **options,  # type: ignore[arg-type]
        )
        self.thread = threading.Thread(target=self.loop.run)

    def __enter__(self) -> Server:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.stop()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        self.inbox.close()

    def publish(self, emits: list[Emit], stats: EngineStats) -> None:
        with self._news:
            self.emits += emits
            self.stats.append(stats)
            self._news.notify_all()

    def die(self, error: EngineDied) -> None:
        with self._news:
            self.deaths.append(error)
            self._news.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._news:
            assert self._news.wait_for(condition, PATIENCE_S)

    def wait_for_end(self, name: int) -> None:
        self.wait(lambda: name in self.ends())

    def ends(self) -> dict[int, Emit]:
        ended = [emit for emit in self.emits if emit.finish]
        found = {emit.id: emit for emit in ended}
        assert len(found) == len(ended), "a request ended twice"
        return cast(dict[int, Emit], found)

    def text(self, name: int) -> list[int]:
        return [token for emit in self.emits if emit.id == name for token in emit.ids]


def request(name: int, max_tokens: int = 8, **rest: object) -> GenRequest:
    prompt = [name % 5, 2, 3, *range(name % 13)]
    return GenRequest(RequestId(name), prompt, max_tokens, GREEDY, **rest)  # type: ignore[arg-type]


class Gate:
    """A runner that waits for permission before each step."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self.entered = threading.Semaphore(0)
        self.open = threading.Semaphore(0)

    def launch(self, plan: Plan) -> object:
        self.entered.release()
        assert self.open.acquire(timeout=PATIENCE_S)
        return self._runner.launch(plan)


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_that_arrive_at_any_time_get_their_solo_text(depth: int) -> None:
    with Server(depth=depth) as server:
        wanted = [request(name) for name in range(30)]
        for one in wanted:
            server.inbox.put(one)
            if one.id % 10 == 9:  # let it run dry now and then, so that it parks and wakes
                server.wait_for_end(one.id)
        server.wait(lambda: len(server.ends()) == 30)
    assert {one.id: server.text(one.id) for one in wanted} == {one.id: solo(one) for one in wanted}
    assert server.scheduler.pool.held == 0
    assert server.deaths == []
    assert server.stats[-1].finished_total == 30
    assert server.stats[-1].steps_total > 0
    assert server.stats[-1].generated_tokens_total == sum(len(solo(one)) for one in wanted)


@pytest.mark.parametrize("depth", [1, 2])
def test_two_hundred_requests_with_random_cancels_leave_no_page_held_and_the_next_answer_right(depth: int) -> None:
    chance = random.Random(20 + depth)
    with Server(depth=depth, num_blocks=24) as server:
        wanted = [request(name, max_tokens=chance.randint(1, 20)) for name in range(200)]
        cancelled: set[int] = set()
        for one in wanted:
            server.inbox.put(one)
            if chance.random() < 0.4:
                victim = chance.randint(max(0, one.id - 8), one.id)
                cancelled.add(victim)
                server.inbox.put(Cancel(RequestId(victim)))
        server.wait(lambda: len(server.ends()) == 200)
        server.inbox.put(request(777))
        server.wait(lambda: 777 in server.ends())
    for one in wanted:
        end = server.ends()[one.id]
        if end.finish is FinishReason.CANCELLED:
            assert one.id in cancelled
            assert prefix_of(server.text(one.id), solo(one))
        else:
            assert server.text(one.id) == solo(one)
    assert server.text(777) == solo(request(777))
    assert server.scheduler.pool.held == 0
    assert server.inbox.size == 0
    server.scheduler.pool.check()


def test_a_deadline_in_the_queue_and_one_in_a_step_are_kept() -> None:
    clock = ManualClock()
    gates: list[Gate] = []

    def wrap(runner: StepRunner) -> StepRunner:
        gates.append(Gate(runner))
        return cast(StepRunner, gates[0])

    with Server(wrap=wrap, clock=clock, max_num_seqs=1) as server:
        server.inbox.put(request(1, max_tokens=30, deadline_s=1010.0))
        assert gates[0].entered.acquire(timeout=PATIENCE_S)
        server.inbox.put(request(2, deadline_s=1005.0))
        server.inbox.put(request(3, max_tokens=1))
        clock.now_s = 1010.0
        gates[0].open.release(100)
        server.wait(lambda: len(server.ends()) == 3)
    ends = server.ends()
    assert [ends[name].finish for name in (1, 2, 3)] == [
        FinishReason.TIMEOUT,
        FinishReason.TIMEOUT,
        FinishReason.LENGTH,
    ]
    assert len(server.text(1)) == 1  # the step in hand still counted
    assert server.scheduler.pool.held == 0


def test_requests_that_wait_in_the_scheduler_fill_the_queue() -> None:
    gates: list[Gate] = []

    def wrap(runner: StepRunner) -> StepRunner:
        gates.append(Gate(runner))
        return cast(StepRunner, gates[0])

    with Server(wrap=wrap, max_num_seqs=1, queue=2) as server:
        server.inbox.put(request(1))
        assert gates[0].entered.acquire(timeout=PATIENCE_S)  # it runs: no longer waiting
        server.inbox.put(request(2))
        server.inbox.put(request(3))
        gates[0].open.release()
        assert gates[0].entered.acquire(timeout=PATIENCE_S)  # both were drained into the scheduler by now
        with pytest.raises(RateLimited):
            server.inbox.put(request(4))
        gates[0].open.release(1000)
        server.wait(lambda: len(server.ends()) == 3)
    assert server.inbox.size == 0


def test_a_request_that_cannot_run_is_answered_with_an_error_and_the_engine_goes_on() -> None:
    with Server() as server:
        server.inbox.put(request(1, max_tokens=64))
        server.inbox.put(request(2))
        server.wait(lambda: len(server.ends()) == 2)
    assert server.ends()[1].finish is FinishReason.ERROR
    assert server.text(2) == solo(request(2))


def test_a_nan_row_ends_one_request_and_the_engine_goes_on() -> None:
    with Server(model=FakeModel(poison=47)) as server:
        server.inbox.put(GenRequest(RequestId(1), [47, 1], 5, GREEDY))
        server.inbox.put(request(2, max_tokens=1))
        server.wait(lambda: len(server.ends()) == 2)
    assert server.ends()[1].finish is FinishReason.ERROR
    assert server.text(2) == solo(request(2, max_tokens=1))
    assert server.deaths == []


class Broken:
    """A runner or pending that raises."""

    def __init__(self, where: str) -> None:
        self._where = where

    def launch(self, plan: Plan) -> Broken:
        if self._where == "launch":
            raise RuntimeError("launch is broken")
        return self

    def wait(self) -> object:
        raise RuntimeError("wait is broken")


@pytest.mark.parametrize("where", ["launch", "wait", "forward", "publish", "plan"])
def test_a_failure_that_is_no_request_s_own_ends_the_engine_once_and_aloud(
    where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.CRITICAL)
    options: dict[str, object] = {}
    if where in ("launch", "wait"):
        options["wrap"] = lambda _: Broken(where)
    if where == "publish":

        def publish(emits: list[Emit], stats: EngineStats) -> None:
            raise RuntimeError("publish is broken")

        options["publish"] = publish
    server = Server(model=FakeModel(explode=2 if where == "forward" else None), **options)  # type: ignore[arg-type]
    if where == "plan":
        monkeypatch.setattr(server.scheduler, "plan", lambda now_s: None)
    with server:
        server.inbox.put(request(1))
        server.wait(lambda: bool(server.deaths))
        server.thread.join(PATIENCE_S)
        with pytest.raises(Unavailable):
            server.inbox.put(request(2))
        server.inbox.put(Cancel(RequestId(1)))
    assert len(server.deaths) == 1
    assert "RuntimeError" in str(server.deaths[0])
    assert "broken" not in str(server.deaths[0])  # details are for the log
    assert not server.heartbeat.verdict(0.0).healthy


@pytest.mark.parametrize("depth", [1, 2])
def test_stop_ends_what_lives_with_an_error_and_what_comes_later_is_refused(depth: int) -> None:
    gates: list[Gate] = []

    def wrap(runner: StepRunner) -> StepRunner:
        gates.append(Gate(runner))
        return cast(StepRunner, gates[0])

    with Server(wrap=wrap, max_num_seqs=2, depth=depth) as server:
        for name in range(4):
            server.inbox.put(request(name, max_tokens=40))
        assert gates[0].entered.acquire(timeout=PATIENCE_S)
        server.inbox.put(request(4))
        server.loop.stop()
        gates[0].open.release(100)
        server.thread.join(PATIENCE_S)
        with pytest.raises(Unavailable):
            server.inbox.put(request(5))
    assert {name: end.error for name, end in server.ends().items()} == dict.fromkeys(
        range(5), "The server is stopping."
    )
    assert server.scheduler.pool.held == 0
    assert server.deaths == []


def test_an_idle_engine_beats_as_idle_and_a_stuck_step_is_seen() -> None:
    clock = ManualClock()
    gates: list[Gate] = []

    def wrap(runner: StepRunner) -> StepRunner:
        gates.append(Gate(runner))
        return cast(StepRunner, gates[0])

    with Server(wrap=wrap, clock=clock) as server:
        server.inbox.put(request(1, max_tokens=1))
        assert gates[0].entered.acquire(timeout=PATIENCE_S)
        assert server.heartbeat.verdict(clock.now_s + 59).healthy
        stuck = server.heartbeat.verdict(clock.now_s + 61)
        assert (stuck.healthy, stuck.phase) == (False, Phase.STEPPING)
        gates[0].open.release()
        server.wait(lambda: 1 in server.ends())


def test_an_engine_that_owns_the_collector_leaves_it_as_it_was() -> None:
    assert gc.isenabled()
    with Server(owns_gc=True) as server:
        server.inbox.put(request(1))
        server.wait(lambda: 1 in server.ends())
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_idle_engine_does_its_spare_work_until_there_is_none() -> None:
    calls: list[int] = []
    done = threading.Event()

    def spare() -> bool:
        calls.append(len(calls))
        if len(calls) == 3:
            done.set()
        return len(calls) < 3

    with Server(depth=2, idle=spare) as server:
        assert done.wait(PATIENCE_S)
        server.inbox.put(request(1))
        server.wait_for_end(1)
        assert server.text(1) == solo(request(1))
    assert len(calls) == 3
