"""Uploader: numbers on the host -> a weight on the GPU, through pinned buffers that take turns.

While one buffer is on its way to the device, the next is filled (and converted) from the mapped file; several threads
do so at once, each with two buffers and a stream of its own.  The buffers are given back by ``close``: torch's own
pinned memory would stay with the process.  Knows no file and no model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from vserve.errors import StartupError

BUFFER_BYTES: Final = 16 << 20
"""Long enough that a copy's fixed costs do not count, short enough that the pages are still in the cache."""
BUFFERS: Final = 2
MOST_THREADS: Final = 8
"""Threads that upload at once; more would pin more memory and fill no link faster."""


@dataclass(slots=True)
class _Lane:
    """One thread's buffers, their events (the copy out of it has ended) and its stream."""

    stream: torch.cuda.Stream
    buffers: list[Tensor]
    events: list[torch.cuda.Event]
    turn: int = 0


@dataclass(slots=True, eq=False)
class Uploader:
    """Uploads to one device.  Any thread may call ``rows``; ``close`` comes after the last of them has returned."""

    device: torch.device
    _lanes: list[_Lane] = field(default_factory=list)
    _local: threading.local = field(default_factory=threading.local)

    def rows(self, target: Tensor, part: Callable[[int, int, Tensor], None]) -> None:
        """Fill target [N, ...] on the device.  part(start, stop, out): write rows start to stop to out, on the host.

        Returns when the last rows are on their way; ``close`` waits for them.
        """
        lane = self._lane()
        # What used the target's memory before has been queued on the stream that it was made on.
        lane.stream.wait_stream(torch.cuda.current_stream(self.device))
        row_bytes = target[0].numel() * target.element_size()
        step = max(1, BUFFER_BYTES // row_bytes)
        if row_bytes > BUFFER_BYTES:
            raise StartupError(f"a weight's row of {row_bytes} bytes is larger than any model's that is known")
        with torch.cuda.stream(lane.stream):
            for start in range(0, target.shape[0], step):
                stop = min(start + step, target.shape[0])
                buffer, event = lane.buffers[lane.turn], lane.events[lane.turn]
                lane.turn = (lane.turn + 1) % BUFFERS
                event.synchronize()
                host = buffer[: (stop - start) * row_bytes].view(target.dtype).view(stop - start, *target.shape[1:])
                part(start, stop, host)
                target[start:stop].copy_(host, non_blocking=True)
                event.record(lane.stream)

    def close(self) -> None:
        """Wait for every copy and give the buffers back."""
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.stream.synchronize()
            for buffer in lane.buffers:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))  # type: ignore[no-untyped-call]

    def _lane(self) -> _Lane:
        lane: _Lane | None = getattr(self._local, "lane", None)
        if lane is None:
            lane = _Lane(
                torch.cuda.Stream(self.device),  # type: ignore[no-untyped-call]
                [_pinned() for _ in range(BUFFERS)],
                [torch.cuda.Event() for _ in range(BUFFERS)],  # type: ignore[no-untyped-call]
            )
            self._local.lane = lane
            self._lanes.append(lane)
        return lane


def _pinned() -> Tensor:
    buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), BUFFER_BYTES, 0))  # type: ignore[no-untyped-call]
    return buffer
