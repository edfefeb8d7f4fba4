"""Workers: what the front asks of whoever runs the model's copies; and the one copy that runs in this process.

Event-loop thread only.  The numbers here count data-parallel copies of the model, each with its own engine.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from vserve.errors import BadRequest


class Phase(enum.Enum):
    """What a change of the number of workers is busy with."""

    IDLE = "idle"
    DRAINING = "draining"
    RESIZING = "resizing"


@dataclass(frozen=True, slots=True)
class Scaling:
    """How far a change is.  requested: the size asked for last.  error: why the last change failed."""

    phase: Phase = Phase.IDLE
    requested: int | None = None
    error: str | None = None


class Workers(Protocol):
    """The copies of the model, as the front sees them."""

    @property
    def size(self) -> int:
        """How many serve now, >= 1."""

    @property
    def scaling(self) -> Scaling:
        """The change under way, or what became of the last one."""

    async def resize(self, size: int, drain_timeout_s: float) -> None:
        """Serve with size copies from now on; returns when they do.

        Requests on copies that go get drain_timeout_s seconds to end.  Raises BadRequest for a size that cannot be
        had, Conflict while another change is under way, RequestTimeout when the drain took too long.
        """


class LocalWorker:
    """The one copy in this process: any other size is refused, since there is nobody to start or to end."""

    def __init__(self) -> None:
        self._scaling = Scaling()

    @property
    def size(self) -> int:
        """Always 1."""
        return 1

    @property
    def scaling(self) -> Scaling:
        """Never more than what the last call was told."""
        return self._scaling

    async def resize(self, size: int, drain_timeout_s: float) -> None:
        """See Workers: size 1 is what there is."""
        error = None
        if size != self.size:
            error = f"this server runs one copy of the model in its own process and cannot make it {size}"
        self._scaling = Scaling(requested=size, error=error)
        if error is not None:
            raise BadRequest(f"The size must be 1, got {size}: {error}.", param="new_data_parallel_size")
