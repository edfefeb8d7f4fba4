"""Work: an async handler, begun at once and made a task only where it waits for something.

Most requests are refused, queued or answered without a wait.  As tasks they would cost a pass of the loop, and all that
were read in one pass would run in the next one, before the loop looks at its sockets again: their connections' turns
(turns.py) would bound nothing.  Knows nothing of connections.  L only.
"""

from __future__ import annotations

from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Rest(Coroutine[Any, Any, T], Generic[T]):
    """A coroutine that already waits, for a task to go on with."""

    def __init__(self, work: Coroutine[Any, Any, T], waits_for: object) -> None:
        """waits_for: what work has yielded, which the task has not seen."""
        self._work = work
        self._unseen: object = waits_for
        self._begun = False

    def send(self, value: Any, /) -> Any:
        """See Coroutine."""
        if self._begun:
            return self._work.send(value)
        self._begun = True
        unseen, self._unseen = self._unseen, None
        return unseen

    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None, /) -> Any:
        """See Coroutine.  Before the first send, too: the work is in the middle and has something to clean up."""
        self._begun = True
        return self._work.throw(typ if val is None else val)

    def close(self) -> None:
        """See Coroutine."""
        self._work.close()

    def __await__(self) -> Any:
        raise TypeError("this is for a task, not to be awaited")


def begin(work: Coroutine[Any, Any, T]) -> T | Rest[T]:
    """Run work up to its first wait: what it returned, or the rest of it.  Raises what it raises.

    Until then there is no current task: asyncio.timeout and TaskGroup cannot be entered before the first wait.
    """
    try:
        waits_for = work.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    return Rest(work, waits_for)
