"""How many CPU threads a step is computed with.

Two things set it.  A decode step is made of regions of 10 to 50 microseconds; when the threads of such a region do not
all run at once, because the event loop or a neighbour has one of the cores, each region waits for the scheduler's
next slice, and a step of 5 ms takes 100.  So small steps leave one core free.  A long prompt has regions of
milliseconds, and there the last core pays.  Called on the engine's thread only: PyTorch's setting is per thread.
"""

from __future__ import annotations

import torch

SMALL_STEP_TOKENS = 2
"""Most tokens of a step that leaves one core free."""


class StepThreads:
    """Sets PyTorch's threads for steps on a machine whose full count is all_threads (default: PyTorch's own count)."""

    def __init__(self, all_threads: int | None = None) -> None:
        self._all = torch.get_num_threads() if all_threads is None else all_threads
        self._few = max(1, self._all - 1)

    def prepare(self, tokens: int) -> None:
        """For a step of so many tokens."""
        wanted = self._few if tokens <= SMALL_STEP_TOKENS else self._all
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
