"""When garbage is collected: little and often under load, everything only in idle moments and seldom."""

from __future__ import annotations

import gc

import pytest

from vserve.engine.collector import OLD_S, WHOLE_S, YOUNG, Collector


class Garbage:
    """Counts new objects, and what is collected."""

    def __init__(self) -> None:
        self.new = 0
        self.collected: list[int] = []
        self.collector = Collector(self.collect, lambda: (self.new, 0, 0))

    def collect(self, generation: int) -> int:
        self.collected.append(generation)
        self.new = 0
        return 0


@pytest.mark.parametrize(("new_a_step", "steps", "times"), [(0, 100, 0), (1, YOUNG - 1, 0), (YOUNG // 10, 100, 10)])
def test_under_load_only_young_objects_are_looked_at(new_a_step: int, steps: int, times: int) -> None:
    garbage = Garbage()
    for step in range(steps):
        garbage.new += new_a_step
        garbage.collector.stepped(step * 0.001)
    assert garbage.collected == [0] * times


def test_under_a_load_without_a_pause_older_ones_are_looked_at_now_and_then() -> None:
    garbage = Garbage()
    for second in range(int(3.5 * OLD_S)):
        garbage.collector.stepped(1e6 + second)
    assert garbage.collected == [1] * 3


def test_a_pause_starts_that_time_anew() -> None:
    garbage = Garbage()
    for round_ in range(20):
        garbage.collector.stepped(round_ * OLD_S / 2)
        garbage.collector.idle(round_ * OLD_S / 2 + 1)
    assert 1 not in garbage.collected


@pytest.mark.parametrize(("pause_s", "times"), [(1.0, 2), (WHOLE_S / 2, 50), (WHOLE_S, 100)])
def test_all_are_looked_at_in_idle_moments_once_in_a_while(pause_s: float, times: int) -> None:
    garbage = Garbage()
    for moment in range(100):
        garbage.collector.stepped(moment * pause_s)
        garbage.collector.idle(moment * pause_s)
    assert garbage.collected == [2] * times


def test_idle_time_without_steps_collects_nothing() -> None:
    garbage = Garbage()
    garbage.collector.idle(0.0)
    garbage.collector.stepped(1.0)
    for second in range(1, 1000):
        garbage.collector.idle(float(second))
    assert garbage.collected == [2]


def test_the_real_collector_finds_a_cycle_among_new_objects() -> None:
    class Node:
        def __init__(self) -> None:
            self.itself = self

    collector = Collector()
    collector.start()
    try:
        found: list[int] = []
        gc.callbacks.append(lambda phase, info: found.append(info["collected"]) if phase == "stop" else None)
        for step in range(YOUNG):
            Node()
            collector.stepped(step * 0.001)
        assert sum(found) >= YOUNG // 2
    finally:
        gc.callbacks.pop()
        collector.end()
    assert gc.isenabled()
