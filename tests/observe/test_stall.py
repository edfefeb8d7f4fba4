"""What is a stall and what is not, as tables of beats and looks; and what the watchdog does about one."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from fakes import ManualClock

from vserve.observe.heartbeat import Heartbeat
from vserve.observe.stall import Sight, Stalls
from vserve.observe.watchdog import Watchdog

FINE, BEGUN, LASTS, OVER, ENDED = Sight.FINE, Sight.BEGUN, Sight.LASTS, Sight.OVER, Sight.ENDED
BOUND_S = 60.0

Act = tuple[str, float, float, Sight]
"""What the engine does at a time, how many seconds later looks end that come every second, and the last one's sight."""

STORIES: dict[str, list[Act]] = {
    "loading may take any time": [("none", 0, 1000, FINE)],
    "an idle engine beats every second": [("idle", s, 1, FINE) for s in range(200)],
    "a long prefill beats once a step, each within the bound": [("step", 59 * n, 59, FINE) for n in range(20)],
    "a step up to the bound is none": [("step", 0, 60, FINE)],
    "a step beyond the bound is one": [("step", 0, 61, BEGUN)],
    "it is reported once": [("step", 0, 61, BEGUN), ("none", 61, 500, LASTS)],
    "a beat ends it": [("step", 0, 61, BEGUN), ("step", 61, 1, OVER), ("step", 62, 1, FINE)],
    "the next one is reported again": [
        ("step", 0, 61, BEGUN),
        ("idle", 61, 1, OVER),
        ("step", 62, 60, FINE),
        ("none", 122, 1, BEGUN),
    ],
    "an idle engine that falls silent is one": [("idle", 0, 63, BEGUN)],
    "an engine that has ended is none": [("step", 0, 1, FINE), ("ended", 1, 500, ENDED)],
    "an engine that ends in a stall is none": [("step", 0, 61, BEGUN), ("ended", 61, 1, ENDED)],
}


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_a_stall_is_a_step_beyond_the_bound_and_nothing_else(story: list[Act]) -> None:
    beat, stalls = Heartbeat(0.0), Stalls(BOUND_S, 1.0, 0.0)
    for act, at_s, for_s, expected in story:
        if act != "none":
            getattr(beat, act)(at_s)
        sights = [stalls.look(beat, at_s + second).sight for second in range(1, int(for_s) + 1)]
        assert sights[-1] is expected, (act, at_s)
        assert set(sights[:-1]) <= {FINE, LASTS, ENDED}


@pytest.mark.parametrize("stopped_s", [2.5, 100.0, 86400.0])
@pytest.mark.parametrize("phase", ["step", "idle"])
def test_time_in_which_the_whole_process_stood_still_is_not_held_against_the_engine(
    phase: str, stopped_s: float
) -> None:
    beat, stalls = Heartbeat(0.0), Stalls(BOUND_S, 1.0, 0.0)
    getattr(beat, phase)(0.5)
    assert stalls.look(beat, 1.0).sight is FINE
    woken_s = 1.0 + stopped_s
    sights = [stalls.look(beat, woken_s + second).sight for second in range(100)]
    # The step has its whole bound of running time, and not much more.
    begun = sights.index(BEGUN)
    assert BOUND_S - 3 <= begun <= BOUND_S + 3
    # A step begun after the pause is judged by the clock alone.
    again_s = woken_s + 100.0
    beat.step(again_s)
    sights = [stalls.look(beat, again_s + second).sight for second in range(1, 70)]
    assert sights[0] is OVER
    assert sights.index(BEGUN) == 60


def test_a_stall_dumps_every_thread_once_and_its_end_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    beat = Heartbeat(clock.now_s)
    heard: list[str] = []
    with (tmp_path / "stderr").open("w+") as out:
        dog = Watchdog(beat, 4.0, out, on_stall=heard.append, clock=clock)
        beat.step(clock.now_s)
        for _ in range(10):
            clock.now_s += 1.0
            dog.look()
        assert len(heard) == 1
        out.seek(0)
        text = out.read()
        assert text.count("(most recent call first)") >= 1
        assert text.count(test_a_stall_dumps_every_thread_once_and_its_end_is_logged.__name__) == 1
        assert "hangs" in caplog.text
        with caplog.at_level(logging.WARNING):
            beat.idle(clock.now_s)
            assert dog.look() is OVER
        assert "goes on" in caplog.text
        assert len(heard) == 1


def test_the_timer_finds_a_stall_by_itself_and_stops_when_told_to(tmp_path: Path) -> None:
    async def run() -> int:
        clock, stalled = ManualClock(), asyncio.Event()
        beat = Heartbeat(clock.now_s)
        with (tmp_path / "stderr").open("w") as out:
            dog = Watchdog(beat, 0.04, out, on_stall=lambda _: stalled.set(), clock=clock)
            beat.step(clock.now_s)
            clock.now_s += 0.015
            dog.look()
            dog.start()
            for _ in range(2):  # small steps of the clock: a great one would be a pause of the process
                clock.now_s += 0.01
                assert dog.look() is FINE
            clock.now_s += 0.01
            await asyncio.wait_for(stalled.wait(), 30)
            dog.stop()
            dog.stop()
        return sum(not handle.cancelled() for handle in asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]

    assert asyncio.run(run()) == 0
