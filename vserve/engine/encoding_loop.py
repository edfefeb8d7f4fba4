"""EncodingLoop: the encoder's thread (E) from its first to its last instruction.

Takes a batch from the queue, computes it, hands finished encodings over.  A batch that fails is computed again text by
text, so that only the text at fault fails; anything else raised here ends the loop, once, through ``died``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vserve.engine.encoding import BatchStats, Encoded, Encoding, Timed
from vserve.engine.encoding_queue import EncodingQueue, Job, Pace, Part
from vserve.errors import EngineDied
from vserve.observe.heartbeat import Heartbeat

log = logging.getLogger(__name__)

PARK_S: Final = 1.0
TEXT_LIMIT: Final = 256
"""Most texts of a batch."""


class Computes(Protocol):
    """What makes rows of texts: see model.encoder.Encoder.encode."""

    def encode(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] = ()) -> Tensor: ...


class EncodingLoop:
    """Runs on E by ``run``; ``stop`` is for any thread.

    normalize: the model's own choice.  prepare: called before each batch.  publish: takes what one batch finished;
    must not block.  died: called at most once, as the last act, when the loop ends for any reason but ``stop``.
    """

    def __init__(
        self,
        queue: EncodingQueue,
        encoder: Computes,
        publish: Callable[[Sequence[Encoded], BatchStats | None], None],
        died: Callable[[EngineDied], None],
        heartbeat: Heartbeat,
        pace: Pace,
        *,
        normalize: bool,
        prepare: Callable[[bool], None] = lambda busy: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._encoder = encoder
        self._publish = publish
        self._died = died
        self._heartbeat = heartbeat
        self._pace = pace
        self._normalize = normalize
        self._prepare = prepare
        self._clock = clock
        self._stopping = False

    def stop(self) -> None:
        """End after the batch in hand; what still waits then ends with an error.  Any thread."""
        self._stopping = True
        self._queue.wake()

    def run(self) -> None:
        """Serve until ``stop`` or a failure.  The body of E, called once."""
        try:
            while not self._stopping:
                self._turn()
            self._end()
        except BaseException as error:
            log.exception("the embedding engine has ended")
            self._heartbeat.ended(self._clock())
            self._end()
            self._died(EngineDied(f"The embedding engine has ended: {type(error).__name__}"))
        finally:
            self._heartbeat.ended(self._clock())
            self._prepare(False)

    def _turn(self) -> None:
        now_s = self._clock()
        late = [Encoded(job.encoding.id, expired=True, error="expired") for job in self._queue.expired(now_s)]
        if late:
            self._publish(late, None)
        batch = self._queue.take(self._pace.budget, TEXT_LIMIT)
        if not batch:
            self._prepare(False)
            self._heartbeat.idle(now_s)
            self._queue.wait(PARK_S)
            return
        self._heartbeat.step(now_s)
        self._prepare(True)
        for job, _ in batch:
            if job.started_s is None:
                job.started_s = now_s
        failed = self._compute(batch)
        tokens = sum(len(job.encoding.texts[i]) for job, i in batch)
        done_s = self._clock()
        self._pace.saw(tokens, done_s - now_s)
        self._publish(self._finished(batch, failed, done_s), BatchStats(len(batch), tokens, done_s - now_s))

    def _compute(self, batch: Sequence[Part]) -> set[Job]:
        """Fill in the vectors of the batch; returns the jobs that failed."""
        try:
            self._store(batch)
            return set()
        except Exception:
            log.exception("a batch of %d texts failed; computing them one by one", len(batch))
        failed: set[Job] = set()
        for part in batch:
            if part[0] in failed:
                continue
            try:
                self._store([part])
            except Exception:
                log.exception("a text of %d tokens failed", len(part[0].encoding.texts[part[1]]))
                failed.add(part[0])
        return failed

    def _store(self, batch: Sequence[Part]) -> None:
        texts = [job.encoding.texts[i] for job, i in batch]
        types = [job.encoding.types[i] if job.encoding.types else () for job, i in batch]
        rows = self._encoder.encode(texts, types)
        if not bool(torch.isfinite(rows).all()):
            raise ArithmeticError("the model gave numbers that are not finite")
        unit = functional.normalize(rows, dim=1) if rows.shape[1] > 1 else rows
        for place, (job, i) in enumerate(batch):
            job.vectors[i] = self._shaped(rows[place], unit[place], job.encoding)

    def _shaped(self, row: Tensor, unit: Tensor, encoding: Encoding) -> bytes:
        """The bytes of one vector as its request wants it."""
        normal = self._normalize if encoding.normalize is None else encoding.normalize
        vector = unit if normal else row
        if encoding.dimensions is not None and encoding.dimensions < vector.shape[0]:
            vector = vector[: encoding.dimensions]
            if normal:
                vector = functional.normalize(vector, dim=0)
        return vector.numpy().tobytes()

    def _finished(self, batch: Sequence[Part], failed: set[Job], done_s: float) -> list[Encoded]:
        done: list[Encoded] = []
        for job in dict.fromkeys(job for job, _ in batch):
            count = len(job.encoding.texts)
            if job in failed:
                if self._queue.finish(job):
                    done.append(Encoded(job.encoding.id, error="The model failed on one of the texts."))
            elif len(job.vectors) == count and self._queue.finish(job):
                timed = Timed(job.encoding.arrival_s, job.started_s or done_s, done_s)
                done.append(Encoded(job.encoding.id, [job.vectors[i] for i in range(count)], timed=timed))
        return done

    def _end(self) -> None:
        left = [Encoded(job.encoding.id, error="The server is stopping.") for job in self._queue.close()]
        self._publish(left, None)
