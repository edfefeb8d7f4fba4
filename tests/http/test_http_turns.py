"""What is served in one pass of the loop: a burst gives way to sockets, and a probe does not wait for it."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from tests.fakes_http import Edge, ManualClock, MemoryTransport, answers, run, turns
from vserve.errors import ApiError
from vserve.http.events import RequestHead
from vserve.http.exchange import Exchange, Response
from vserve.http.router import Route
from vserve.http.turns import QUICK_S, Turns
from vserve.http.work import begin

PING = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"
ECHO = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
ASK = b"POST /ask HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"


class SlowHeads(Edge):
    """An Edge on whose clock each head takes so many seconds."""

    head_s = 0.0

    def _gate(self, head: RequestHead, route: Route) -> ApiError | None:
        self.clock.now_s += self.head_s
        return super()._gate(head, route)


class Slow:
    """A server whose handler of POST /ask takes so many seconds on its clock, and every head so many."""

    def __init__(self, seconds: float = QUICK_S, head_s: float = 0.0) -> None:
        self.seconds = seconds
        self.asked: list[str] = []
        self.edge = SlowHeads(extra=[Route("POST", "/ask", self._ask, "ask", body=True)])
        self.edge.head_s = head_s

    async def _ask(self, exchange: Exchange) -> Response:
        self.asked.append(exchange.request.peer)
        self.edge.clock.now_s += self.seconds
        return Response(200, exchange.request.body, "text/plain")

    def connect(self, number: int) -> MemoryTransport:
        return self.edge.connect(("192.0.2.1", number))

    async def end(self, *clients: MemoryTransport) -> None:
        for client in clients:
            client.vanish()
        await turns()
        assert (self.edge.server.connections, self.edge.server.active, self.edge.server.site.bodies_bytes) == (0, 0, 0)
        self.edge.server.site.stop_sweeping()


def statuses(client: MemoryTransport) -> list[int]:
    return [response.status_code for response, _ in answers(bytes(client.received), closed=client.ended or client.lost)]


@pytest.mark.parametrize(("share", "most"), [(1.0, 1), (0.5, 2), (0.3, 4), (3.0, 1)])
def test_a_burst_is_served_a_turn_a_pass_in_the_order_in_which_it_came(share: float, most: int) -> None:
    async def main() -> None:
        slow = Slow(QUICK_S * share)
        clients = [slow.connect(number) for number in range(20)]
        for client in clients:
            client.send(ASK)
        served = [len(slow.asked)]
        while served[-1] < 20:
            await turns(1)
            served.append(len(slow.asked))
        assert {after - before for before, after in pairwise([0, *served])} <= set(range(most + 1))
        assert max(served) / len(served) > most / 3  # every second turn is theirs, or goes to their replies
        assert slow.asked == [f"192.0.2.1:{number}" for number in range(20)]
        await turns()
        assert [statuses(client) for client in clients] == [[200]] * 20
        await slow.end(*clients)

    run(main)


@pytest.mark.promise("R3")
def test_a_probe_behind_a_burst_is_answered_within_its_read() -> None:
    async def main() -> None:
        slow = Slow()
        clients = [slow.connect(number) for number in range(20)]
        probes = [slow.connect(100 + number) for number in range(3)]
        for client in clients:
            client.send(ASK)
        for number, probe in enumerate(probes):  # never seen before, and known
            probe.send(PING)
            assert statuses(probe) == [200]
            assert len(slow.asked) <= 1 + number
            await turns(1)
        await turns(100)
        assert len(slow.asked) == 20
        await slow.end(*clients, *probes)

    run(main)


def test_a_newcomer_does_not_pass_those_who_wait() -> None:
    async def main() -> None:
        slow = Slow()
        clients = [slow.connect(number) for number in range(5)]
        for client in clients[:3]:
            client.send(ASK)
        await turns(1)
        slow.seconds = 0.0  # there is time in this pass now, but others came first
        for client in clients[3:]:
            client.send(ASK)
        assert len(slow.asked) <= 2
        await turns(20)
        assert slow.asked == [f"192.0.2.1:{number}" for number in range(5)]
        await slow.end(*clients)

    run(main)


@pytest.mark.parametrize("rest", [b"", PING, ASK, ASK[:20]])
def test_what_comes_while_a_request_waits_is_served_behind_it(rest: bytes) -> None:
    async def main() -> None:
        slow = Slow()
        first, second = slow.connect(1), slow.connect(2)
        first.send(ASK)
        second.send(ASK[:30])
        second.send(ASK[30:] + rest)
        assert slow.asked == ["192.0.2.1:1"]
        await turns()
        assert statuses(second) == [200] * (1 + (rest in (PING, ASK)))
        await slow.end(first, second)

    run(main)


def test_a_client_that_vanishes_before_its_turn_is_not_served() -> None:
    async def main() -> None:
        slow = Slow()
        first, second = slow.connect(1), slow.connect(2)
        first.send(ASK)
        second.send(ASK)
        second.vanish()
        await turns()
        assert slow.asked == ["192.0.2.1:1"]
        await slow.end(first, second)

    run(main)


@pytest.mark.parametrize(("request_", "answers"), [(ECHO, [200]), (ASK, [])])
def test_a_client_that_ends_its_half_before_its_turn_is_treated_like_one_read_at_once(
    request_: bytes, answers: list[int]
) -> None:
    async def main() -> None:
        slow = Slow()
        first, second = slow.connect(1), slow.connect(2)
        first.send(ASK)
        second.send(request_)
        second.finish()
        await turns()
        assert statuses(second) == answers
        assert second.lost
        assert slow.asked == ["192.0.2.1:1"]
        await slow.end(first, second)

    run(main)


def test_a_request_that_waits_as_the_server_drains_is_still_answered() -> None:
    async def main() -> None:
        slow = Slow()
        first, second, idle = (slow.connect(number) for number in range(3))
        idle.send(PING)
        first.send(ASK)
        second.send(ASK)
        slow.edge.server.drain()
        await turns()
        assert statuses(second) == [200]
        assert (second.lost, idle.lost) == (True, True)
        await slow.end(first, second, idle)

    run(main)


def test_a_client_that_goes_between_head_and_handler_is_not_served() -> None:
    async def main() -> None:
        slow = Slow(head_s=QUICK_S)
        clients = [slow.connect(number) for number in range(3)]
        for client in clients:
            client.send(ASK)
        await turns(1)
        assert slow.edge.gated == ["/ask"] * 2  # the third waits, so the second's handler has a turn of its own
        assert slow.asked == ["192.0.2.1:0"]
        clients[1].vanish()
        await turns()
        assert slow.asked == ["192.0.2.1:0", "192.0.2.1:2"]
        await slow.end(*clients)

    run(main)


# Turns


def test_jobs_run_one_a_pass_in_order_also_behind_one_that_raises() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: ran.append(type(context["exception"])))
        ran: list[object] = []
        jobs = Turns(loop, lambda: 0.0)
        jobs.now(lambda: ran.append("now"))
        jobs.soon(lambda: ran.append(1 / 0))
        jobs.now(lambda: ran.append("behind"))
        seen = []
        for _ in range(3):
            seen.append(len(ran))
            await turns(1)
        assert ran == ["now", ZeroDivisionError, "behind"]
        assert seen == [1, 2, 3]

    run(main)


@pytest.mark.parametrize(
    ("seconds", "order"),
    [
        (QUICK_S, "tokens|head|tokens|handler|tokens|head|tokens|handler|tokens|tokens"),
        (QUICK_S / 2, "tokens|head handler|tokens|head handler|tokens|tokens|tokens|tokens"),
        (0.0, "tokens|head handler head handler|tokens|tokens|tokens|tokens|tokens"),
    ],
)
def test_tokens_and_requests_take_turns(seconds: float, order: str) -> None:
    async def main() -> None:
        ran: list[str] = []
        clock = ManualClock()
        jobs = Turns(asyncio.get_running_loop(), clock)

        def tokens() -> None:
            ran.append("tokens")
            if ran.count("tokens") < 6:
                jobs.soon(tokens)

        def head() -> None:
            half("head")
            jobs.next(lambda: half("handler"))

        def half(name: str) -> None:
            ran.append(name)
            clock.now_s += seconds

        jobs.soon(tokens)
        for _ in range(2):
            jobs.wait(head)
        assert not jobs.free()
        passes = []
        while len(ran) < 10:
            before = len(ran)
            await turns(1)
            passes.append(" ".join(ran[before:]))
        assert "|".join(passes) == order

    run(main)


# Work


def test_a_handler_that_waits_for_nothing_is_no_task() -> None:
    async def main() -> None:
        slow = Slow()
        client = slow.connect(1)
        client.send(ASK)
        assert statuses(client) == [200]
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await slow.end(client)

    run(main)


async def _sum(*parts: asyncio.Future[int] | int) -> int:
    return sum([part if isinstance(part, int) else await part for part in parts])


def test_work_that_does_not_wait_returns_or_raises_at_once() -> None:
    assert begin(_sum(1, 2)) == 3
    with pytest.raises(TypeError):
        begin(_sum(None))  # type: ignore[arg-type]


@pytest.mark.parametrize("early", [True, False])
def test_work_that_waits_goes_on_in_a_task(early: bool) -> None:
    async def main() -> None:
        futures = [asyncio.get_running_loop().create_future() for _ in range(2)]
        rest = begin(_sum(1, futures[0], 2, futures[1]))
        assert not isinstance(rest, int)
        task = asyncio.ensure_future(rest)
        if not early:
            await turns()
        futures[0].set_result(10)
        await turns()
        futures[1].set_result(20)
        assert await task == 33

    run(main)


def test_what_work_waits_for_can_fail() -> None:
    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        rest = begin(_sum(future))
        assert not isinstance(rest, int)
        task = asyncio.ensure_future(rest)
        future.set_exception(ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await task

    run(main)


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_work_is_cancelled_where_it_waits(passes: int) -> None:
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)  # cleaning up may wait, too
            cleaned.append(True)

    async def main() -> None:
        rest = begin(work())
        assert rest is not None
        task = asyncio.ensure_future(rest)
        await turns(passes)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned == [True]

    run(main)


def test_a_handler_cancelled_as_it_begins_cuts_its_connection() -> None:
    async def cancelled(exchange: Exchange) -> Response:
        raise asyncio.CancelledError

    async def main() -> None:
        edge = Edge(extra=[Route("GET", "/never", cancelled, "never")])
        client = edge.connect()
        client.send(b"GET /never HTTP/1.1\r\nHost: a\r\n\r\n")
        await turns()
        assert (client.aborted, client.received) == (True, b"")
        edge.server.site.stop_sweeping()

    run(main)
