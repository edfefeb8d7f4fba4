"""The line in front of the encoder: bounds, shares, order, cancelling, deadlines."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vserve.engine.encoding import Encoding, EncodingId
from vserve.engine.encoding_queue import EncodingQueue, Pace
from vserve.errors import RateLimited, Unavailable


def encoding(id: int, *sizes: int, priority: int = 0, deadline_s: float | None = None) -> Encoding:
    return Encoding(EncodingId(id), [[id] * size for size in sizes], priority=priority, deadline_s=deadline_s)


def queue(limit: int = 64, token_limit: int = 10_000) -> EncodingQueue:
    return EncodingQueue(limit, token_limit=token_limit, retry_after=lambda: 7)


def taken(line: EncodingQueue, budget: int, texts: int = 256) -> list[tuple[int, int]]:
    return [(job.encoding.id, len(job.encoding.texts[i])) for job, i in line.take(budget, texts)]


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=8),
    st.integers(1, 64),
    st.integers(1, 8),
)
def test_every_text_is_taken_once_within_the_budget_and_sorted(
    requests: list[list[int]], budget: int, text_limit: int
) -> None:
    line = queue()
    for id, sizes in enumerate(requests):
        line.put(encoding(id, *sizes))
    seen: list[tuple[int, int]] = []
    while batch := line.take(budget, text_limit):
        sizes = [len(job.encoding.texts[i]) for job, i in batch]
        assert sizes == sorted(sizes)
        assert len(batch) <= text_limit
        assert len(batch) == 1 or sum(sizes) <= budget
        seen += [(job.encoding.id, i) for job, i in batch]
        assert line.tokens == sum(map(sum, requests)) - sum(requests[id][i] for id, i in seen)
    assert sorted(seen) == [(id, i) for id, sizes in enumerate(requests) for i in range(len(sizes))]
    assert line.tokens == 0


def test_a_short_request_shares_the_next_batch_with_a_long_one() -> None:
    line = queue()
    line.put(encoding(1, *[10] * 50))
    line.put(encoding(2, 5))
    assert (2, 5) in taken(line, 40)


def test_lower_priority_numbers_go_first() -> None:
    line = queue()
    line.put(encoding(1, 10, priority=5))
    line.put(encoding(2, 10, priority=-1))
    assert taken(line, 10) == [(2, 10)]


def test_a_text_over_the_budget_is_taken_alone() -> None:
    line = queue()
    line.put(encoding(1, 100))
    line.put(encoding(2, 1))
    assert taken(line, 8) == [(1, 100)]
    assert taken(line, 8) == [(2, 1)]


def test_more_requests_than_the_limit_are_refused() -> None:
    line = queue(limit=2)
    line.put(encoding(1, 1))
    line.put(encoding(2, 1))
    with pytest.raises(RateLimited, match="2 embedding requests are waiting, the limit is 2") as refused:
        line.put(encoding(3, 1))
    assert refused.value.retry_after_s == 7
    line.cancel(EncodingId(1))
    line.put(encoding(3, 1))
    assert line.size == 2


def test_more_tokens_than_the_limit_are_refused_but_for_one_request_alone() -> None:
    line = queue(token_limit=10)
    line.put(encoding(1, 50))
    with pytest.raises(RateLimited, match="50 tokens wait to be embedded and the request brings 1"):
        line.put(encoding(2, 1))
    line.cancel(EncodingId(1))
    assert line.tokens == 0
    line.put(encoding(2, 1))


def test_what_is_cancelled_is_never_taken_and_its_end_is_nobodys() -> None:
    line = queue()
    line.put(encoding(1, 3, 3))
    ((job, _),) = line.take(3, 1)
    line.cancel(EncodingId(1))
    assert line.take(100, 10) == []
    assert not line.finish(job)
    assert (line.size, line.tokens) == (0, 0)


def test_a_deadline_takes_a_request_out_of_the_line() -> None:
    line = queue()
    line.put(encoding(1, 3, deadline_s=5.0))
    line.put(encoding(2, 3, deadline_s=6.0))
    assert line.expired(4.9) == []
    assert [job.encoding.id for job in line.expired(5.0)] == [1]
    assert taken(line, 100) == [(2, 3)]


def test_a_closed_queue_gives_back_what_waits_and_takes_nothing() -> None:
    line = queue()
    line.put(encoding(1, 3))
    assert [job.encoding.id for job in line.close()] == [1]
    with pytest.raises(Unavailable):
        line.put(encoding(2, 3))
    line.wait(1000.0)  # returns at once


@pytest.mark.parametrize("act", ["put", "wake", "close"])
def test_a_sleeper_is_woken(act: str) -> None:
    line = queue()
    thread = threading.Thread(target=line.wait, args=(1000.0,))
    thread.start()
    {"put": lambda: line.put(encoding(1, 1)), "wake": line.wake, "close": line.close}[act]()
    thread.join(30)
    assert not thread.is_alive()


def test_the_pace_follows_what_batches_took() -> None:
    pace = Pace(0.1, low=10, high=1000)
    assert pace.budget == 10
    pace.saw(100, 0.1)
    assert pace.budget == 100
    for _ in range(50):
        pace.saw(500, 0.1)
    assert 490 <= pace.budget <= 500
    pace.saw(10**9, 0.001)
    assert pace.budget == 1000
