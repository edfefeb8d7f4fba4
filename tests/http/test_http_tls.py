"""TLS on real sockets: handshakes, client certificates, new certificates in a running server, garbage."""

from __future__ import annotations

import asyncio
import http.client
import os
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import uvloop

from tests.certificates import certificate
from tests.fakes_http import render_error
from vserve.errors import StartupError
from vserve.http.exchange import Response
from vserve.http.limits import Limits
from vserve.http.router import Route, Router
from vserve.http.server import HttpServer
from vserve.http.tls import Tls, TlsFiles

Ask = Callable[..., Awaitable[tuple[int, bytes]]]


def get(
    port: int, trusted: str, client: tuple[str, str] | None, version: ssl.TLSVersion | None, path: str
) -> tuple[int, bytes]:
    """GET, trusting one certificate only: the status and the server's certificate."""
    context = ssl.create_default_context(cafile=trusted)
    if client is not None:
        context.load_cert_chain(*client)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    link = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    try:
        link.connect()
        assert isinstance(link.sock, ssl.SSLSocket)
        shown = link.sock.getpeercert(binary_form=True) or b""
        link.request("GET", path)
        return link.getresponse().status, shown
    finally:
        link.close()


def run(tls: Tls, steps: Callable[[Ask, HttpServer], Awaitable[None]], limits: Limits | None = None) -> None:
    """Serve with the context on uvloop while the steps ask."""

    async def main() -> None:
        routes = [
            Route("GET", "/ping", lambda _: Response(200), "ping", auth="open", vital=True),
            Route("GET", "/plain", lambda _: Response(200), "plain", auth="open"),
        ]
        server = HttpServer(Router(routes), limits or Limits(), render_error)
        await server.listen("127.0.0.1", 0, ssl_context=tls.context)

        async def ask(
            trusted: str,
            client: tuple[str, str] | None = None,
            version: ssl.TLSVersion | None = None,
            path: str = "/ping",
        ) -> tuple[int, bytes]:
            return await asyncio.to_thread(get, server.port or 0, trusted, client, version, path)

        try:
            await steps(ask, server)
        finally:
            await server.close(1.0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main(), 60))


