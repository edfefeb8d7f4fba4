"""Inbox: the one way down from the event loop (L) to the engine thread (G).

A deque whose append and popleft are atomic, and an eventfd that is written only while the consumer is parked, so a
busy engine costs a producer no system call.  It counts what waits and refuses what is too much; it must not know what
a request means beyond its prompt's length.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable

from vserve.engine.request import Cancel, GenRequest
from vserve.errors import RateLimited, Unavailable

Item = GenRequest | Cancel


def _one_second() -> int:
    return 1


class Inbox:
    """Bounded queue of requests and unbounded-by-itself queue of cancels (there is at most one a live request).

    limit: requests that may wait, here and, once the consumer calls ``report_waiting``, in its own waiting line too.
    token_limit: the same for the prompt tokens of those requests; a request longer than that fits an empty line.
    retry_after: whole seconds for Retry-After of a refusal.
    """

    def __init__(
        self,
        limit: int,
        *,
        token_limit: int | None = None,
        retry_after: Callable[[], int] = _one_second,
    ) -> None:
        self._limit = limit
        self._token_limit = token_limit
        self._retry_after = retry_after
        self._items: deque[Item] = deque()
        # Producers against each other: the check and the append are one act.  The consumer takes it once, to seal.
        self._admission = threading.Lock()
        self._accepted = 0  # requests and tokens ever taken in: written by producers
        self._accepted_tokens = 0
        self._drained = 0  # ever handed out: written by the consumer
        self._drained_tokens = 0
        self._released = 0  # no longer waiting: written by the consumer; one store each, so a reader never sees half
        self._released_tokens = 0
        self._consumer_reports = False
        self._parked = False
        self._sealed = False
        self._closed = False
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._event, select.POLLIN)

    @property
    def size(self) -> int:
        """Requests that wait for the engine to start on them.  Any thread."""
        return self._accepted - self._released

    @property
    def tokens(self) -> int:
        """Prompt tokens of those requests.  Any thread."""
        return self._accepted_tokens - self._released_tokens

    def put(self, item: Item) -> None:
        """Queue the item and wake the consumer if it is parked.  Any thread; L in the server.

        A request beyond either bound raises RateLimited, one after ``seal`` Unavailable, and nothing is queued.  A
        Cancel always fits.
        """
        if isinstance(item, GenRequest):
            with self._admission:
                self._check(item)
                self._accepted += 1
                self._accepted_tokens += len(item.prompt)
                self._items.append(item)
        else:
            self._items.append(item)
        if self._parked:
            self.wake()

    def _check(self, request: GenRequest) -> None:
        if self._sealed:
            raise Unavailable("The engine has stopped; the server is shutting down.")
        size, tokens = self.size, self.tokens
        if size >= self._limit:
            raise RateLimited(
                f"{size} requests are waiting, the limit is {self._limit}; try again later.",
                retry_after_s=self._retry_after(),
            )
        if self._token_limit is not None and size and tokens + len(request.prompt) > self._token_limit:
            raise RateLimited(
                f"{tokens} prompt tokens are waiting and the request brings {len(request.prompt)}, "
                f"the limit is {self._token_limit}; try again later.",
                retry_after_s=self._retry_after(),
            )

    def drain(self) -> list[Item]:
        """Everything queued so far, oldest first; a producer's items keep their order.  G only; never blocks."""
        if not self._items:
            return []
        taken: list[Item] = []
        requests = tokens = 0
        for _ in range(len(self._items)):  # what is put meanwhile is the next drain's
            item = self._items.popleft()
            taken.append(item)
            if isinstance(item, GenRequest):
                requests += 1
                tokens += len(item.prompt)
        self._drained += requests
        self._drained_tokens += tokens
        if not self._consumer_reports:
            self._released = self._drained
            self._released_tokens = self._drained_tokens
        return taken

    def report_waiting(self, requests: int, tokens: int) -> None:
        """Say how many drained requests, with how many prompt tokens, still wait in the consumer's own line.  G only.

        From the first call on, drained requests count against the bounds until a report no longer includes them.
        """
        self._consumer_reports = True
        self._released = self._drained - requests
        self._released_tokens = self._drained_tokens - tokens

    def park(self, timeout_s: float) -> None:
        """Sleep until an item or a wake-up is there, or timeout_s seconds have passed.  G only."""
        self._parked = True
        # Flag first, then look again: a producer that saw no flag appended before this look; one that comes after it
        # sees the flag and writes.  In the other order an item could be missed.
        if not self._items and not self._closed:
            self._poll.poll(timeout_s * 1000.0)
        self._parked = False
        if not self._closed:
            try:
                os.eventfd_read(self._event)
            except BlockingIOError:  # nothing was written
                return

    def seal(self) -> None:
        """Accept no request from now on: the next drain holds the last ones.  G only, as it ends."""
        with self._admission:
            self._sealed = True

    def wake(self) -> None:
        """Make the current or the next park return at once.  Any thread."""
        if not self._closed:
            os.eventfd_write(self._event, 1)

    def close(self) -> None:
        """Give the descriptor back, once the consumer has ended.  L only; later items are kept and wake nobody."""
        if not self._closed:
            self._closed = True
            os.close(self._event)
