"""A generation under way: its choices, its deadline and its end, whoever listens.

Owns how a generation begins and ends, exactly once; knows no connection.  Event-loop thread only; no coroutine wakes
for a token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from vserve.api.access import Caller
from vserve.api.app import App
from vserve.api.choice import Choice
from vserve.api.shapes import Counts
from vserve.bridge import Bridge
from vserve.engine.request import FinishReason, GenRequest
from vserve.errors import ApiError, DeadlineExceeded, InternalError


class Run:
    """The choices of one request; their Listener.

    A subclass says what becomes of the text; ``_submit`` starts it and ``_done`` is the end of it.
    """

    def __init__(self, app: App, bridge: Bridge, choices: Sequence[Choice], request_id: str) -> None:
        """The choices' requests share one deadline.  request_id: for the words of an error."""
        self._app = app
        self._bridge = bridge
        self._choices = choices
        self._request_id = request_id
        self._unfinished = len(choices)
        self._closed = False
        self._error: ApiError | None = None
        self.caller: Caller | None = None  # whose quotas the tokens count against
        self._queued = False
        self._timer: asyncio.TimerHandle | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def text(self, choice: Choice, text: str) -> None:
        """See choice.Listener."""
        choice.keep(text)

    def more(self, choice: Choice) -> None:
        """See choice.Listener."""

    def finished(self, choice: Choice) -> None:
        """See choice.Listener."""
        self._count_down()

    def _count_down(self) -> None:
        self._unfinished -= 1
        if self._unfinished == 0:
            self.end()

    def cancel(self, choice: Choice) -> None:
        """See choice.Listener."""
        if choice.request is not None:
            self._bridge.cancel(choice.request.id, FinishReason.STOP)

    def fail(self, error: ApiError) -> None:
        """End with error; the client sees it.  Does nothing once the run has ended."""
        if self._closed:
            return
        if isinstance(error, InternalError):
            error = InternalError(f"{error.message} (request id {self._request_id})")
        reason = FinishReason.CANCELLED
        if isinstance(error, DeadlineExceeded):
            reason = FinishReason.TIMEOUT
        elif isinstance(error, InternalError):
            reason = FinishReason.ERROR
        self.close(reason)
        self.report(error)

    def report(self, error: ApiError) -> None:
        """Tell of error; the run is closed."""
        self._error = error
        self._wake()

    def end(self) -> None:
        """All choices are finished."""
        self.close()
        self._wake()

    def close(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Stop what still runs and let go of everything shared.  Calling it again changes nothing."""
        if self._closed:
            return
        self._closed = True
        for choice in self._choices:
            choice.close()
            if choice.finish is None and choice.request is not None:
                self._bridge.cancel(choice.request.id, reason)
        if self._timer is not None:
            self._timer.cancel()
        self._app.replies.discard(self)
        if self.caller is not None and self._queued:
            self._app.keys.use(self.caller, self.spent())

    def spent(self) -> int:
        """Tokens of prompts and answers that this run has cost."""
        counts = self.counts()
        return counts.prompt + counts.completion

    def counts(self) -> Counts:
        """Tokens so far.  Each prompt counts once, and so does what its first choice found cached."""
        firsts = [choice for choice in self._choices if choice.first]
        thought = [choice.reasoning_tokens for choice in self._choices if choice.reasoning_tokens is not None]
        return Counts(
            prompt=sum(len(choice.prompt) for choice in firsts),
            completion=sum(choice.num_tokens for choice in self._choices),
            cached=sum(choice.cached_tokens for choice in firsts),
            reasoning=sum(thought) if thought else None,
        )

    def _enter(self) -> None:
        """From now on the end of the server is heard of."""
        self._app.replies.add(self)

    def _submit(self) -> None:
        self._enter()
        for choice in self._choices:
            choice.attach(self)
            if choice.request is not None:
                self._queue(choice, choice.request)
        self._queued = True
        for choice in self._choices:
            if choice.request is None:
                choice.finish = FinishReason.LENGTH
                self.finished(choice)
        self._watch_deadline()

    def _watch_deadline(self) -> None:
        deadline_s = next((choice.request.deadline_s for choice in self._choices if choice.request is not None), None)
        if deadline_s is not None and not self._closed:
            # The engine keeps the deadline too, but a long step must not keep the client waiting.
            left_s = max(0.0, deadline_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(left_s, self._expired)

    def _queue(self, choice: Choice, request: GenRequest) -> None:
        try:
            self._bridge.submit(request, choice)
        except ApiError as error:  # the gate had let it in
            self._app.refused(error)
            raise

    def _expired(self) -> None:
        self.fail(DeadlineExceeded("The request's deadline passed before the answer was complete."))

    def _wake(self) -> None:
        """Let who waits for the end go on.  The future may be done: its task was cancelled, or the run has ended."""
        if not self._done.done():
            self._done.set_result(None)
