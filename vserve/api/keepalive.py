"""One timer for all open streams: each that was silent for a while gets a keep-alive comment.

Knows nothing of what a stream carries.  Event-loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

log = logging.getLogger(__name__)


class Quiet(Protocol):
    """A stream that may fall silent."""

    def tick(self) -> None:
        """Called twice an interval: write a comment if nothing was written since the last call."""


class KeepAlive:
    """The set of open streams and their shared timer, which runs only while there are any."""

    def __init__(self, interval_s: float) -> None:
        """interval_s: longest silence on a stream."""
        self._interval_s = interval_s
        self._streams: set[Quiet] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: Quiet) -> None:
        """Watch the stream until ``discard``."""
        self._streams.add(stream)
        if self._timer is None:
            self._arm()

    def discard(self, stream: Quiet) -> None:
        """Stop watching the stream; one not watched is ignored."""
        self._streams.discard(stream)

    def close(self) -> None:
        """Stop the timer."""
        self._streams.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        # A stream that wrote just after a tick is found silent at the second tick after: at most one interval later.
        self._timer = asyncio.get_running_loop().call_later(self._interval_s / 2, self._tick)

    def _tick(self) -> None:
        self._timer = None
        for stream in list(self._streams):
            try:
                stream.tick()
            except Exception:  # the timer would never be set again, and all other streams fall silent
                log.exception("a keep-alive comment failed")
        if self._streams:
            self._arm()
