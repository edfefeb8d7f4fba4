"""Progress of long work: a bar on a terminal, a log line now and then anywhere else.

Knows nothing of what is being done; the caller names the phase and counts the units.  One thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

BAR_WIDTH = 24
REDRAW_S = 0.1
LOG_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one phase is: done of total units (total 0 when unknown)."""

    phase: str
    done: int
    total: int

    @property
    def share(self) -> float | None:
        """done / total in [0, 1], or None when the total is unknown."""
        return min(1.0, self.done / self.total) if self.total else None


class Reporter:
    """Shows phases one after the other and hands each Progress on to ``listen`` (the status that probes read).

    out: where to draw; a terminal gets one line redrawn in place, any other stream a line per phase and one each
    LOG_EVERY_S within it.  clock: seconds, monotonic.
    """

    def __init__(
        self, out: TextIO, listen: Callable[[Progress], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._out = out
        self._listen = listen
        self._clock = clock
        self._bar = out.isatty()
        self._phase = ""
        self._began_s = 0.0
        self._shown_s = 0.0

    def begin(self, phase: str, total: int = 0) -> None:
        """Start a phase; the one before it is closed."""
        self.end()
        self._phase = phase
        self._began_s = self._shown_s = self._clock()
        self._show(Progress(phase, 0, total), force=True)

    def update(self, done: int, total: int) -> None:
        """done of total units of the current phase; cheap enough to be called for every piece."""
        self._show(Progress(self._phase, done, total), force=False)

    def end(self) -> None:
        """Close the current phase, if one is open, with the time it took."""
        if not self._phase:
            return
        took = self._clock() - self._began_s
        line = f"{self._phase}: {took:.2f} s"
        self._out.write(f"\r\x1b[K{line}\n" if self._bar else f"{line}\n")
        self._out.flush()
        self._phase = ""

    def _show(self, progress: Progress, force: bool) -> None:
        self._listen(progress)
        now = self._clock()
        if not force and now - self._shown_s < (REDRAW_S if self._bar else LOG_EVERY_S):
            return
        self._shown_s = now
        if self._bar:
            self._out.write(f"\r\x1b[K{draw(progress)}")
            self._out.flush()
        elif not force:
            self._out.write(f"{draw(progress)}\n")
            self._out.flush()


def draw(progress: Progress) -> str:
    """One line without a line end: ``loading weights [########----------------] 33% 32/98 MB``."""
    share = progress.share
    if share is None:
        return f"{progress.phase} …" if not progress.done else f"{progress.phase} {_amount(progress.done)}"
    full = round(share * BAR_WIDTH)
    bar = "#" * full + "-" * (BAR_WIDTH - full)
    return f"{progress.phase} [{bar}] {share:4.0%} {_amount(progress.done)}/{_amount(progress.total)}"


def _amount(units: int) -> str:
    return f"{units / 1e6:.0f} MB" if units >= 1_000_000 else str(units)
