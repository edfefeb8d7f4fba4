"""The record of a stream, alone: where each event stood, and the bounds on what is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.fakes import ManualClock
from vserve.api.trail import ENDING, FINISHED, OPENING, TAIL_LIMIT_BYTES, Trail, Trails
from vserve.errors import NotFound


class Reply:
    def hand_over(self) -> None:
        raise AssertionError("nobody asked")


def trail(owner: bytes = b"") -> Trail:
    return Trail("e", owner, 0, lambda: pytest.fail("not asked for"), (), ())


def on_a_loop(scene: Callable[[], None]) -> None:
    async def run() -> None:
        scene()

    asyncio.run(run())


def test_parked_streams_are_bounded_in_time_count_and_bytes_and_the_oldest_go_first() -> None:
    def scene() -> None:
        clock, reply = ManualClock(), Reply()
        trails = Trails(60, 3, 20_000, clock)
        made = [trail() for _ in range(5)]
        for one in made:
            trails.begin(one, reply)
            one.stamp(OPENING, b"data: x\n\n")
            trails.park(one, reply)
            clock.now_s += 10
        assert trails.parked == 3
        for one in made[:2]:
            with pytest.raises(NotFound):
                trails.find(f"{one.stream}.1", "e", b"", b"")
        assert trails.find(f"{made[4].stream}.1", "e", b"", b"")[0] is made[4]
        clock.now_s += 35
        trails.expire()
        assert trails.parked == 2
        big = trail()
        trails.begin(big, reply)
        for _ in range(1_000):
            big.stamp(0, b"data: x\n\n")
        trails.park(big, reply)
        assert trails.parked == 2  # together they were too many bytes: the oldest went
        huge = trail()
        trails.begin(huge, reply)
        for _ in range(4_000):
            huge.stamp(0, b"data: x\n\n")
        trails.park(huge, reply)
        assert (trails.parked, trails.parked_bytes) == (0, 0)
        silent = trail()
        trails.begin(silent, reply)
        trails.park(silent, reply)
        assert trails.parked == 0
        trails.close()

    on_a_loop(scene)


def test_events_made_together_have_an_id_each_and_the_rest_of_them_is_kept_within_a_bound() -> None:
    record = trail()
    data = b"data: a\n\ndata: b\n\ndata: c\n\n"
    stamped = record.stamp(ENDING, data)
    assert stamped.count(b"id: ") == 3
    tails = [point.tail for point in map(record.point, (1, 2, 3)) if point is not None]
    assert tails == [b"data: b\n\ndata: c\n\n", b"data: c\n\n", b""]
    large = b"data: " + b"x" * (TAIL_LIMIT_BYTES // 2) + b"\n\ndata: y\n\n"
    record.stamp(OPENING, large)
    record.stamp(OPENING, large)
    assert [record.point(event) is None for event in range(1, 8)] == [True, True, False, True, False, False, False]
    assert record.num_bytes < 2 * TAIL_LIMIT_BYTES


def test_a_point_is_found_along_the_way_that_the_client_took() -> None:
    record = Trail("e", b"", 0, lambda: pytest.fail("not asked for"), [_Kept(), _Kept()], ())  # type: ignore[list-item]

    def stamp(index: int, tokens: int) -> None:
        record.stamp(index << 32 | tokens, b"data: x\n\n")

    record.stamp(OPENING, b"data: x\n\n")  # 1
    stamp(0, 4)  # 2
    stamp(1, 2)  # 3
    stamp(0, 9)  # 4
    record.branch(2)  # a client that has not seen 3 and 4
    stamp(0, 9)  # 5
    stamp(1, FINISHED)  # 6
    tokens = {event: point.tokens for event in range(1, 7) if (point := record.point(event)) is not None}
    assert tokens == {
        1: {},
        2: {0: 4},
        3: {0: 4, 1: 2},
        4: {0: 9, 1: 2},
        5: {0: 9},
        6: {0: 9, 1: FINISHED},
    }


class _Kept:
    """As much of a Choice as a record looks at."""

    first = False
    prompt = ()
    recorded_bytes = 0

    def record(self) -> None: ...

    def recalls(self, tokens: int) -> bool:
        return True
