"""Idle is healthy, a silent step is not, and a long prefill within the bound raises no alarm."""

from __future__ import annotations

import pytest

from vserve.observe.heartbeat import Heartbeat, Phase


@pytest.mark.parametrize(
    ("act", "age_s", "healthy"),
    [
        ("none", 10_000.0, True),
        ("idle", 0.0, True),
        ("idle", 59.0, True),
        ("idle", 61.75, True),  # it may be asleep between two beats
        ("idle", 62.25, False),
        ("step", 59.0, True),
        ("step", 61.0, False),
        ("ended", 0.0, False),
    ],
)
def test_the_verdict_follows_from_the_last_beat_and_its_age(act: str, age_s: float, healthy: bool) -> None:
    beat = Heartbeat(100.0)
    if act != "none":
        getattr(beat, act)(100.0)
    verdict = beat.verdict(100.0 + age_s, stall_bound_s=60.0)
    assert verdict.healthy is healthy
    assert verdict.age_s == age_s
    assert (verdict.reason is None) is healthy


def test_a_beat_makes_a_stalled_engine_well_again_and_steps_are_counted() -> None:
    beat = Heartbeat()
    beat.step(0.0)
    assert not beat.verdict(100.0).healthy
    beat.step(100.0)
    assert beat.verdict(100.5).phase is Phase.STEPPING
    assert beat.verdict(100.5).healthy
    assert beat.steps == 2


def test_a_clock_that_was_read_before_the_beat_gives_no_negative_age() -> None:
    beat = Heartbeat()
    beat.idle(5.0)
    assert beat.verdict(4.9).age_s == 0.0