def der(cert: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(Path(cert).read_text())


@contextmanager
def refused() -> Iterator[None]:
    """The handshake fails; under TLS 1.3 the client may see that only as a closed connection."""
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        yield


@pytest.mark.promise("fault: TLS garbage")
def test_a_request_over_tls_is_answered_and_old_versions_are_not(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "one")

    async def steps(ask: Ask, server: HttpServer) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert await ask(cert, None, version) == (200, der(cert))
        # Plain bytes on a TLS port: the handshake fails, nothing else does.
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
        assert not (await reader.read()).startswith(b"HTTP")
        writer.close()
        assert (await ask(cert))[0] == 200

    tls = Tls(TlsFiles(cert, key))
    assert tls.context.minimum_version == ssl.TLSVersion.TLSv1_2
    run(tls, steps)


def test_one_file_may_hold_certificate_and_key(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "one")
    both = tmp_path / "both.pem"
    both.write_text(Path(cert).read_text() + Path(key).read_text())

    async def steps(ask: Ask, server: HttpServer) -> None:
        assert (await ask(cert))[0] == 200

    run(Tls(TlsFiles(str(both))), steps)


def test_with_authorities_every_client_needs_a_certificate_of_theirs(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "server")
    friend, stranger = certificate(tmp_path, "friend"), certificate(tmp_path, "stranger")

    async def steps(ask: Ask, server: HttpServer) -> None:
        assert (await ask(cert, friend))[0] == 200
        for client in (None, stranger):
            with refused():
                await ask(cert, client)
        assert (await ask(cert, friend))[0] == 200

    run(Tls(TlsFiles(cert, key, friend[0])), steps)


@pytest.mark.promise("fault: garbage on reload")
def test_a_reload_brings_the_new_certificate_and_garbage_keeps_the_old(tmp_path: Path) -> None:
    one, two, live = (certificate(tmp_path, name) for name in ("one", "two", "live"))

    def put(pair: tuple[str, str]) -> None:
        for source, target in zip(pair, live, strict=True):
            Path(target).write_bytes(Path(source).read_bytes())

    put(one)
    tls = Tls(TlsFiles(*live))

    async def steps(ask: Ask, server: HttpServer) -> None:
        assert await ask(one[0]) == (200, der(one[0]))
        put(two)
        tls.reload()
        assert await ask(two[0]) == (200, der(two[0]))
        bad: list[tuple[str, bytes]] = [
            (live[0], b"garbage"),
            (live[0], b""),
            (live[1], b"garbage"),
            (live[1], Path(one[1]).read_bytes()),  # another certificate's key
            (live[0], Path(one[0]).read_bytes()),
        ]
        for path, content in bad:
            put(two)
            Path(path).write_bytes(content)
            with pytest.raises(StartupError, match="--ssl-certfile") as caught:
                tls.reload()
            assert "\n" not in str(caught.value)
            assert await ask(two[0]) == (200, der(two[0]))
        Path(live[0]).unlink()
        with pytest.raises(StartupError, match="No such file"):
            tls.reload()
        assert await ask(two[0]) == (200, der(two[0]))

    run(tls, steps)


def test_a_reload_trusts_new_authorities_and_keeps_the_old_on_garbage(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "server")
    friend, other = certificate(tmp_path, "friend"), certificate(tmp_path, "other")
    trusted = tmp_path / "ca.pem"
    trusted.write_bytes(Path(friend[0]).read_bytes())
    tls = Tls(TlsFiles(cert, key, str(trusted)))

    async def steps(ask: Ask, server: HttpServer) -> None:
        with refused():
            await ask(cert, other)
        trusted.write_bytes(b"garbage")
        with pytest.raises(StartupError, match="--ssl-ca-certs"):
            tls.reload()
        assert (await ask(cert, friend))[0] == 200
        trusted.write_bytes(Path(other[0]).read_bytes())
        tls.reload()
        assert (await ask(cert, other))[0] == 200

    run(tls, steps)


def test_an_encrypted_key_is_refused_instead_of_asking_the_terminal(tmp_path: Path) -> None:
    files = certificate(tmp_path, "locked", "-passout", "pass:secret")
    with pytest.raises(StartupError, match="the key is encrypted"):
        Tls(TlsFiles(*files))


def test_connections_in_their_handshake_count_and_too_many_are_dropped_before_it(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "one")

    async def steps(ask: Ask, server: HttpServer) -> None:
        mute = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
        with refused():  # no handshake at all
            await ask(cert)
        assert server.connections == 2
        mute[0][1].close()
        assert await server.site.quiet(lambda: server.connections == 1, 20)
        assert (await ask(cert))[0] == 200  # a vital route
        assert await server.site.quiet(lambda: server.connections == 1, 20)
        assert (await ask(cert, path="/plain"))[0] == 503
        mute[1][1].close()
        assert await server.site.quiet(lambda: server.connections == 0, 20)
        assert (await ask(cert, path="/plain"))[0] == 200

    run(Tls(TlsFiles(cert, key)), steps, Limits(connections=1, spare_connections=1))


def test_handshakes_count_for_their_address(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "one")

    async def steps(ask: Ask, server: HttpServer) -> None:
        _, mute = await asyncio.open_connection("127.0.0.1", server.port)
        assert (await ask(cert, path="/plain"))[0] == 429
        mute.close()
        assert await server.site.quiet(lambda: server.connections == 0, 20)
        assert (await ask(cert, path="/plain"))[0] == 200

    run(Tls(TlsFiles(cert, key)), steps, Limits(connections_per_address=1))


def test_a_server_that_closes_ends_the_handshakes_that_are_under_way(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "one")

    async def steps(ask: Ask, server: HttpServer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert (await ask(cert))[0] == 200  # by now the mute one was accepted
        await server.close(1.0)
        assert server.connections == 0
        with suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()

    run(Tls(TlsFiles(cert, key)), steps, Limits(tls_handshake_s=3600))


def test_without_descriptors_nothing_is_accepted_and_then_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = certificate(tmp_path, "one")

    async def steps(ask: Ask, server: HttpServer) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as client:
            client.setblocking(False)
            free = os.dup(client.fileno())
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", server.port))
                while not caplog.records:
                    await asyncio.sleep(0)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        (record,) = caplog.records
        assert record.getMessage() == "cannot accept a connection: Too many open files"
        assert (await ask(cert))[0] == 200

    run(Tls(TlsFiles(cert, key)), steps)


def test_a_handshake_that_does_not_come_to_an_end_is_given_up_in_time_and_garbage_at_once(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "one")

    async def steps(ask: Ask, server: HttpServer) -> None:
        hello = bytes.fromhex("16030100c8010000c40303")  # a TLS client's greeting that is cut
        for begin in (b"", b"\x16", hello):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(begin)
            assert await asyncio.wait_for(reader.read(), 20) == b""  # ended by the server, and only by time
            writer.close()
        for garbage in (b"\x00" * 100, b"\x16\x03\x01\xff\xff" + b"x" * 300, bytes(range(256))):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(garbage)
            with suppress(ConnectionError):
                assert not (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP")
            writer.close()
        assert server.connections == 0
        assert (await ask(cert))[0] == 200

    run(Tls(TlsFiles(cert, key)), steps, Limits(tls_handshake_s=0.2))
