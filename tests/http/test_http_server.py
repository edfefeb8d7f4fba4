"""The server on real sockets of the loopback interface, under both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from tests.fakes_http import Held, Waiter, answers, echo, render_error
from vserve.errors import StartupError
from vserve.http.exchange import Exchange, Response
from vserve.http.limits import Limits
from vserve.http.router import Route, Router
from vserve.http.server import HttpServer

PING = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"
CLOSE = b"GET /ping HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
LAST_S = 20.0
"""Bound on every wait; nothing waits for it to pass."""

Main = Callable[[], Awaitable[None]]
Run = Callable[[Main], None]


def sockets() -> set[str]:
    """The open sockets of this process."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return {name for name in found if name.startswith("socket:")}


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a test's coroutine under the loop; no task and no descriptor may be left behind."""

    def runner(main: Main) -> None:
        async def checked() -> None:
            before = sockets()
            await asyncio.wait_for(main(), LAST_S)
            for _ in range(5):
                await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert sockets() <= before

        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as loop:
            loop.run(asyncio.sleep(0))  # what a loop opens on first use is not the test's
            loop.run(checked())

    return runner


class Site:
    """A server with the routes of these tests."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.held, self.waiter = Held(), Waiter()
        self.gone = asyncio.Event()
        self.arrived = asyncio.Event()
        routes = [
            Route("GET", "/ping", lambda _: Response(200), "ping"),
            Route("POST", "/echo", echo, "echo", body=True),
            Route("GET", "/hold", self._hold, "hold"),
            Route("GET", "/wait", self.waiter, "wait"),
            Route("GET", "/flood", self._flood, "flood"),
        ]
        self.server = HttpServer(Router(routes), limits or Limits(), render_error)

    def _hold(self, exchange: Exchange) -> None:
        self.held(exchange)
        exchange.on_gone = self.gone.set
        self.arrived.set()

    def _flood(self, exchange: Exchange) -> None:
        """Stream 4 MB, a piece whenever the client has room for it."""
        left = [b"%07d\n" % number * 512 for number in range(1024)]

        def more() -> None:
            while left and exchange.writable:
                exchange.write(left.pop(0))
                if len(left) % 16 == 0:
                    break
            if not left:
                exchange.end()
            elif exchange.writable:
                asyncio.get_running_loop().call_soon(more)

        exchange.on_writable = more
        exchange.start_stream(200, "text/plain")
        more()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.server.port)


async def ask(site: Site, data: bytes) -> list[tuple[int, bytes]]:
    """Everything a new connection answers until it ends."""
    reader, writer = await site.connect()
    writer.write(data)
    found = answers(await reader.read(), closed=True)
    writer.close()
    await writer.wait_closed()
    return [(response.status_code, body) for response, body in found]


def test_requests_are_answered_over_tcp(run: Run) -> None:
    async def main() -> None:
        site = Site()
        await site.server.listen("127.0.0.1", 0)
        assert site.server.addresses == (f"127.0.0.1:{site.server.port}",)
        body = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        assert await ask(site, PING + body + CLOSE) == [(200, b""), (200, b"hello"), (200, b"")]
        assert await ask(site, b"nonsense\r\n\r\n") != []
        await site.server.close(5)

    run(main)


def test_a_large_body_comes_back_whole(run: Run) -> None:
    async def main() -> None:
        site = Site()
        await site.server.listen("127.0.0.1", 0)
        body = bytes(range(256)) * 12_000
        head = b"POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        assert await ask(site, head + body) == [(200, body)]
        await site.server.close(5)

    run(main)


def test_a_stream_waits_for_a_reader_and_arrives_whole(run: Run) -> None:
    async def main() -> None:
        site = Site(Limits(write_high_bytes=20_000, write_low_bytes=5_000))
        await site.server.listen("127.0.0.1", 0)
        ((status, body),) = await ask(site, b"GET /flood HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert (status, body) == (200, b"".join(b"%07d\n" % number * 512 for number in range(1024)))
        await site.server.close(5)

    run(main)


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_goes_is_noticed(run: Run, how: str, streaming: bool) -> None:
    async def main() -> None:
        site = Site()
        await site.server.listen("127.0.0.1", 0)
        _, writer = await site.connect()
        writer.write(b"GET /hold HTTP/1.1\r\nHost: a\r\n\r\n")
        await site.arrived.wait()
        if streaming:
            site.held.last.start_stream(200, "text/plain")
            site.held.last.write(b"x")
        if how == "RST":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        await site.gone.wait()
        assert site.held.last.gone
        assert site.server.active == 0
        await site.server.close(5)
        assert site.server.connections == 0

    run(main)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_whose_upload_is_refused_reads_the_answer(run: Run, chunked: bool) -> None:
    async def main() -> None:
        site = Site(Limits(body_bytes=100_000))
        await site.server.listen("127.0.0.1", 0)
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 8000000"
        piece = b"F4240\r\n" + b"x" * 1_000_000 + b"\r\n" if chunked else b"x" * 1_000_000
        found = await ask(site, b"POST /echo HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n" + piece * 8)
        assert [status for status, _ in found] == [413]
        await site.server.close(5)

    run(main)


def test_close_lets_a_stream_finish_and_refuses_newcomers(run: Run) -> None:
    async def main() -> None:
        site = Site()
        await site.server.listen("127.0.0.1", 0)
        port = site.server.port
        asking = asyncio.create_task(ask(site, b"GET /hold HTTP/1.1\r\nHost: a\r\n\r\n"))
        await site.arrived.wait()
        site.held.last.start_stream(200, "text/plain")
        closing = asyncio.create_task(site.server.close(LAST_S))
        while not site.server.site.draining:
            await asyncio.sleep(0)
        with pytest.raises(OSError, match=r"refused|Connect call failed"):
            await asyncio.open_connection("127.0.0.1", port)
        site.held.last.write(b"last words")
        site.held.last.end()
        await closing
        assert await asking == [(200, b"last words")]

    run(main)


def test_close_cuts_what_does_not_finish(run: Run) -> None:
    async def main() -> None:
        site = Site()
        await site.server.listen("127.0.0.1", 0)
        reader, writer = await site.connect()
        writer.write(b"GET /hold HTTP/1.1\r\nHost: a\r\n\r\n")
        await site.arrived.wait()
        await site.server.close(0)
        assert site.gone.is_set()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()

    run(main)


def test_a_unix_socket_is_served_and_removed(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "s")
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        site = Site()
        await site.server.listen(uds=path)
        with pytest.raises(StartupError, match="another server"):
            await Site().server.listen(uds=path)
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(CLOSE)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        assert (site.server.addresses, site.server.port) == ((path,), None)
        await site.server.close(5)
        assert not os.path.exists(path)
        Path(path).write_text("mine")
        with pytest.raises(StartupError, match="no socket"):
            await Site().server.listen(uds=path)
        assert Path(path).read_text() == "mine"

    run(main)


def test_a_ready_socket_is_served(run: Run) -> None:
    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        site = Site()
        await site.server.listen(sock=sock)
        assert site.server.port == sock.getsockname()[1]
        assert await ask(site, CLOSE) == [(200, b"")]
        await site.server.close(5)

    run(main)


def test_a_port_in_use_is_one_clear_line(run: Run) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(StartupError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*in use"):
                await Site().server.listen("127.0.0.1", port)

    run(main)


@pytest.mark.promise("R14")
def test_the_port_binds_again_at_once(run: Run) -> None:
    async def main() -> None:
        port = 0
        for _ in range(3):
            site = Site()
            await site.server.listen("127.0.0.1", port)
            port = site.server.port or 0
            assert await ask(site, CLOSE) == [(200, b"")]
            await site.server.close(5)

    run(main)


def test_many_clients_come_and_go(run: Run) -> None:
    async def client(site: Site, number: int) -> None:
        reader, writer = await site.connect()
        requests = [
            PING,
            b"GET /hold HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /fl",
        ]
        writer.write(PING + requests[number % 4])
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async def main() -> None:
        site = Site()
        await site.server.listen("127.0.0.1", 0)
        await asyncio.gather(*[client(site, number) for number in range(100)])
        assert await site.server.wait_idle(LAST_S)
        await site.server.close(5)
        assert (site.server.connections, site.server.active) == (0, 0)
        assert site.waiter.started == site.waiter.cancelled

    run(main)
