"""How many CPU threads a step is computed with: all of them, or all but one while a neighbour wants a core.

A decode step is a chain of regions of 10 to 50 microseconds, each shared by the threads.  While another process has one
of the cores, every region waits for the scheduler to bring the late thread in, and a step on all threads takes two to
four times what it takes on one fewer (bench/step.py on two cores: 9 ms alone; beside a busy process 25 to 45 on two
threads, 10 on one).  So the processor time of everyone else is looked at a few times a second.  Results differ with the
number of threads by rounding only.  G only: PyTorch's setting is per thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

LOOK_EVERY_S: Final = 0.5
"""The kernel counts in ticks of 10 ms: a shorter look would see mostly its own error."""

SHARED_CORES: Final = 0.3
"""Cores that others use on average while we leave them one; a client on this machine takes less."""

_TICK_S: Final = 0.01
"""What /proc/stat counts in on Linux, whatever the kernel's own tick."""

_IDLE: Final = frozenset((4, 5, 9, 10))
"""Words of a cpu line that are no work of others: idle, waiting for disk, and guest time, which user time holds too."""


class Neighbours:
    """Cores used by other processes, and other virtual machines, on the processors that this process may run on.

    stat: the text of /proc/stat; empty where there is none, and then there are no neighbours.
    """

    def __init__(
        self,
        cpus: frozenset[int],
        stat: Callable[[], str],
        own_s: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._names = frozenset(f"cpu{number}" for number in cpus)
        self._stat, self._own_s, self._clock = stat, own_s, clock
        self._last = self._read()

    def look(self) -> float:
        """Cores used by others on average since the last look, or since this was made; 0.0 when no time has passed."""
        before, self._last = self._last, self._read()
        span_s = self._last[0] - before[0]
        return max(0.0, (self._last[1] - before[1]) / span_s) if span_s > 0.0 else 0.0

    def _read(self) -> tuple[float, float]:
        """(now, seconds of others' work), in seconds."""
        ticks = 0
        for line in self._stat().splitlines():
            words = line.split()
            if words and words[0] in self._names:
                ticks += sum(int(word) for place, word in enumerate(words) if place and place not in _IDLE)
        return self._clock(), ticks * _TICK_S - self._own_s() if ticks else 0.0


class Sharing:
    """How the cores are shared between the token loop and an encoder in one process.  Plain stores, any thread reads.

    total: CPU threads there are.  encoding: whether a batch of texts is being computed.  stepping: whether tokens are.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.encoding = False
        self.stepping: Callable[[], bool] = lambda: False

    @property
    def encoder_threads(self) -> int:
        """All while no tokens are computed, else a quarter."""
        return max(1, self.total // 4) if self.stepping() else self.total

    @property
    def step_threads(self) -> int:
        """What an encoder leaves while it works beside the token loop; all when it rests."""
        return max(1, self.total - max(1, self.total // 4)) if self.encoding else self.total


class StepThreads:
    """Sets PyTorch's threads before each step: all_threads (default: PyTorch's own count), or one fewer.

    limit: most threads now; set where two models compute in one process.
    """

    def __init__(
        self,
        all_threads: int | None = None,
        neighbours: Neighbours | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit: Callable[[], int] | None = None
        self._all = torch.get_num_threads() if all_threads is None else all_threads
        self._neighbours = neighbours or Neighbours(_own_cpus(), _read_stat)
        self._clock = clock
        self._wanted = self._all
        self._next_look_s = clock() + LOOK_EVERY_S

    def prepare(self) -> None:
        """Before a step."""
        now = self._clock()
        if now >= self._next_look_s:
            self._next_look_s = now + LOOK_EVERY_S
            shared = self._neighbours.look() > SHARED_CORES
            self._wanted = max(1, self._all - 1) if shared else self._all
        wanted = self._wanted if self.limit is None else min(self._wanted, self.limit())
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)


def _own_cpus() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def _read_stat() -> str:
    try:
        return Path("/proc/stat").read_text()
    except OSError:
        return ""
