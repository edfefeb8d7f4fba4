"""The embedding model as the routes see it: its names, limits and queue, and what its batches say to the metrics.

Event-loop thread only.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

from vserve.encoder_bridge import EncoderBridge
from vserve.engine.encoding import BatchStats, Encoded, Encoding
from vserve.errors import BadRequest, NotFound, RateLimited, shorten
from vserve.observe.encoder_series import EncoderSeries
from vserve.observe.heartbeat import Heartbeat
from vserve.text.encoder_tokenizer import EncoderTokenizer

RETRY_LIMIT_S = 60


class Line(Protocol):
    """The queue in front of the encoder, as far as the gate looks at it."""

    @property
    def size(self) -> int:
        """Requests not yet done."""

    @property
    def tokens(self) -> int:
        """Tokens not yet in a batch."""


@dataclass(frozen=True, slots=True)
class EncoderModel:
    """What exists once the embedding model is loaded.

    names: what clients call it, the default first.  size: numbers in a vector.  cross: it scores pairs and makes no
    vectors.  dimensions: sizes that a vector may be cut to, None for any.  lower_case: texts are, before anything else.
    """

    names: tuple[str, ...]
    tokenizer: EncoderTokenizer
    bridge: EncoderBridge
    waiting: Line
    heartbeat: Heartbeat
    max_tokens: int
    vocab_size: int
    size: int
    cross: bool = False
    dimensions: tuple[int, ...] | None = ()
    lower_case: bool = False


class EncoderServed:
    """An EncoderModel being served.  generative: names of the model beside it."""

    def __init__(self, model: EncoderModel, max_requests: int, max_tokens: int) -> None:
        self.model = model
        self.created_s = int(time.time())
        self.generative: tuple[str, ...] = ()
        self.series = EncoderSeries(model.names[0], lambda: (model.waiting.size, model.waiting.tokens))
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._seconds_a_token = 0.0
        model.bridge.meter = self

    @property
    def vocab_size(self) -> int:
        """How many ids the model knows: every id of a request is below it."""
        return self.model.vocab_size

    def name(self, asked: str | None) -> str:
        """The name that replies show: the first.  Raises BadRequest for the generative model's, NotFound for others."""
        names = self.model.names
        if not asked or asked in names:
            return names[0]
        shown = shorten(asked)[1:-1]
        if asked in self.generative:
            raise BadRequest(
                f"The model `{shown}` generates text and makes no embeddings; use {', '.join(names)}.", param="model"
            )
        raise NotFound(f"The model `{shown}` does not exist. Valid models: {', '.join(names)}", param="model")

    def overloaded(self) -> RateLimited | None:
        """The 429 for a full queue, or None while there is room."""
        waiting = self.model.waiting
        for count, limit, what in (
            (waiting.size, self._max_requests, "embedding requests"),
            (waiting.tokens, self._max_tokens, "tokens to embed"),
        ):
            if count >= limit:
                text = f"{count} {what} are waiting, the limit is {limit}; try again later."
                return RateLimited(text, retry_after_s=self.retry_after_s())
        return None

    def retry_after_s(self) -> int:
        """Whole seconds until what waits is probably done, by the speed of the last batch."""
        return max(1, min(RETRY_LIMIT_S, math.ceil(self.model.waiting.tokens * self._seconds_a_token)))

    def batch(self, stats: BatchStats) -> None:
        """See encoder_bridge.EncoderMeter."""
        self._seconds_a_token = stats.seconds / max(1, stats.tokens)
        self.series.batch_texts.observe(stats.texts)
        self.series.batch_tokens.observe(stats.tokens)
        self.series.batch_time.observe(stats.seconds)

    def ended(self, encoding: Encoding, encoded: Encoded | None) -> None:
        """See encoder_bridge.EncoderMeter."""
        series = self.series
        now_s = time.monotonic()
        late = encoding.deadline_s is not None and now_s >= encoding.deadline_s
        if encoded is None:
            outcome = "timeout" if late else "abort"
        elif encoded.error is None:
            outcome = "ok"
            series.texts_total += len(encoding.texts)
            series.tokens_total += encoding.tokens
        else:
            outcome = "timeout" if encoded.expired else "error"
        series.requests[outcome] += 1
        series.latency.observe(max(0.0, now_s - encoding.arrival_s))
        if encoded is not None and encoded.timed is not None:
            series.queue_time.observe(max(0.0, encoded.timed.started_s - encoded.timed.arrival_s))
