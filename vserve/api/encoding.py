"""From texts to their vectors or scores: tokens, limits, deadline, the wait for the encoder.

What /v1/embeddings, /score and /rerank share.  Event-loop thread only; long texts are tokenised in the pool.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from vserve.api.app import App
from vserve.api.encoder import EncoderServed
from vserve.api.encoding_requests import EncodingWanted
from vserve.api.generation import deadline
from vserve.api.tracing import trace_of
from vserve.engine.encoding import Encoded, Encoding
from vserve.errors import ApiError, BadRequest, DeadlineExceeded, EngineDied, InternalError
from vserve.http.exchange import Exchange
from vserve.text.encoder_tokenizer import EncoderIds, Input

INLINE_CHARS = 1024
"""Texts of more characters in all are tokenised off the loop: some 0.2 ms."""


async def tokenise(
    app: App, served: EncoderServed, inputs: Sequence[Input], wanted: EncodingWanted, *, add_special: bool = True
) -> list[EncoderIds]:
    """What the encoder reads of each input, cut where that was asked for; for ``check_length`` to look at."""
    model, cut_to = served.model, limit_of(served, wanted)
    if not inputs:
        return []
    most = model.max_tokens if cut_to is None else cut_to

    def work() -> list[EncoderIds]:
        return model.tokenizer.encode_inputs(
            inputs, most, cut=cut_to is not None, add_special=add_special, lower_case=model.lower_case
        )

    size = sum(len(text) if isinstance(text, str) else len(text[0]) + len(text[1]) for text in inputs)
    return work() if size <= INLINE_CHARS else await app.off_loop(work)


def limit_of(served: EncoderServed, wanted: EncodingWanted) -> int | None:
    """Where inputs are cut; None: they are not.  Raises BadRequest for a limit above the model's."""
    most = served.model.max_tokens
    if wanted.truncate is None:
        return None
    if wanted.truncate > most:
        raise BadRequest(
            f"`truncate_prompt_tokens` is {wanted.truncate}, the model reads {most} tokens.",
            param="truncate_prompt_tokens",
        )
    return most if wanted.truncate == -1 else wanted.truncate


def check_length(served: EncoderServed, entry: EncoderIds, path: str) -> None:
    """Raise BadRequest for an input that the model cannot read."""
    most = served.model.max_tokens
    length = len(entry.ids) or entry.length
    if length == 0:
        raise BadRequest(f"`{path}` is empty: it has no tokens.", param=path)
    if length > most:
        raise BadRequest(
            f"`{path}` has {length} tokens, the model reads at most {most}; shorten it or set "
            "`truncate_prompt_tokens` to -1.",
            param=path,
        )


async def encode(
    app: App,
    served: EncoderServed,
    exchange: Exchange,
    ids: Sequence[EncoderIds],
    wanted: EncodingWanted,
    *,
    normalize: bool | None = None,
    dimensions: int | None = None,
) -> Encoded | None:
    """The vectors of ids, each already checked.  None: the client has gone.  Raises ApiError when there are none."""
    bridge = served.model.bridge
    deadline_s = deadline(app, exchange, wanted.timeout_ms)
    if deadline_s is not None and deadline_s <= time.monotonic():
        raise DeadlineExceeded("The request's deadline passed before it could be started.")
    if exchange.gone:
        return None
    encoding = Encoding(
        id=bridge.next_id(),
        texts=[entry.ids for entry in ids],
        types=[entry.types for entry in ids] if any(entry.types for entry in ids) else (),
        normalize=normalize,
        dimensions=dimensions,
        priority=wanted.priority,
        arrival_s=exchange.received_s,
        deadline_s=deadline_s,
    )
    trace = trace_of(exchange)
    if trace is not None:
        trace.tokenised_s = trace.queued_s = time.monotonic()
        trace.model, trace.prompt_tokens = served.model.names[0], sum(map(len, encoding.texts))
    encoded = await _Wait(app, served, exchange, encoding).run()
    if trace is not None and encoded is not None and encoded.timed is not None:
        trace.scheduled_s = encoded.timed.started_s
    if encoded is not None:
        app.keys.use(app.caller(exchange), sum(map(len, encoding.texts)))
    return encoded


class _Wait:
    """One encoding under way: it ends once, by its vectors, an error, its deadline, the client or the shutdown."""

    def __init__(self, app: App, served: EncoderServed, exchange: Exchange, encoding: Encoding) -> None:
        self._app = app
        self._bridge = served.model.bridge
        self._exchange = exchange
        self._encoding = encoding
        self._end: asyncio.Future[Encoded | ApiError | None] = asyncio.get_running_loop().create_future()

    async def run(self) -> Encoded | None:
        """Submit and wait.  However it is left, nothing keeps running."""
        timer: asyncio.TimerHandle | None = None
        try:
            self._submit()
            self._app.replies.add(self)
            self._exchange.on_gone = self._gone
            if self._encoding.deadline_s is not None:
                left_s = max(0.0, self._encoding.deadline_s - time.monotonic())
                timer = asyncio.get_running_loop().call_later(left_s, self._expired)
            end = await self._end
        finally:
            self._bridge.cancel(self._encoding.id)  # nothing where it has ended
            self._app.replies.discard(self)
            self._exchange.on_gone = None
            if timer is not None:
                timer.cancel()
        if isinstance(end, ApiError):
            raise end
        return end

    def _submit(self) -> None:
        try:
            self._bridge.submit(self._encoding, self._finished)
        except ApiError as error:  # the gate had let it in
            self._app.refused(error)
            raise

    def fail(self, error: ApiError) -> None:
        """See app.Ending."""
        self._set(error)

    def _finished(self, end: Encoded | EngineDied) -> None:
        if isinstance(end, EngineDied):
            self._set(InternalError(f"The embedding engine has stopped (request id {self._exchange.id})"))
        elif end.expired:
            self._expired()
        elif end.error is not None:
            self._set(InternalError(f"{end.error} (request id {self._exchange.id})"))
        else:
            self._set(end)

    def _expired(self) -> None:
        self._set(DeadlineExceeded("The request's deadline passed before the answer was complete."))

    def _gone(self) -> None:
        self._set(None)

    def _set(self, end: Encoded | ApiError | None) -> None:
        if not self._end.done():
            self._end.set_result(end)


def timing_header(encoded: Encoded) -> tuple[tuple[str, str], ...]:
    """The Server-Timing header of a reply: milliseconds in the queue and in the encoder."""
    timed = encoded.timed
    if timed is None:
        return ()
    spans = (("queue", timed.arrival_s, timed.started_s), ("encode", timed.started_s, timed.done_s))
    text = ", ".join(f"{name};dur={max(0.0, end - begin) * 1e3:.1f}" for name, begin, end in spans)
    return (("server-timing", text),)
