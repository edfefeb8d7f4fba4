"""EncodingQueue: the bounded line of encodings between the event loop (L) and the encoder's thread (E).

Owns admission, cancelling, deadlines and what goes into the next batch: every waiting request gets a fair share of it,
the rest goes by priority and arrival.  Knows neither torch nor HTTP.  A lock of its own; nobody holds it for long.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vserve.engine.encoding import Encoding, EncodingId
from vserve.errors import RateLimited, Unavailable

Part = tuple["Job", int]
"""A text of a job, by its index."""


def _one_second() -> int:
    return 1


@dataclass(slots=True, eq=False)
class Job:
    """An encoding in work.  E only, once it is taken.

    todo: indices of texts not yet in a batch, the longest first, so that a batch's lengths are alike.  vectors: what
    has been computed.
    """

    encoding: Encoding
    todo: deque[int]
    vectors: dict[int, bytes] = field(default_factory=dict)
    started_s: float | None = None
    closed: bool = False

    @classmethod
    def of(cls, encoding: Encoding) -> Job:
        order = sorted(range(len(encoding.texts)), key=lambda i: -len(encoding.texts[i]))
        return cls(encoding, deque(order))


class EncodingQueue:
    """limit: encodings that wait or are in work; token_limit: their tokens, one longer encoding fits an empty line.

    retry_after: whole seconds for Retry-After of a refusal.
    """

    def __init__(self, limit: int, *, token_limit: int, retry_after: Callable[[], int] = _one_second) -> None:
        self._limit = limit
        self._token_limit = token_limit
        self._retry_after = retry_after
        self._changed = threading.Condition()
        self._jobs: dict[EncodingId, Job] = {}
        self._tokens = 0  # of texts in todo
        self._closed = False
        self._woken = False

    @property
    def size(self) -> int:
        """Encodings not yet done.  Any thread."""
        return len(self._jobs)

    @property
    def tokens(self) -> int:
        """Tokens of texts not yet in a batch.  Any thread."""
        return self._tokens

    def put(self, encoding: Encoding) -> None:
        """Queue it.  L only.  Raises RateLimited beyond a bound, Unavailable once closed; then nothing is queued."""
        job = Job.of(encoding)
        tokens = encoding.tokens
        with self._changed:
            if self._closed:
                raise Unavailable("The embedding engine has stopped; the server is shutting down.")
            if len(self._jobs) >= self._limit:
                raise self._refusal(f"{len(self._jobs)} embedding requests are waiting, the limit is {self._limit}")
            if self._jobs and self._tokens + tokens > self._token_limit:
                raise self._refusal(
                    f"{self._tokens} tokens wait to be embedded and the request brings {tokens}, "
                    f"the limit is {self._token_limit}"
                )
            self._jobs[encoding.id] = job
            self._tokens += tokens
            self._changed.notify()

    def _refusal(self, text: str) -> RateLimited:
        return RateLimited(f"{text}; try again later.", retry_after_s=self._retry_after())

    def cancel(self, id: EncodingId) -> None:
        """Forget it: what is not in a batch yet is never computed.  Any thread; an unknown id is ignored."""
        with self._changed:
            job = self._jobs.pop(id, None)
            if job is not None:
                self._drop(job)

    def _drop(self, job: Job) -> None:
        self._tokens -= sum(len(job.encoding.texts[i]) for i in job.todo)
        job.todo.clear()
        job.closed = True

    def finish(self, job: Job) -> bool:
        """It is done or has failed.  False when it was cancelled meanwhile.  E only."""
        with self._changed:
            if job.closed:
                return False
            del self._jobs[job.encoding.id]
            self._drop(job)
            return True

    def expired(self, now_s: float) -> list[Job]:
        """Those whose deadline has passed, taken out of the line.  E only."""
        with self._changed:
            late = [
                job
                for job in self._jobs.values()
                if job.encoding.deadline_s is not None and job.encoding.deadline_s <= now_s
            ]
            for job in late:
                del self._jobs[job.encoding.id]
                self._drop(job)
            return late

    def take(self, token_budget: int, text_limit: int) -> list[Part]:
        """The next batch, sorted by length: at most text_limit texts and token_budget tokens, or one text.  E only."""
        with self._changed:
            waiting = sorted(
                (job for job in self._jobs.values() if job.todo),
                key=lambda job: (job.encoding.priority, job.encoding.arrival_s, job.encoding.id),
            )
            if not waiting:
                return []
            taken: list[Part] = []
            # Two rounds: a share each, so that a short request need not wait for a long one; then the rest in order.
            left = token_budget
            for share in (max(1, token_budget // len(waiting)), token_budget):
                for job in waiting:
                    left = self._fill(job, taken, min(left, share), left, text_limit)
            self._tokens -= sum(len(job.encoding.texts[i]) for job, i in taken)
        taken.sort(key=lambda part: len(part[0].encoding.texts[part[1]]))
        return taken

    @staticmethod
    def _fill(job: Job, taken: list[Part], share: int, left: int, text_limit: int) -> int:
        """Move texts of job to taken while they fit its share; returns the budget that is left."""
        while job.todo and len(taken) < text_limit:
            size = len(job.encoding.texts[job.todo[0]])
            if size > share and taken:
                break
            taken.append((job, job.todo.popleft()))
            share -= size
            left -= size
        return left

    def wait(self, timeout_s: float) -> None:
        """Sleep until there is work, the queue is closed or timeout_s seconds have passed.  E only."""
        with self._changed:
            if not (self._tokens or self._closed or self._woken):
                self._changed.wait(timeout_s)
            self._woken = False

    def wake(self) -> None:
        """Make the current or the next wait return at once.  Any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> Sequence[Job]:
        """Accept nothing from now on; returns what was not done.  Any thread."""
        with self._changed:
            self._closed = True
            left = list(self._jobs.values())
            for job in left:
                self._drop(job)
            self._jobs.clear()
            self._changed.notify_all()
            return left


class Pace:
    """How many tokens a batch may have to last about target_s seconds, from how long the last ones took."""

    def __init__(self, target_s: float, low: int, high: int) -> None:
        self._target_s, self._low, self._high = target_s, low, high
        self._rate: float | None = None

    @property
    def budget(self) -> int:
        """Tokens of the next batch."""
        if self._rate is None:
            return self._low
        return max(self._low, min(self._high, int(self._rate * self._target_s)))

    def saw(self, tokens: int, seconds: float) -> None:
        """A batch of so many tokens took so long."""
        rate = tokens / max(seconds, 1e-6)
        self._rate = rate if self._rate is None else 0.75 * self._rate + 0.25 * rate
