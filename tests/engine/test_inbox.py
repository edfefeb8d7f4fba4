"""The inbox loses nothing, keeps each producer's order, and refuses what is too much."""

from __future__ import annotations

import threading
from collections import defaultdict

import pytest

from vserve.engine.inbox import Inbox
from vserve.engine.request import Cancel, GenRequest, RequestId
from vserve.errors import RateLimited, Unavailable

FOREVER_S = 60.0


def request(number: int, prompt_tokens: int = 1) -> GenRequest:
    return GenRequest(id=RequestId(number), prompt=[1] * prompt_tokens, max_tokens=1)


@pytest.mark.parametrize("kind", ["requests", "cancels", "both"])
def test_eight_producers_lose_nothing_and_keep_their_order(kind: str) -> None:
    each, producers = 2000, 8
    inbox = Inbox(each * producers)

    def produce(producer: int) -> None:
        for number in range(each):
            name = RequestId(producer * each + number)
            as_request = kind == "requests" or (kind == "both" and number % 2 == 0)
            inbox.put(request(name) if as_request else Cancel(name))

    threads = [threading.Thread(target=produce, args=(producer,)) for producer in range(producers)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[int]] = defaultdict(list)
    count = 0
    while count < each * producers:
        items = inbox.drain()
        count += len(items)
        for item in items:
            seen[item.id // each].append(item.id % each)
        if not items:
            inbox.park(FOREVER_S)  # a lost wake-up would hang here
    for thread in threads:
        thread.join()
    assert seen == {producer: list(range(each)) for producer in range(producers)}
    assert inbox.size == 0
    assert inbox.drain() == []
    inbox.close()


def test_eight_producers_never_pass_the_limit() -> None:
    inbox = Inbox(100)
    refused: list[int] = []

    def produce(producer: int) -> None:
        for number in range(50):
            try:
                inbox.put(request(producer * 50 + number))
            except RateLimited:
                refused.append(1)

    threads = [threading.Thread(target=produce, args=(producer,)) for producer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inbox.size, len(refused), len(inbox.drain())) == (100, 300, 100)
    inbox.close()


def test_a_full_inbox_refuses_requests_with_a_retry_time_and_still_takes_cancels() -> None:
    inbox = Inbox(2, retry_after=lambda: 7)
    inbox.put(request(1))
    inbox.put(request(2))
    with pytest.raises(RateLimited, match="limit is 2") as refusal:
        inbox.put(request(3))
    assert refusal.value.retry_after_s == 7
    inbox.put(Cancel(RequestId(1)))
    assert [item.id for item in inbox.drain()] == [1, 2, 1]
    inbox.put(request(3))
    assert inbox.size == 1
    inbox.close()


@pytest.mark.promise("R8", "fault: full inbox")
def test_queued_prompt_tokens_are_bounded_but_one_long_request_fits_an_empty_inbox() -> None:
    inbox = Inbox(10, token_limit=100)
    inbox.put(request(1, 500))
    with pytest.raises(RateLimited, match="limit is 100"):
        inbox.put(request(2, 1))
    inbox.drain()
    inbox.put(request(2, 60))
    inbox.put(request(3, 40))
    with pytest.raises(RateLimited):
        inbox.put(request(4, 1))
    assert (inbox.size, inbox.tokens) == (2, 100)
    inbox.close()


def test_requests_that_wait_behind_the_inbox_count_once_the_consumer_reports_them() -> None:
    inbox = Inbox(3, token_limit=100)
    inbox.report_waiting(0, 0)
    for number in range(3):
        inbox.put(request(number, 10))
    assert len(inbox.drain()) == 3
    assert inbox.size == 3  # drained, not yet reported
    with pytest.raises(RateLimited):
        inbox.put(request(9))
    inbox.report_waiting(1, 10)
    assert (inbox.size, inbox.tokens) == (1, 10)
    inbox.put(request(3, 10))
    inbox.put(request(4, 10))
    with pytest.raises(RateLimited):
        inbox.put(request(5))
    inbox.close()


def test_park_returns_at_once_when_something_is_queued_or_a_wake_came_before() -> None:
    inbox = Inbox(3)
    inbox.put(request(1))
    inbox.park(FOREVER_S)
    inbox.drain()
    inbox.wake()
    inbox.park(FOREVER_S)
    inbox.park(0.0)  # the wake was used up: this one returns by its timeout
    inbox.close()


@pytest.mark.parametrize("act", ["request", "cancel", "wake"])
def test_a_parked_consumer_is_woken(act: str) -> None:
    inbox = Inbox(3)
    returned = threading.Event()

    def consume() -> None:
        inbox.park(FOREVER_S)
        returned.set()

    thread = threading.Thread(target=consume)
    thread.start()
    {"request": lambda: inbox.put(request(1)), "cancel": lambda: inbox.put(Cancel(RequestId(1))), "wake": inbox.wake}[
        act
    ]()
    assert returned.wait(30)
    thread.join()
    inbox.close()


def test_a_sealed_inbox_accepts_no_request_and_holds_what_it_had() -> None:
    inbox = Inbox(3)
    inbox.put(request(1))
    inbox.seal()
    with pytest.raises(Unavailable):
        inbox.put(request(2))
    inbox.put(Cancel(RequestId(1)))
    assert [item.id for item in inbox.drain()] == [1, 1]
    inbox.close()


def test_a_closed_inbox_can_be_closed_woken_and_parked_without_harm() -> None:
    inbox = Inbox(3)
    inbox.close()
    inbox.close()
    inbox.wake()
    inbox.put(request(1))
    inbox.park(FOREVER_S)
