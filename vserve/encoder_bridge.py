"""What the event loop (L) and the encoder's thread (E) both run: encodings go down, vectors come up.

One wake-up of the loop a batch, however many encodings it finished.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

from vserve.engine.encoding import BatchStats, Encoded, Encoding, EncodingId
from vserve.engine.encoding_queue import EncodingQueue
from vserve.errors import EngineDied, Unavailable

Sink = Callable[[Encoded | EngineDied], None]
"""Where one encoding's end goes.  Called once, on L only; must not block or raise."""


class EncoderMeter(Protocol):
    """Measures what crosses.  Called on L only; must be quick and must not raise."""

    def batch(self, stats: BatchStats) -> None:
        """A batch was computed."""

    def ended(self, encoding: Encoding, encoded: Encoded | None) -> None:
        """An encoding has ended; None: nobody waits for it any more.  Once for each that was submitted."""


class _Unmetered:
    """An EncoderMeter that measures nothing."""

    def batch(self, stats: BatchStats) -> None: ...
    def ended(self, encoding: Encoding, encoded: Encoded | None) -> None: ...


class EncoderBridge:
    """Joins one event loop and one encoder thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: EncodingQueue) -> None:
        self._loop = loop
        self._queue = queue
        self._sinks: dict[EncodingId, tuple[Encoding, Sink]] = {}
        self._ids = itertools.count(1)
        self._death: EngineDied | None = None
        self.meter: EncoderMeter = _Unmetered()

    def next_id(self) -> EncodingId:
        """A fresh id.  L only."""
        return EncodingId(next(self._ids))

    @property
    def death(self) -> EngineDied | None:
        """Why the thread ended, or None while it lives.  L only."""
        return self._death

    @property
    def live(self) -> int:
        """Encodings submitted and not yet ended.  L only."""
        return len(self._sinks)

    def submit(self, encoding: Encoding, sink: Sink) -> None:
        """Queue it.  L only.  Raises RateLimited when the queue is full and Unavailable when the thread is gone."""
        if self._death is not None:
            raise Unavailable("The embedding engine has stopped; the server is shutting down.")
        self._queue.put(encoding)
        self._sinks[encoding.id] = (encoding, sink)

    def cancel(self, id: EncodingId) -> None:
        """Forget it and its sink.  L only; an ended id is ignored."""
        found = self._sinks.pop(id, None)
        if found is not None:
            self._queue.cancel(id)
            self.meter.ended(found[0], None)

    def publish(self, done: Sequence[Encoded], stats: BatchStats | None) -> None:
        """What one batch finished.  E only; never blocks."""
        self._call(self._deliver, done, stats)

    def died(self, error: EngineDied) -> None:
        """The thread has ended with error: every encoding fails, and later ones too.  E only."""
        self._call(self._die, error)

    def stalled(self, error: EngineDied) -> None:
        """As ``died``, for a thread that hangs.  L only."""
        self._die(error)

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop has closed: nobody is left to tell
            return

    def _deliver(self, done: Sequence[Encoded], stats: BatchStats | None) -> None:
        if stats is not None:
            self.meter.batch(stats)
        for encoded in done:
            found = self._sinks.pop(encoded.id, None)
            if found is not None:
                self.meter.ended(found[0], encoded)
                found[1](encoded)

    def _die(self, error: EngineDied) -> None:
        self._death = error
        sinks, self._sinks = self._sinks, {}
        for encoding, sink in sinks.values():
            self.meter.ended(encoding, Encoded(encoding.id, error=str(error)))
            sink(error)
