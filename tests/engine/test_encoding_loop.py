"""The encoder's thread: results, failures of one text, deadlines, the end."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from vserve.encoder_bridge import EncoderBridge
from vserve.engine.encoding import Encoded, Encoding
from vserve.engine.encoding_loop import EncodingLoop
from vserve.engine.encoding_queue import EncodingQueue, Pace
from vserve.errors import EngineDied, Unavailable
from vserve.observe.heartbeat import Heartbeat

POISON, NAN = 99, 98


class Sums:
    """A model whose vector of a text is (sum, length, 2)."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.gate.set()

    def encode(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] = ()) -> torch.Tensor:
        self.entered.set()
        assert self.gate.wait(30)
        if any(POISON in text for text in texts):
            raise RuntimeError("poison")
        self.seen += [text[0] for text in texts]
        return torch.tensor(
            [[float("nan") if NAN in text else float(sum(text)), float(len(text)), 2.0] for text in texts]
        )


class Stand:
    def __init__(self, loop: asyncio.AbstractEventLoop, normalize: bool) -> None:
        self.loop = loop
        self.model = Sums()
        self.queue = EncodingQueue(16, token_limit=1000)
        self.bridge = EncoderBridge(loop, self.queue)
        self.heartbeat = Heartbeat(time.monotonic())
        self.engine = EncodingLoop(
            self.queue, self.model, self.bridge.publish, self.bridge.died, self.heartbeat, Pace(1.0, 64, 64),
            normalize=normalize,
        )  # fmt: skip
        self.thread = threading.Thread(target=self.engine.run, daemon=True)

    def send(self, *texts: list[int], **rest: object) -> asyncio.Future[Encoded | EngineDied]:
        future: asyncio.Future[Encoded | EngineDied] = self.loop.create_future()
        request = Encoding(self.bridge.next_id(), texts, **rest)  # type: ignore[arg-type]
        self.bridge.submit(request, future.set_result)
        return future

    def ask(self, *texts: list[int], **rest: object) -> Encoded:
        end = self.loop.run_until_complete(asyncio.wait_for(self.send(*texts, **rest), 30))
        assert isinstance(end, Encoded)
        return end


@contextmanager
def standing(*, normalize: bool = False) -> Iterator[Stand]:
    loop = asyncio.new_event_loop()
    stand = Stand(loop, normalize)
    stand.thread.start()
    try:
        yield stand
    finally:
        stand.model.gate.set()
        stand.engine.stop()
        stand.thread.join(30)
        loop.close()
        assert not stand.thread.is_alive()


def numbers(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"{len(vector) // 4}f", vector)


def test_vectors_come_in_the_order_of_the_texts() -> None:
    with standing() as stand:
        end = stand.ask([3], [1, 2, 5], [4, 4])
        assert [numbers(vector) for vector in end.vectors] == [(3, 1, 2), (8, 3, 2), (8, 2, 2)]
        assert end.timed is not None
        assert end.timed.started_s <= end.timed.done_s


def test_vectors_are_cut_and_normalised_as_asked() -> None:
    with standing(normalize=True) as stand:
        assert numbers(stand.ask([4, 0, 0, 0], dimensions=2).vectors[0]) == pytest.approx((0.5**0.5, 0.5**0.5))
        assert numbers(stand.ask([4, 0, 0, 0], dimensions=2, normalize=False).vectors[0]) == (4, 4)
        assert sum(x * x for x in numbers(stand.ask([4, 7]).vectors[0])) == pytest.approx(1)


@pytest.mark.parametrize("bad", [POISON, NAN])
def test_a_text_that_fails_fails_its_own_request_alone(bad: int) -> None:
    with standing() as stand:
        stand.model.gate.clear()
        first = stand.send([1])
        assert stand.model.entered.wait(30)
        futures = [stand.send([2], [3]), stand.send([bad], [5]), stand.send([6])]  # one batch
        stand.model.gate.set()
        ends = stand.loop.run_until_complete(asyncio.wait_for(asyncio.gather(first, *futures), 30))
        errors = [end.error for end in ends if isinstance(end, Encoded)]
        assert errors == [None, None, "The model failed on one of the texts.", None]
        assert stand.ask([7]).error is None
        assert stand.bridge.live == 0
        assert (stand.queue.size, stand.queue.tokens) == (0, 0)


def test_what_is_cancelled_while_it_waits_is_never_computed() -> None:
    with standing() as stand:
        stand.model.gate.clear()
        first = stand.send([1])
        assert stand.model.entered.wait(30)
        request = Encoding(stand.bridge.next_id(), [[50]])
        stand.bridge.submit(request, lambda end: pytest.fail("nobody waits"))
        stand.bridge.cancel(request.id)
        stand.model.gate.set()
        stand.loop.run_until_complete(asyncio.wait_for(first, 30))
        stand.ask([2])
        assert 50 not in stand.model.seen


def test_a_request_past_its_deadline_is_not_computed() -> None:
    with standing() as stand:
        end = stand.ask([50], deadline_s=time.monotonic() - 1)
        assert end.expired
        assert 50 not in stand.model.seen


def test_stopping_ends_what_waits() -> None:
    with standing() as stand:
        stand.model.gate.clear()
        stand.send([1])
        assert stand.model.entered.wait(30)
        waiting = stand.send([2])
        stand.engine.stop()
        stand.model.gate.set()
        end = stand.loop.run_until_complete(asyncio.wait_for(waiting, 30))
        assert isinstance(end, Encoded)
        assert end.error == "The server is stopping."
        stand.thread.join(30)
        assert not stand.heartbeat.verdict(time.monotonic()).healthy
        with pytest.raises(Unavailable):
            stand.send([3])


def test_a_broken_loop_fails_everything_and_later_requests() -> None:
    with standing() as stand:
        stand.engine._pace = None  # type: ignore[assignment]  # what only a bug could do
        end = stand.loop.run_until_complete(asyncio.wait_for(stand.send([1]), 30))
        assert isinstance(end, EngineDied) or end.error is not None
        stand.thread.join(30)
        stand.loop.run_until_complete(asyncio.sleep(0))
        with pytest.raises(Unavailable):
            stand.send([2])
