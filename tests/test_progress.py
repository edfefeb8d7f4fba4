"""Progress: a bar where there is a terminal, quiet lines where there is none."""

from __future__ import annotations

import io

import pytest

from vserve.observe.progress import Progress, Reporter, draw


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (Progress("warming up", 0, 0), "warming up …"),
        (Progress("warming up", 3, 0), "warming up 3"),
        (Progress("loading", 1, 2), "loading [############------------]  50% 1/2"),
        (Progress("loading", 98_000_000, 98_000_000), "loading [########################] 100% 98 MB/98 MB"),
        (Progress("loading", 9, 2), "loading [########################] 100% 9/2"),
    ],
)
def test_a_phase_is_drawn_as_one_line(progress: Progress, line: str) -> None:
    assert draw(progress) == line


def test_a_terminal_gets_a_bar_redrawn_in_place() -> None:
    out, clock, seen = Terminal(), ManualClock(), list[Progress]()
    reporter = Reporter(out, seen.append, clock)
    reporter.begin("loading", 4)
    for done in range(1, 5):
        clock.now += 0.5
        reporter.update(done, 4)
    reporter.end()
    assert out.getvalue().count("\r") == 6
    assert out.getvalue().endswith("\r\x1b[Kloading: 2.00 s\n")
    assert [progress.done for progress in seen] == [0, 1, 2, 3, 4]


def test_a_log_gets_a_line_at_the_end_and_one_now_and_then() -> None:
    out, clock = io.StringIO(), ManualClock()
    reporter = Reporter(out, lambda progress: None, clock)
    reporter.begin("loading", 10)
    for done in range(1, 11):
        clock.now += 1.0
        reporter.update(done, 10)
    reporter.begin("warming up")
    assert out.getvalue().splitlines() == [
        "loading [############------------]  50% 5/10",
        "loading [########################] 100% 10/10",
        "loading: 10.00 s",
    ]


def test_fast_updates_are_not_all_drawn_but_all_handed_on() -> None:
    out, seen = Terminal(), list[Progress]()
    reporter = Reporter(out, seen.append, ManualClock())
    reporter.begin("loading", 1000)
    for done in range(1000):
        reporter.update(done, 1000)
    assert out.getvalue().count("\r") == 1
    assert len(seen) == 1001
